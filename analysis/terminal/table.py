"""An answer as a table that fits the terminal it is printed on."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from analysis.warehouse.answers import NUMERIC, Rows, printable, shown

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

WHOLE: Final = 20
"""Characters up to which a text is never broken."""
_PARTS: Final = re.compile(r"[^_]*_+|[^_]+")


@dataclass(frozen=True)
class TerminalTable:
    """An answer, laid out for the width it is printed at.

    Where there is room, columns are as wide as what is in them. Where there isn't, their names break behind
    underscores, texts of more than `WHOLE` characters fold, and at last columns in the middle are left out and named
    below. A number is never broken: half of one is another number.
    """

    answer: Rows
    title: str | None = None

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        if self.title is not None:
            yield Text(self.title, style="italic")
        columns = [_Column.of(self.answer, index) for index in range(len(self.answer.columns))]
        if sum(column.natural for column in columns) + 3 * len(columns) - 1 <= options.max_width:
            yield self._table(columns, [column.natural for column in columns], roomy=True)
            return
        kept = list(columns)
        while len(kept) > 1 and sum(column.least for column in kept) + len(kept) - 1 > options.max_width:
            del kept[len(kept) // 2]
        yield self._table(kept, _widths(kept, options.max_width - len(kept) + 1), roomy=False)
        if left_out := [column.name for column in columns if column not in kept]:
            yield Text(
                f"Left out for want of width: {', '.join(left_out)}. A wider terminal, fewer columns in the SELECT, or "
                "the formats csv and json show them.",
                style="dim",
            )

    def _table(self, columns: "list[_Column]", widths: list[int], *, roomy: bool) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=roomy,
            padding=(0, 1) if roomy else 0,
        )
        for column, width in zip(columns, widths, strict=True):
            name = "\n".join(_lines(column.name, width))
            table.add_column(Text(name), justify="right" if column.is_number else "left", overflow="fold", width=width)
        for position in range(len(self.answer.rows)):
            # Text, not str: what comes from the results must not be read as markup.
            texts = (column.texts[position] for column in columns)
            table.add_row(*(Text("NULL", style="dim") if text is None else Text(text) for text in texts))
        return table


@dataclass(frozen=True, eq=False)
class _Column:
    name: str
    is_number: bool
    texts: list[str | None]
    natural: int
    """Characters that it takes unbroken."""
    least: int
    """Characters below which it is not worth showing."""

    @classmethod
    def of(cls, answer: Rows, index: int) -> "_Column":
        from rich.cells import cell_len

        name = printable(answer.columns[index])
        is_number = answer.types[index].split("(")[0] in NUMERIC
        texts = [None if row[index] is None else shown(row[index]) for row in answer.rows]
        lines = [line for text in texts for line in ("NULL" if text is None else text).split("\n")]
        widest = max(map(cell_len, lines), default=0)
        part = max(map(cell_len, _PARTS.findall(name)), default=0)
        least = max(widest if is_number else min(widest, WHOLE), min(part, WHOLE), 1)
        return cls(name, is_number, texts, max(widest, cell_len(name), 1), least)


def _widths(columns: list[_Column], room: int) -> list[int]:
    """The least of each, and what is left over shared out among those that have more to show."""
    widths = [min(column.least, room) for column in columns]
    spare = room - sum(widths)
    while spare > 0 and (wanting := [i for i, column in enumerate(columns) if widths[i] < column.natural]):
        for index in wanting[:spare]:
            widths[index] += 1
        spare -= len(wanting[:spare])
    return widths


def _lines(name: str, width: int) -> list[str]:
    """A column's name in lines of at most that many characters, broken behind underscores where that is enough."""
    from rich.cells import cell_len

    lines = [""]
    for part in _PARTS.findall(name):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append(part)
        else:
            lines[-1] += part
    return lines
