"""What a report is made of, whatever it is written in: sections of paragraphs, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from analysis.report.plots.style import Figure


@dataclass(frozen=True)
class TableColumn:
    """A column of a table.

    Attributes:
        title: short name.
        note: unit and direction, under the title.
        numeric: whether it is set flush right and sorts as a number.
        first: direction of the first click on the header: figures of which more is better begin with the largest.
        wide: whether it holds sentences.
    """

    title: str
    note: str = ""
    numeric: bool = True
    first: Literal["ascending", "descending"] = "ascending"
    wide: bool = False


@dataclass(frozen=True)
class Value:
    """A cell of a table.

    Attributes:
        text: what it says.
        small: a second line in small print.
        sort: what it sorts by, when that isn't its text; None sorts last.
        style: CSS classes.
        title: more, on hover; nothing that is said nowhere else.
        span: columns that it covers.
    """

    text: str
    small: str = ""
    sort: float | str | None = None
    style: str = ""
    title: str = ""
    span: int = 1


@dataclass(frozen=True)
class Table:
    """A table; the first value of a row is its header."""

    name: str
    caption: str
    columns: Sequence[TableColumn]
    rows: Sequence[Sequence[Value]]
    sortable: bool = True
    kind: str = "table"


@dataclass(frozen=True)
class Plot:
    """A figure with what it shows, in words and as a table."""

    name: str
    title: str
    description: str
    figure: Figure
    data: Table
    kind: str = "plot"


@dataclass(frozen=True)
class Plots:
    """Figures side by side."""

    plots: Sequence[Plot]
    wide: bool = False
    kind: str = "plots"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str
    fine: bool = False
    kind: str = "paragraph"


@dataclass(frozen=True)
class Legend:
    """What marker shapes and colours mean."""

    entries: Sequence[tuple[str, str, str]]
    """Shape (circle, square, diamond, line, arrow), colour, meaning."""
    kind: str = "legend"


@dataclass(frozen=True)
class Code:
    """SQL or YAML, verbatim."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Settings:
    """Names and values."""

    entries: Sequence[tuple[str, str]]
    kind: str = "settings"


@dataclass(frozen=True)
class Example:
    """One test image.

    Attributes:
        image: a data URI, empty when the results have no picture of it.
        text: which image it is and what became of it.
    """

    image: str
    text: str


@dataclass(frozen=True)
class Gallery:
    """Test images of one kind."""

    title: str
    examples: Sequence[Example]
    kind: str = "gallery"


@dataclass(frozen=True)
class Trials:
    """Where all trials are shown page by page."""

    columns: Sequence[str]
    kind: str = "trials"


@dataclass(frozen=True)
class Fold:
    """Blocks that can be folded away."""

    title: str
    blocks: Sequence["Block"]
    open: bool = True
    kind: str = "fold"


Block = Table | Plots | Paragraph | Legend | Code | Settings | Gallery | Trials | Fold


@dataclass(frozen=True)
class Section:
    """A section with its anchor.

    Attributes:
        queries: named queries that its rows come from.
    """

    anchor: str
    title: str
    blocks: Sequence[Block]
    queries: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """The first thing a reader sees about a subject."""

    subject: str
    lead: str
    details: Sequence[str]
    others: Sequence[str]
    recommends: bool


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        answers: for the first subjects.
        question: what they answer, with its limits.
        overall: the answers to all subjects in a sentence, where they are many.
        more_answers: for the other subjects, folded away.
    """

    title: str
    facts: Sequence[str]
    answers: Sequence[Answer]
    question: str
    rule: str
    warnings: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)
    overall: str | None = None
    more_answers: Sequence[Answer] = ()

    def figures(self) -> dict[str, Figure]:
        """Figures by name."""

        def walk(blocks: Sequence[Block]) -> dict[str, Figure]:
            found: dict[str, Figure] = {}
            for block in blocks:
                if isinstance(block, Plots):
                    found |= {plot.name: plot.figure for plot in block.plots}
                elif isinstance(block, Fold):
                    found |= walk(block.blocks)
            return found

        return walk([block for section in self.sections for block in section.blocks])
