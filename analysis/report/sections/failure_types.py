"""Failure types: how good each way of dividing failures is, the matrix, what is in the types, what repairs cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from analysis.findings.failure_types import CORRUPTED_BELOW, TypeGrouping, type_groupings
from analysis.report import plots
from analysis.report.document import (
    Block,
    Example,
    Fold,
    Gallery,
    Paragraph,
    Plot,
    Plots,
    Section,
    Table,
    TableColumn,
    Value,
)
from analysis.report.sections.cells import identifier

if TYPE_CHECKING:
    import duckdb

_NONE: Final = "n/a"
_PICTURES: Final = 12
_MOST_METADATA: Final = 2
_MOST_TYPES: Final = 25
"""Types whose rows and columns a page shows; a confusion of many classes has more."""
_ORDER: Final = ("matrix", "single", "single_and_correct", "all", "ewc", "all_and_correct")
_REPAIRS: Final = {
    "matrix": "one + C, kept",
    "single": "one",
    "single_and_correct": "one + C",
    "all": "all",
    "ewc": "all, EWC",
    "all_and_correct": "all + C",
}


def failure_types(con: "duckdb.DuckDBPyConnection", pictures: bool) -> Section:
    """What was found of failure types, subject by subject; no blocks where the study has none.

    Args:
        con: from `analysis.open`.
        pictures: whether to show images of failures.
    """
    found = type_groupings(con)
    blocks: list[Block] = []
    if found:
        blocks.append(Paragraph(
            "Failures of the repair and the test split are divided into types. Of every type, and of the samples that "
            "the original gets right (C), 64 % train, 16 % select and 20 % judge; figures are of the last part. Before "
            "a repair accuracy is 0 on every type and 1 on C. Learnability is accuracy on the type that a model was "
            "tuned on, Independence by how much it exceeds accuracy on the other types; random types have 0."
        ))  # fmt: skip
    subjects = sorted({one.subject for one in found})
    for index, subject in enumerate(subjects):
        own = sorted(
            (one for one in found if one.subject == subject), key=lambda one: -(one.quality.get("independence") or -9)
        )
        inner: list[Block] = [_table_1(subject, own)]
        inner += [_table_2(one) for one in own if {row["repair"] for row in one.repairs} - {"matrix"}]
        inner += [
            Fold(f"{subject}: {one.name}", _detail(one, pictures), open=len(subjects) == 1 and n == 0)
            for n, one in enumerate(own)
        ]
        blocks.append(Fold(subject, inner, open=index < 1))
    return Section(
        "failure-types", "Failure types", blocks,
        ("learnability", "independence", "type_matrix", "type_composition", "type_repairs"),
    )  # fmt: skip


def _number(value: float | None, *spreads: tuple[str, float | None]) -> Value:
    if value is None:
        return Value(_NONE)
    small = ", ".join(f"{name} ± {spread:.2f}" for name, spread in spreads if spread is not None)
    return Value(f"{value:.2f}", small, sort=value)


def _table_1(subject: str, own: Sequence[TypeGrouping]) -> Table:
    spread = "mean; spread over types, over seeds"
    return Table(
        f"types-quality-{identifier(subject)}",
        f"{subject}: ways of dividing failures",
        [
            TableColumn("Types by", numeric=False), TableColumn("Types", "per seed"), TableColumn("Seeds"),
            TableColumn("Learnability", spread, first="descending"),
            TableColumn("Independence", spread, first="descending"),
            TableColumn("C", "accuracy kept", first="descending"), TableColumn("Found by", numeric=False, wide=True),
        ],
        [
            [
                Value(one.name),
                Value(_NONE if one.quality.get("n_types") is None else f"{one.quality['n_types']:g}"),
                Value(str(one.quality.get("n_seeds", 0))),
                _number(
                    one.quality.get("learnability"),
                    ("types", one.quality.get("spread_over_types")), ("seeds", one.quality.get("spread_over_seeds")),
                ),
                _number(
                    one.quality.get("independence"),
                    ("types", one.quality["independence_over_types"]),
                    ("seeds", one.quality["independence_over_seeds"]),
                ),
                _number(one.quality.get("accuracy_c")),
                Value(_how(one)),
            ]
            for one in own
        ],
    )  # fmt: skip


def _how(one: TypeGrouping) -> str:
    """How the types were found, and which weren't tuned on, in sentences."""
    facts, said = one.facts, []
    if reduction := facts.get("reduction"):
        said.append(f"k-means on {reduction}.")
    if facts.get("one_type"):
        said.append(facts["one_type"])
    if (accuracy := facts.get("assignment_accuracy")) is not None:
        said.append(f"A new failure gets its type by the nearest centre, right for {accuracy:.0%}.")
    return " ".join([*said, *one.unmet])


