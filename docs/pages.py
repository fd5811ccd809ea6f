"""MkDocs hook: the pages of the site that are not files of docs/, and what makes the others read there as elsewhere."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import fixers
from orchestrator.cli.listings import parameter_rows

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

_LINK = re.compile(r"(?P<start>!?\[(?P<text>[^]]*)]\()(?P<target>[^)#\s]+)(?P<end>(#[^)\s]*)?\))")
_ITEM = re.compile(r" *([-*+]|\d+[.)]) +")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies beside docs/, and a page of all approaches."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "reference/approaches.md", content="\n\n".join(_approaches())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them, and lists as Python-Markdown reads them."""
    return _indented_by_four(_linked(markdown, page.file.src_uri))


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things by Sphinx' roles here and there."""
    return re.sub(r":(attr|class|data|exc|func|meth|mod):(?=<code>)", "", html)


def _approaches() -> Iterator[str]:
    yield "# Approaches"
    yield "What each does, where it departs from its paper and what it costs, as `fixstudy fixers NAME` says."
    for level in ("model", "layer", "neuron"):
        yield f"## {level.capitalize()} level"
        for fixer in fixers.all_fixers().values():
            if fixer.level == level:
                path = f"{fixer.__module__}.{fixer.__qualname__}"
                yield f"### {fixer.name} ({fixer.abbreviation})\n\n*{fixer.reference}*"
                needs = ", ".join(f"`{requirement.code}`" for requirement in fixer.requirements)
                yield f"Needs {needs or 'nothing'}."
                yield f"::: {path}\n    options: {{members: [], show_root_heading: false, show_root_toc_entry: false}}"
                rows = [("parameter", "default", "search space", "allowed", "meaning"), ("---",) * 5]
                rows += [(f"`{name}`", *rest) for name, *rest in parameter_rows(fixer)]
                yield "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _linked(markdown: str, here: str) -> str:
    """Paths in the repository become paths in the site; of a file that is no page, the text remains."""
    source = next((source for source, page in PAGES.items() if page == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        if "://" in match["target"] or not (ROOT / path).exists():
            return match[0]
        if path not in PAGES and not (path.startswith("docs/") and (ROOT / path).is_file()):
            return match["text"]
        page = PAGES.get(path, path.removeprefix("docs/"))
        return match["start"] + posixpath.relpath(page, posixpath.dirname(here) or ".") + match["end"]

    return _LINK.sub(link, markdown)


def _indented_by_four(markdown: str) -> str:
    """What belongs to a list item is indented as far as the item's text; Python-Markdown wants four spaces a level."""
    columns: list[int] = []
    lines: list[str] = []
    in_fence = paragraph = False
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip())
        while line and not in_fence and columns and indent < columns[-1]:
            columns.pop()
        column = columns[-1] if columns else 0
        item = None if in_fence or indent - column >= 4 else _ITEM.match(line)
        # After a paragraph of its own a list begins, or goes on, with an empty line.
        if item and lines and lines[-1] and paragraph:
            lines.append("")
        lines.append(" " * 4 * len(columns) + line[min(indent, column) :] if line else line)
        if line.lstrip().startswith("```"):
            in_fence = not in_fence
        elif item:
            columns.append(item.end())
        paragraph = not item and (paragraph or not line or not columns)
    return "\n".join(lines)
