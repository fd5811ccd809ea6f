"""How much the seeds of a fixer differ."""

from analysis.findings.cells import Findings
from analysis.report import plots
from analysis.report.document import Block, Fold, Legend, Paragraph, Plot, Plots, Section, Table, TableColumn, Value
from analysis.report.sections.cells import LEVEL_LEGEND, fixer_value, identifier, percent_value


def seeds(findings: Findings) -> Section:
    """How much the seeds differ."""
    shown = [s for s in findings.detailed if any(len(cell.ok_runs) > 1 for cell in s.ok)]
    if not shown:
        return Section("seeds", "Seeds", [Paragraph(_unknown(findings))], ("runs",))
    blocks: list[Block] = [
        Paragraph(
            "One mark per seed, so that the spread of a fixer can be compared with the distance to the next one."
        ),
        Legend(LEVEL_LEGEND),
    ]
    for index, subject in enumerate(shown):
        figures = []
        for key, column, title in (("rr", "repair_rate", "RR"), ("nfr", "negative_flip_rate", "NFR")):
            cells = [cell for cell in subject.ok if cell.values(column)]
            if not cells:
                continue
            name = f"seeds-{key}-{identifier(subject.name)}"
            rows = [
                [
                    fixer_value(cell),
                    Value(str(len(cell.values(column))), sort=len(cell.values(column))),
                    percent_value(min(cell.values(column))),
                    percent_value(max(cell.values(column))),
                    percent_value(max(cell.values(column)) - min(cell.values(column))),
                ]
                for cell in cells
            ]
            figures.append(
                Plot(
                    name,
                    f"{subject.name}: {title} by seed",
                    f"{max(len(cell.values(column)) for cell in cells)} seeds at most.",
                    plots.strips(
                        [
                            plots.Strip(cell.abbreviation, cell.level, [100 * v for v in cell.values(column)])
                            for cell in cells
                        ],
                        f"{title}, %",
                    ),
                    Table(
                        f"{name}-data",
                        f"{subject.name}: {title} by seed, %",
                        [
                            TableColumn("Fixer", numeric=False),
                            TableColumn("Seeds"),
                            TableColumn("Lowest"),
                            TableColumn("Highest"),
                            TableColumn("Range"),
                        ],
                        rows,
                    ),
                )
            )
        blocks.append(Fold(subject.name, [Plots(figures, wide=True)], open=index < 1))
    return Section("seeds", "Seeds", blocks, ("cells", "runs"))


def _unknown(findings: Findings) -> str:
    """Why there is no spread to show."""
    cells = [cell for subject in findings.detailed for cell in subject.cells]
    if not cells:
        return findings.nothing_yet
    if any(len(cell.runs) > 1 for cell in cells):
        return "No fixer with figures has two seeds that are OK, so how much another run would differ is not known."
    return "One seed per fixer: how much another run would differ is not known. Add seeds to the study to learn it."