def _table_2(one: TypeGrouping) -> Table:
    columns = _tests(one)
    by = {(row["repair"], row["type_of_test"]): row for row in one.repairs}
    repairs = sorted(
        {row["repair"] for row in one.repairs}, key=lambda name: (_ORDER.index(name) if name in _ORDER else 9, name)
    )

    def cell(repair: str, test: str) -> Value:
        row = by.get((repair, test))
        value = _number(row["accuracy"], ("", row["spread_over_seeds"])) if row else Value(_NONE)
        kept = test == "C" and row is not None and row["accuracy"] >= CORRUPTED_BELOW
        return Value(value.text, "kept" if kept else value.small.strip(), value.sort)

    before = [Value("before"), *(Value("0" if test.isdigit() else "1" if test == "C" else "") for test in columns)]
    return Table(
        f"types-repairs-{identifier(one.subject)}-{identifier(one.name)}",
        f"{one.subject}: repairs of the types by {one.name}, accuracy. Tuned on one type or on all, with right "
        "samples or without; 'kept' took only weights that keep 0.9 of C. With one type each, C and All are means over "
        "the models; ± over seeds, whose types differ.",
        [TableColumn("Tuned on", numeric=False), *(TableColumn(_title(test), first="descending") for test in columns)],
        [
            before,
            *([Value(_REPAIRS.get(repair, repair)), *(cell(repair, test) for test in columns)] for repair in repairs),
        ],
        sortable=False,
    )


def _tests(one: TypeGrouping) -> list[str]:
    tested = {row["type_of_test"] for row in one.repairs}
    types = sorted((test for test in tested if test.isdigit()), key=int)[:_MOST_TYPES]
    return [*types, *(test for test in ("C", "All") if test in tested)]


def _title(test: str) -> str:
    return f"F{test}" if test.isdigit() else test


def _detail(one: TypeGrouping, pictures: bool) -> list[Block]:
    blocks: list[Block] = [_composition(one)]
    figures = [plot for plot in (_heat_map(one), _map(one)) if plot is not None]
    if figures:
        blocks.append(Plots(figures, wide=True))
    for kind in one.types[:_MOST_TYPES] if pictures else ():
        near = sorted(
            (row for row in one.failures if row["type"] == kind.number and row["picture"]),
            key=lambda row: (row["distance"] is None, row["distance"] or 0.0, row["source"], row["sample_id"]),
        )[:_PICTURES]
        if near:
            examples = [Example(f"data:image/png;base64,{row['picture']}", _caption(row)) for row in near]
            nearest = " nearest the centre" if near[0]["distance"] is not None else ""
            blocks.append(Gallery(f"F{kind.number}{nearest}: {kind.words}", examples))
    return blocks


def _caption(row: dict[str, Any] | Any) -> str:
    metadata = "; ".join(f"{name} {value}" for name, value in list(row["metadata"] or [])[:_MOST_METADATA])
    label, decided = row["class_name"] or row["label"], row["prediction_name"] or row["prediction"]
    return f"{label} taken for {decided}{f'; {metadata}' if metadata else ''} ({row['source']} no. {row['sample_id']})"


def _composition(one: TypeGrouping) -> Table:
    aspects = list(dict.fromkeys(row["aspect"] for row in one.composition))
    shown = [aspect for aspect in aspects if aspect != "label and prediction"][: 2 + _MOST_METADATA]

    def largest(number: int, aspect: str) -> Value:
        own = [row for row in one.composition if row["type"] == number and row["aspect"] == aspect][:3]
        return Value(", ".join(f"{row['value']}: {row['n']}" for row in own))

    return Table(
        f"types-composition-{identifier(one.subject)}-{identifier(one.name)}",
        f"{one.subject}: types by {one.name}, seed {one.seed}",
        [
            TableColumn("Type"), TableColumn("Failures", first="descending"),
            TableColumn("In words", numeric=False, wide=True),
            TableColumn("Own", "accuracy when tuned on it", first="descending"),
            TableColumn("Others", "mean accuracy on them"), TableColumn("C", "accuracy kept", first="descending"),
            *(TableColumn(aspect, "most frequent", numeric=False) for aspect in shown),
        ],
        [
            [
                Value(f"F{kind.number}", sort=kind.number), Value(str(kind.n), sort=kind.n),
                Value(f"{kind.words}. {kind.note}" if kind.note else kind.words),
                _number(kind.own), _number(kind.others), _number(kind.right),
                *(largest(kind.number, aspect) for aspect in shown),
            ]
            for kind in one.types[:_MOST_TYPES]
        ],
    )  # fmt: skip


