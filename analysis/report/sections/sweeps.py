"""What hyper-parameters are worth: sweeps on valid, grids and ablations."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from analysis.findings import words
from analysis.findings.cells import UNFOLDED, Findings
from analysis.report import plots
from analysis.report.document import Block, Fold, Legend, Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.report.sections.cells import LEVEL_LEGEND, abbreviations, identifier, percent_value
from analysis.warehouse.queries import answer

if TYPE_CHECKING:
    import duckdb


def adaptation(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """How much hyper-parameters matter, on valid."""
    names = abbreviations(findings)
    shown = {subject.name for subject in findings.detailed}
    rows = [row for row in answer(con, "adaptation_sensitivity").to_pylist() if row["subject"] in shown]
    if not rows:
        text = "No hyper-parameters were searched in this study; every fixer ran with those of its entry."
        return Section("adaptation", "Adaptation", [Paragraph(text)], ("adaptation_sensitivity",))
    effects: dict[tuple[str, str], str] = {}
    for row in answer(con, "adaptation_parameters").to_pylist():
        # Rows come with the parameter that matters most first, its best value first.
        effects.setdefault(
            (row["subject"], row["fixer"]),
            f"{row['parameter']} ({words.points(row['effect'])}), best {words.setting(row['value'])}",
        )
    table = Table(
        "sensitivity",
        "Accuracy on valid over the sets of hyper-parameters tried",
        [
            TableColumn("Fixer", numeric=False),
            TableColumn("Subject", numeric=False),
            TableColumn("Sets", "OK / tried", first="descending"),
            TableColumn("Best", "valid ACC %", first="descending"),
            TableColumn("Median", "valid ACC %", first="descending"),
            TableColumn("Worst", "valid ACC %", first="descending"),
            TableColumn("Spread", "points"),
            TableColumn("Harmful", "% of the sets"),
            TableColumn("Matters most", "effect, best value", numeric=False, wide=True),
        ],
        [
            [
                Value(names.get(row["fixer"], row["fixer"]), title=row["fixer"]),
                Value(row["subject"]),
                Value(f"{row['n_ok']}/{row['n_configurations']}", sort=row["n_ok"]),
                percent_value(row["best"]),
                percent_value(row["median"]),
                percent_value(row["worst"]),
                percent_value(row["spread"]),
                percent_value(row["share_harmful"]),
                Value(words.shortened(effects.get((row["subject"], row["fixer"]), ""), 90)),
            ]
            for row in rows
        ],
    )
    lead = Paragraph(
        "Hyper-parameters are chosen on valid, by accuracy unless the study says otherwise, and only the chosen set "
        "enters any comparison: the best test figure of a sweep would be a leak. A large spread means that the fixer "
        f"needs its sweep; harmful sets fall below the original.{_left_out(rows)}"
    )
    blocks: list[Block] = [lead, *_sensitivity(con, shown), _folded(table, shown)]
    queries = ("adaptation_sensitivity", "adaptation_parameters", "adaptation_configurations")
    return Section("adaptation", "Adaptation", blocks, queries)


def _left_out(rows: Collection[Mapping[str, Any]]) -> str:
    """A sentence on trials that stand for no set of hyper-parameters; empty where there are none."""
    n = sum(row["n_short_rungs"] for row in rows)
    if not n:
        return ""
    trials = "1 short rung" if n == 1 else f"{n} short rungs"
    return (
        f" {trials} of successive halving, run with a part of the effort, {'is' if n == 1 else 'are'} left out: what a "
        "set loses by being cut short says nothing of its hyper-parameters."
    )


def _sensitivity(con: "duckdb.DuckDBPyConnection", shown: Collection[str]) -> list[Block]:
    """One mark per set of hyper-parameters, the fixers that depend on them most on top."""
    gains: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in answer(con, "adaptation_configurations").to_pylist():
        if row["gain"] is not None and row["subject"] in shown:
            gains.setdefault(row["subject"], {}).setdefault(row["fixer"], []).append(row)
    blocks: list[Block] = []
    for subject, fixers in gains.items():
        strips, data = [], []
        # Rows come with the best set first.
        for name, rows in sorted(fixers.items(), key=lambda item: (item[1][-1]["gain"] - item[1][0]["gain"], item[0])):
            values = [100 * row["gain"] for row in rows]
            chosen = next((100 * row["gain"] for row in rows if row["is_chosen"]), None)
            label = rows[0]["abbreviation"] or name
            hover = [f"{plots.text(label)}: {v:.2f}" for v in values]
            strips.append(plots.Strip(label, rows[0]["level"] or "", values, chosen, hover))
            data.append(
                [
                    Value(label, title=name),
                    Value(str(len(values)), sort=len(values)),
                    *(Value(words.number(v), sort=v) for v in (values[-1], values[0], values[0] - values[-1])),
                    Value("" if chosen is None else words.number(chosen), sort=chosen),
                ]
            )
        slug = f"sensitivity-{identifier(subject)}"
        columns = [
            TableColumn("Fixer", numeric=False),
            TableColumn("Sets", "OK"),
            TableColumn("Lowest"),
            TableColumn("Highest"),
            TableColumn("Range", first="descending"),
            TableColumn("Chosen"),
        ]
        title = f"{subject}: gain in accuracy on valid by set of hyper-parameters"
        plot = Plot(
            slug,
            title,
            "Filled: the set that the final trials run with. Left of 0: sets that harm.",
            plots.strips(strips, "Gain in accuracy on valid, points"),
            Table(f"{slug}-data", f"{title}, points", columns, data),
        )
        blocks.append(Fold(subject, [Plots([plot], wide=True)], open=not blocks))
    return [Legend(LEVEL_LEGEND), *blocks] if blocks else []


def settings(findings: Findings, con: "duckdb.DuckDBPyConnection") -> Section:
    """What single settings are worth: grids and ablations."""
    shown = {subject.name for subject in findings.detailed}
    rows = [row for row in answer(con, "setting_effects").to_pylist() if row["subject"] in shown]
    if not rows:
        return Section("settings", "Settings", [], ())
    names = abbreviations(findings)
    table = Table(
        "setting-effects",
        "A setting in place of the one that does best on valid, same seed, all else equal",
        [
            TableColumn("Fixer", numeric=False),
            TableColumn("Subject", numeric=False),
            TableColumn("Setting", numeric=False),
            TableColumn("Instead of", numeric=False),
            TableColumn("RR", "points, range over pairs", first="ascending"),
            TableColumn("NFR", "points"),
            TableColumn("ACC", "points"),
            TableColumn("Seeds"),
            TableColumn("Pairs"),
            TableColumn("In words", numeric=False, wide=True),
        ],
        [
            [
                Value(names.get(row["fixer"], row["fixer"]), title=row["fixer"]),
                Value(row["subject"]),
                Value(f"{row['parameter']} = {words.setting(row['value'])}"),
                Value(words.setting(row["instead_of"])),
                Value(
                    words.number(100 * row["repair_rate"]),
                    small=" to ".join(words.number(100 * row[f"repair_rate_{end}"]) for end in ("low", "high")),
                    sort=row["repair_rate"],
                ),
                Value(words.number(100 * row["negative_flip_rate"]), sort=row["negative_flip_rate"]),
                Value(words.number(100 * row["accuracy"]), sort=row["accuracy"]),
                Value(str(row["n_seeds"]), sort=row["n_seeds"]),
                Value(str(row["n_pairs"]), sort=row["n_pairs"]),
                Value(_worth(row)),
            ]
            for row in rows
        ],
    )
    lead = Paragraph(
        "Where a study has several values of a hyper-parameter, trials that differ in it alone are compared pair by "
        "pair; in a grid a seed has one pair for each choice of the others. In an ablation the setting switches the "
        "approach's core step off: what it loses, the step is worth."
    )
    return Section("settings", "Settings", [lead, _folded(table, shown)], ("setting_effects",))


def _folded(table: Table, subjects: Collection[str]) -> Block:
    """A table of many subjects folded away."""
    return table if len(subjects) <= UNFOLDED else Fold(table.caption, [table], open=False)


def _worth(row: Mapping[str, Any]) -> str:
    low, high = row["repair_rate_low"], row["repair_rate_high"]
    if row["n_seeds"] < 2:
        return "one seed says nothing of chance"
    if low == high == 0:
        return "no difference with any seed"
    if low <= 0 <= high:
        who = "seeds" if row["n_pairs"] == row["n_seeds"] else "pairs"
        return f"no difference shown: the {who} disagree on its sign"
    return "repairs less with every seed" if high < 0 else "repairs more with every seed"
