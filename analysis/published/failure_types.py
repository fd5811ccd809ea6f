"""The figures of Henn et al., MICCAI 2021 (arXiv 2109.12347), as datasets of failure types.

The matrices are read off its Figure 2, whose rounding gives back Table 1 within 0.01; of the ways of dividing that it
prints no matrix of, Learnability and Independence alone can't be told as rows. Table 2 is as printed; its rows of
single types are C and All of averages over the models. The paper says nothing of seeds.
"""

from collections.abc import Iterator
from typing import Any, Final

_TISSUE: Final = """
.95 .60 .88 .98 .79 .00 .05 .90
.48 .87 .56 .34 .85 .03 .10 .95
.42 .67 .84 .50 .62 0 0 .97
.82 .33 .88 .99 .41 0 .06 .92
.66 1.0 .64 .44 .94 .01 .04 .91
0 0 0 0 .04 .93 .58 .86
.01 0 0 .06 0 .38 .90 .90"""
_GRADIENT: Final = """
.89 .06 .17 .03 .24 .25 .24 .03 .92
.07 .93 .02 .45 .00 .43 .07 .36 .90
.21 .06 .92 .00 .84 .18 .46 .20 .93
.40 .63 .02 .97 .02 .40 .27 .16 .91
.26 .01 .85 .03 .98 .13 .72 .34 .90
.26 .52 .26 .03 .03 .88 .01 .17 .89
.11 .07 .49 .00 .66 .00 .95 .37 .92
.00 .39 .36 .00 .31 .28 .30 .89 .90"""
_CATHETER_RANDOM: Final = """
.66 .65 .63 .63 .63 .65 .83
.64 .68 .64 .64 .66 .66 .85
.64 .64 .63 .63 .64 .64 .83
.65 .66 .66 .65 .66 .67 .80
.62 .62 .61 .60 .63 .62 .81
.63 .63 .62 .63 .63 .66 .80"""
_CATHETER_GRADIENT: Final = """
.84 .78 .36 .30 .36 .01 .79
.08 .88 .25 .22 .38 .01 .81
.20 .71 .74 .39 .35 .91 .73
.11 .65 .27 .93 .39 .31 .77
.15 .75 .38 .43 .63 .08 .83
.20 .49 .42 .19 .48 .98 .68"""
_MATRICES: Final = {
    ("bp_mnist", "metadata: tissue"): _TISSUE,
    ("bp_mnist", "gradients"): _GRADIENT,
    ("ice_cd", "random"): _CATHETER_RANDOM,
    ("ice_cd", "gradients"): _CATHETER_GRADIENT,
}
# Types, then C and All.
_REPAIRS: Final = {
    "bp_mnist": {
        "single": ".92 .94 .97 1.0 .99 .94 .96 .92 .81 .77",
        "single_and_correct": ".91 .93 .92 .97 .99 .89 .88 .89 .91 .86",
        "all": ".4 .79 .72 .83 .87 .71 .82 .78 .19 .24",
        "ewc": ".34 .65 .79 .79 .85 .64 .79 .76 .27 .30",
        "all_and_correct": ".25 .65 .71 .66 .80 .48 .69 .68 .9 .88",
    },
    "ice_cd": {
        "single": ".85 .99 .77 .69 .64 .96 .32 .36",
        "single_and_correct": ".81 .97 .79 .96 .67 .97 .73 .64",
        "all": ".61 .9 .71 .28 .57 .72 .64 .66",
        "ewc": ".41 .89 .59 .26 .47 .94 .51 .56",
        "all_and_correct": ".41 .8 .65 .39 .61 .82 .86 .78",
    },
}


def type_rows(study: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``type_trials`` and of ``type_matrix``."""
    trials, matrix = [], []
    for (subject, grouping, repair, kind), cells in _models():
        trial_id = f"{study}-{subject}-{grouping}-{repair}-{kind or 'all'}"
        trials.append({
            "trial_id": trial_id, "study": study, "stage": "type", "subject": subject, "dataset": subject,
            "fixer": "ewc" if repair == "ewc" else "finetune", "level": "model", "params": "{}", "seed": 0,
            "outcome": "OK" if cells["C"] >= 0.9 else "CORRUPTED", "accuracy_c_original": 1.0, "accuracy_c": cells["C"],
            # Of the matrix the paper prints no accuracy on all samples.
            "accuracy_fixed": cells.get("All", cells["C"]), "grouping": grouping, "grouping_key": study, "type": kind,
            "repair": repair, "note": "arXiv 2109.12347",
        })  # fmt: skip
        matrix += [{"trial_id": trial_id, "type_of_test": test, "accuracy": value} for test, value in cells.items()]
    return trials, matrix


def _models() -> Iterator[tuple[tuple[str, str, str, int | None], dict[str, float]]]:
    for (subject, grouping), text in _MATRICES.items():
        for number, line in enumerate(text.split("\n")[1:], start=1):
            *types, right = map(float, line.split())
            cells = {str(test): value for test, value in enumerate(types, start=1)}
            yield (subject, grouping, "matrix", number), cells | {"C": right}
    for subject, repairs in _REPAIRS.items():
        for repair, line in repairs.items():
            *types, right, everything = map(float, line.split())
            cells = {str(test): value for test, value in enumerate(types, start=1)}
            yield (subject, "gradients", repair, None), cells | {"C": right, "All": everything}