def _heat_map(one: TypeGrouping) -> Plot | None:
    tuned = _similar_together(one, sorted({number for number, _ in one.matrix})[:_MOST_TYPES])
    if not tuned:
        return None
    tests = [*map(str, tuned), "C", "All"]
    counts = {test: n for (_, test), (_, n) in one.matrix.items()}
    name = f"types-matrix-{identifier(one.subject)}-{identifier(one.name)}"

    def value(number: int, test: str) -> float | None:
        found = one.matrix.get((number, test))
        return None if found is None else 100 * found[0]

    figure = plots.heat_map(
        [[value(number, test) for test in tests] for number in tuned],
        [f"{_title(test)}" for test in tests], [f"F{number}" for number in tuned], x_title="judged on", upright=True,
    )  # fmt: skip
    # From 0 to 1 whatever the values, so that two matrices compare.
    figure["data"][0]["zmax"] = 100
    return Plot(
        name,
        f"Tuned on a type, judged on all, % (seed {one.seed})",
        "Rows are the types that models were tuned on; similar types stand together. "
        + ", ".join(f"{_title(test)}: {counts.get(test, 0)}" for test in tests) + " samples judge.",
        figure,
        Table(
            f"{name}-data", f"{one.subject}: the matrix of types by {one.name}",
            [
                TableColumn("Tuned on", numeric=False), TableColumn("Judged on", numeric=False),
                TableColumn("Accuracy", first="descending"), TableColumn("Samples"),
            ],
            [
                [Value(f"F{number}", sort=number), Value(_title(test)), _number(own), Value(str(n), sort=n)]
                for number in sorted(tuned) for test in tests for own, n in [one.matrix.get((number, test), (None, 0))]
            ],
        ),
    )  # fmt: skip


def _similar_together(one: TypeGrouping, numbers: list[int]) -> list[int]:
    """Types in an order in which those that repair each other are neighbours."""
    if len(numbers) < 3:
        return numbers
    import numpy as np
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    matrix = np.array([[one.matrix.get((i, str(j)), (0.0, 0))[0] for j in numbers] for i in numbers])
    far = 1 - (matrix + matrix.T) / 2
    np.fill_diagonal(far, 0)
    order = leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True))
    return [numbers[place] for place in order]


def _map(one: TypeGrouping) -> Plot | None:
    known = [row for row in one.failures if row["x"] is not None and row["y"] is not None]
    if not known:
        return None
    colourings = {
        "type": [f"F{row['type']}" for row in known],
        "label": [str(row["class_name"] or row["label"]) for row in known],
        "prediction": [str(row["prediction_name"] or row["prediction"]) for row in known],
    }
    names = list(dict.fromkeys(name for row in known for name, _ in row["metadata"] or []))
    for metadata in names:
        values = [str(dict(row["metadata"] or []).get(metadata)) for row in known]
        if 1 < len(set(values)) <= _MOST_TYPES:
            colourings[metadata] = values
    name = f"types-map-{identifier(one.subject)}-{identifier(one.name)}"
    reduction = one.facts.get("map", "")
    return Plot(
        name,
        f"The failures on a map ({reduction or 'two dimensions'})",
        "A point is a failure; near ones look alike to the model. The menu says what colours and shapes mean.",
        plots.type_map(
            [row["x"] for row in known], [row["y"] for row in known], colourings,
            [f"F{row['type']}: {_caption(row)}" for row in known],
        ),
        Table(
            f"{name}-data", f"{one.subject}: failures by {one.name}",
            [TableColumn("Type"), TableColumn("Failures")],
            [[Value(f"F{kind.number}", sort=kind.number), Value(str(kind.n), sort=kind.n)] for kind in one.types],
        ),
    )  # fmt: skip
