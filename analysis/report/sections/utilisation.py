"""The report's section on how busy nodes and GPUs were."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from analysis.report import plots
from analysis.report.document import Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb

MOST_PLACES: Final = 40
"""Rows of the plot; the table has all."""
COLUMNS_PER_TICK: Final = 8


def utilisation(con: "duckdb.DuckDBPyConnection") -> list[Section]:
    """Busy share per node and GPU over time; nothing where rows don't say when trials ran."""
    places: dict[str, list[dict[str, Any]]] = {}
    for row in answer(con, "utilisation").to_pylist():
        places.setdefault(row["place"], []).append(row)
    if not places:
        return []
    # The idlest first: they are what one looks for.
    order = sorted(places, key=lambda place: (_mean(places[place], "busy_share"), place))
    shown = order[:MOST_PLACES]
    more = f" The {MOST_PLACES} idlest of {len(order)} are shown." if len(order) > MOST_PLACES else ""
    first = next(iter(places.values()))
    unit, per_hour = _unit(first[-1]["hour"] + first[-1]["hours"])
    ticks = [f"{per_hour * row['hour']:.3g}" if n % COLUMNS_PER_TICK == 0 else "" for n, row in enumerate(first)]
    plot = Plot(
        "busy-share",
        "Busy share over time, %",
        f"Rows are nodes, or GPUs; columns are {unit} since the first trial began.{more}",
        plots.heat_map(
            [[100 * row["busy_share"] for row in places[place]] for place in shown],
            ticks,
            shown,
            x_title=unit,
            upright=True,
            hover=[
                [
                    f"{plots.text(place)}, {per_hour * row['hour']:.3g} {unit}: {100 * row['busy_share']:.0f} %"
                    for row in places[place]
                ]
                for place in shown
            ],
        ),
        Table(
            "busy-share-data",
            "Busy share of nodes and GPUs",
            [
                TableColumn("Place", numeric=False),
                TableColumn("Busy", "% of the time"),
                TableColumn("Trials at once", "on average"),
            ],
            [_row(place, places[place]) for place in order],
        ),
    )
    lead = Paragraph(
        "A node is fully busy when all its cores are given to trials, a GPU when all of it is. Where rows don't say "
        "what a node has, it counts as fully busy when as many trials run on it as ever did at once. A node or GPU "
        "that ran no trial at all has no row, so it is missing here however long it was idle. Between trials a place "
        "loads, stores and waits; at the end it waits for the longest."
    )
    return [Section("utilisation", "Use of nodes and GPUs", [lead, Plots([plot], wide=True)], ("utilisation",))]


def _unit(hours: float) -> tuple[str, int]:
    """The unit that suits a length of time, and how many of it make an hour."""
    return ("hours", 1) if hours >= 3 else ("minutes", 60) if hours >= 0.05 else ("seconds", 3600)


def _row(place: str, rows: Sequence[Mapping[str, Any]]) -> list[Value]:
    busy, running = _mean(rows, "busy_share"), _mean(rows, "running")
    return [Value(place), Value(f"{100 * busy:.1f}", sort=busy), Value(f"{running:.2f}", sort=running)]


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    return float(sum(row[column] for row in rows) / len(rows))
