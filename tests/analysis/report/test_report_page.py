"""The page in a real browser: no error, no request, figures drawn, tables sorted, nothing cut off or too faint."""

import contextlib
import functools
import re
import shutil
import struct
from xml.etree import ElementTree

import pytest

import analysis
from analysis.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(study, write_study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    failed = write_study(
        folder / "failed",
        subjects=("digits",),
        seeds=(0,),
        adapt=0,
        outcomes={(fixer, "digits", 0): "FAILURE" for fixer in ("apricot", "three_m_dnn", "arachne", "care")},
    )
    empty = write_study(folder / "empty", subjects=(), fixers=(), outcomes={})
    results = {
        "study": study.folder,
        "published": analysis.import_published(folder / "published"),
        "failed": failed.folder,
        "empty": empty.folder,
    }
    return {name: report.write_report(path, folder / f"{name}.html") for name, path in results.items()}


class Visit:
    """A page with what it complained of and asked for."""

    def __init__(self, browser, path, width, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def draw_everything(self):
        self.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        self.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every((node) => node.querySelector('.main-svg'))"
        )
        self.page.evaluate("dispatchEvent(new Event('afterprint'))")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.fixture
def visit(browser, pages):
    return lambda name, width=1400, **more: Visit(browser, pages[name], width, **more)


@pytest.fixture(scope="module")
def drawn(browser, pages):
    """Pages with every figure drawn, each opened once: to look at, not to change."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_page(name, width=1400, scheme="light"):
            seen = stack.enter_context(Visit(browser, pages[name], width, scheme))
            seen.draw_everything()
            return seen

        yield open_page


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["study", pytest.param("published", marks=pytest.mark.slow), "failed", "empty"])
def test_it_loads_without_an_error_or_a_request_and_fits(drawn, name, width):
    seen = drawn(name, width)
    page = seen.page
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Text may be wider than its box only where the reader can scroll to the rest or sees an ellipsis.
    cut = page.evaluate(
        """() => [...document.querySelectorAll('main *, header *')].filter((node) => {
             const style = getComputedStyle(node);
             return node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0 && style.overflowX === 'hidden'
               && style.textOverflow !== 'ellipsis' && !node.closest('svg');
           }).map((node) => node.outerHTML.slice(0, 120))"""
    )
    assert cut == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["study", pytest.param("published", marks=pytest.mark.slow)])
def test_the_words_of_a_figure_neither_collide_nor_leave_it(drawn, name, width):
    seen = drawn(name, width)
    found = seen.page.evaluate(
        """() => {
          const bad = [];
          for (const plot of document.querySelectorAll('.plot')) {
            const frame = plot.getBoundingClientRect();
            const words = [...plot.querySelectorAll('text')].filter((t) => t.textContent.trim());
            const boxes = words.map((t) => [t.textContent, t.getBoundingClientRect()]).filter(([, b]) => b.width);
            boxes.forEach(([text, b], i) => {
              if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.bottom > frame.bottom + 1)
                bad.push([plot.dataset.figure, 'leaves', text]);
              for (const [other, c] of boxes.slice(i + 1)) {
                const x = Math.min(b.right, c.right) - Math.max(b.left, c.left);
                const y = Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top);
                if (x > 2 && y > 4) bad.push([plot.dataset.figure, text, other]);
              }
            });
          }
          return bad;
        }"""
    )
    assert found == []


def test_tables_sort(visit):
    with visit("published") as seen:
        page = seen.page
        table = page.locator("table[id^=effectiveness-mnist]")
        head = table.locator("thead th", has_text="RR %")
        column = "trs => trs.map(tr => tr.cells.length > 6 ? Number(tr.cells[4].dataset.sort) : null)"
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        values = table.locator("tbody tr").evaluate_all(column)
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=True)
        assert values[0] == 73.97
        # Rows without a figure stay last in both directions.
        assert values[-2:] == [None, None]
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        values = table.locator("tbody tr").evaluate_all(column)
        assert [v for v in values if v is not None] == sorted(known)
        assert values[-2:] == [None, None]


def test_the_main_table_needs_no_scrolling_on_a_wide_window(visit):
    with visit("study") as seen:
        wide = "frames => frames.map((frame) => frame.scrollWidth - frame.clientWidth)"
        assert seen.page.locator(".scroll:has(table[id^=effectiveness])").evaluate_all(wide) == [0, 0]


@pytest.mark.parametrize("name", ["study", "published"])
def test_a_phone_shows_what_is_repaired_and_broken_without_scrolling(visit, name):
    with visit(name, width=390) as seen:
        ends = seen.page.locator("table[id^=effectiveness] thead tr").evaluate_all(
            "rows => rows.map((row) => [...row.cells].find((cell) => cell.innerText.startsWith('NFR'))"
            ".getBoundingClientRect().right - row.closest('.scroll').getBoundingClientRect().right)"
        )
        assert ends and max(ends) <= 0


def test_trials_are_found_and_paged(visit, study):
    with visit("study") as seen:
        page = seen.page
        assert f"of {len(study.trials)} trials" in page.locator("#trial-count").inner_text()
        page.locator("#trial-search").fill("care timeout")
        assert "of 1 trials" in page.locator("#trial-count").inner_text()
        assert page.locator("#trials tbody tr").count() == 1
        page.locator("#trial-search").fill("no such thing")
        assert page.locator("#trial-count").inner_text() == "No trial matches."


@pytest.mark.slow
def test_every_figure_is_saved_whole_with_its_title_for_white_paper(visit):
    with visit("study", scheme="dark") as seen:
        page = seen.page
        page.evaluate("document.querySelectorAll('details.subject').forEach((node) => { node.open = true; })")
        figures = page.locator("figure")
        assert figures.count() > 12
        for index in range(figures.count()):
            figure = figures.nth(index)
            figure.scroll_into_view_if_needed()
            width = max(560, figure.locator(".plot").evaluate("node => node.clientWidth"))
            saved = {}
            # A PNG is the same drawing as pixels, and takes a second.
            for form in ("svg", "png") if index < 3 else ("svg",):
                with page.expect_download() as download:
                    figure.locator(f"button[data-export={form}]").click()
                name = figure.locator(".plot").get_attribute("data-figure")
                assert download.value.suggested_filename == f"{name}.{form}"
                saved[form] = download.value.path().read_bytes()
            root = ElementTree.fromstring(saved["svg"])
            height = int(root.get("height"))
            assert int(root.get("width")) == width and height > 100
            words = ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]
            assert figure.locator("h3").inner_text() in words
            # Names on an axis, and not the title alone.
            assert sum(bool(word) for word in words) > 3
            background = next(root.iter("{http://www.w3.org/2000/svg}rect"))
            assert "fill: rgb(255, 255, 255)" in background.get("style") and "fill-opacity: 1" in background.get(
                "style"
            )
            if index < 3:
                assert saved["png"].startswith(b"\x89PNG")
                assert struct.unpack(">II", saved["png"][16:24]) == (3 * width, 3 * height)
                assert len(saved["png"]) > 5000
        # The page is as dark as it was.
        assert page.evaluate("document.documentElement.dataset.theme") is None
        assert seen.errors == []


def test_dark_pages_are_printed_in_dark_ink_on_white(visit):
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    with visit("study", scheme="dark") as seen:
        seen.page.locator(".plot").first.scroll_into_view_if_needed()
        seen.page.wait_for_selector(".plot .xtick text")
        before = seen.page.evaluate(ink)
        seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        seen.page.wait_for_function(f"{ink} !== '{before}'")
        on_paper = seen.page.evaluate(ink)
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert all(int(part) < 128 for part in re.findall(r"[0-9]+", on_paper)[:3]), on_paper
        seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
        seen.page.wait_for_function(f"{ink} === '{before}'")
        assert seen.errors == []


def test_links_open_what_they_lead_to(visit):
    with visit("study") as seen:
        link, fold = seen.page.locator("a[href='#sql-cells']").first, seen.page.locator("#sql-cells")
        assert fold.get_attribute("open") is None
        link.click()
        seen.page.wait_for_selector("#sql-cells[open]")
        fold.locator("summary").click()
        seen.page.wait_for_selector("#sql-cells:not([open])")
        link.click()
        seen.page.wait_for_selector("#sql-cells[open]")
        seen.page.reload()
        seen.page.wait_for_selector("#sql-cells[open]")


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_text_stands_out_from_its_background(drawn, scheme):
    seen = drawn("study", scheme=scheme)
    faint = seen.page.evaluate(
        """() => {
          const parse = (c) => c.match(/[\\d.]+/g).map(Number);
          const over = (a, b) => { const k = a[3] ?? 1; return [0, 1, 2].map((i) => a[i] * k + b[i] * (1 - k)); };
          const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255;
            return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
          const bad = new Map();
          for (const node of document.querySelectorAll('main *, header *, nav *, footer *')) {
            if (node.closest('svg') || node.tagName === 'STYLE' || !node.getClientRects().length) continue;
            if (![...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
            const chain = [];
            for (let up = node; up; up = up.parentElement) chain.push(parse(getComputedStyle(up).backgroundColor));
            const back = chain.reverse().reduce((base, c) => over(c, base), [255, 255, 255]);
            const ink = over(parse(getComputedStyle(node).color), back);
            const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
            const ratio = (a + .05) / (b + .05);
            if (ratio < 4.5) bad.set(node.className + ' ' + node.tagName, ratio.toFixed(2));
          }
          return [...bad];
        }"""
    )
    assert faint == []


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param("study", "light", marks=pytest.mark.slow),
        ("study", "dark"),
        pytest.param("published", "light", marks=pytest.mark.slow),
        pytest.param("failed", "light", marks=pytest.mark.slow),
    ],
)
def test_axe_has_no_complaint(drawn, name, scheme):
    seen = drawn(name, scheme=scheme)
    found = axe.Axe().run(seen.page).response["violations"]
    assert {item["id"]: [node["html"][:160] for node in item["nodes"][:3]] for item in found} == {}


def test_everything_is_reached_by_keyboard(visit):
    with visit("study") as seen:
        page = seen.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
        assert {"A.", "BUTTON.theme", "SUMMARY.", "DIV.scroll", "BUTTON."} <= reached


def test_tables_are_readable_without_a_script(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["study"].as_uri())
    assert page.locator("table[id^=effectiveness] tbody tr").count() > 4
    assert page.locator("noscript").first.is_visible()
    context.close()


def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, pages, tmp_path):
    # As if escaping had failed somewhere: the browser itself must refuse.
    text = pages["empty"].read_text(encoding="utf-8")
    evil = tmp_path / "evil.html"
    evil.write_text(
        re.sub(
            "<main",
            "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"><main",
            text,
            count=1,
        )
    )
    with Visit(browser, evil, 800) as seen:
        assert seen.page.title() != "owned"
        assert any("Content Security Policy" in error for error in seen.errors)
