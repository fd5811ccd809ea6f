"""The documentation site is built from the repository's Markdown, whole, with every link right."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import analysis
import fixers

ROOT = Path(__file__).parents[1]
BLOCKS = ("h1", "h2", "h3", "h4", "li", "ol", "pre", "tr", "ul", "blockquote")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that it is written to. A warning, such as a link that leads nowhere, ends it, but not with --quiet."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Article(HTMLParser):
    """How often each kind of block is in the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.counts = dict.fromkeys(BLOCKS, 0)
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in self.counts:
            self.counts[tag] += 1


def test_pages_read_as_on_a_code_host(site):
    """As many lists, items, blocks of code, rows and headings as an independent reader of GitHub's Markdown finds."""
    host = MarkdownIt("commonmark").enable("table")
    pages = {ROOT / "README.md": "index.html"}
    pages |= {ROOT / name: f"{name[:-3].lower()}/index.html" for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    pages |= {path: f"{path.stem}/index.html" for path in (ROOT / "docs").glob("*.md")}
    for source, page in pages.items():
        html = (site / page).read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", html, re.DOTALL)
        expected = Article(host.render(source.read_text(encoding="utf-8"))).counts
        assert Article(article[0]).counts == expected, source.name


@pytest.mark.parametrize("package", [fixers, analysis], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(site, package):
    html = (site / "reference" / package.__name__ / "index.html").read_text(encoding="utf-8")
    missing = [name for name in package.__all__ if f'id="{package.__name__}.{name}"' not in html]
    assert [name for name in missing if name != "errors"] == []  # a module, whose classes are there


def test_every_approach_is_on_a_page(site):
    html = (site / "reference" / "approaches" / "index.html").read_text(encoding="utf-8")
    for fixer in fixers.all_fixers().values():
        assert f"{fixer.name} ({fixer.abbreviation})" in html
        for parameter in fixer.parameter_infos():
            assert f"<code>{parameter}</code>" in html


def test_the_site_asks_no_other_host(site):
    """Neither fonts nor scripts nor styles nor pictures."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]*src=\"(?:https?:)?//[^\"]*", text) == [], page
        assert re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(?:https?:)?//[^\"]*", text) == [], (
            page
        )
