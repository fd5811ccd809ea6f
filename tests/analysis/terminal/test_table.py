"""Answers fit the terminal they are printed on: no line is cut, no number is broken, what is left out is named."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from analysis.terminal.table import TerminalTable
from analysis.warehouse.answers import Rows


def printed(answer, width, title=None):
    stream = io.StringIO()
    Console(file=stream, width=width).print(TerminalTable(answer, title))
    return stream.getvalue().splitlines()


def left_out(lines):
    said = " ".join(" ".join(lines).split())
    return set(
        said.rpartition("Left out for want of width: ")[2].partition(". A wider")[0].split(", ")
        if "Left out" in said
        else ()
    )


EFFECTIVENESS = Rows(
    ("fixer", "outcome", "n_seeds", "n_wrong", "accuracy_fixed", "negative_flip_rate", "reason"),
    ("VARCHAR", "VARCHAR", "BIGINT", "BIGINT", "DOUBLE", "DOUBLE", "VARCHAR"),
    [
        ("editable_training", "OK", 2, 87, 0.855714, 0.00142857, None),
        ("reassure", "UNADAPTABLE", 2, 87, None, None, "It needs 3 consecutive fully connected layers and has 1."),
    ],
)


def test_with_room_a_row_is_a_line_and_a_name_is_whole():
    lines = printed(EFFECTIVENESS, 10_000)
    [head] = [line for line in lines if "fixer" in line]
    assert head.split() == list(EFFECTIVENESS.columns)
    [row] = [line for line in lines if "reassure" in line]
    assert row.rstrip().endswith(EFFECTIVENESS.rows[1][-1])


def test_names_break_behind_underscores_and_long_texts_fold():
    lines = printed(EFFECTIVENESS, 90)
    assert max(map(len, lines)) <= 90
    assert any("negative_" in line and "negative_flip" not in line for line in lines)
    assert "Left out" not in "\n".join(lines)
    start = next(line for line in lines if "reason" in line).index("reason")
    assert " ".join(" ".join(line[start:].strip() for line in lines).split()).endswith(EFFECTIVENESS.rows[1][-1])


def test_columns_of_the_middle_go_first_and_are_named():
    lines = printed(EFFECTIVENESS, 50)
    hidden = left_out(lines)
    assert hidden and hidden < set(EFFECTIVENESS.columns[1:-1])
    assert any("reassure" in line for line in lines) and any("connected" in line for line in lines)


def test_titles_and_answers_of_nothing():
    assert printed(Rows(("a",), ("BIGINT",), []), 80, "By node")[0].strip() == "By node"
    assert printed(Rows((), (), []), 80) is not None


@pytest.mark.parametrize("width", [1, 5, 12])
def test_no_width_is_too_small(width):
    assert max(map(cell_len, printed(EFFECTIVENESS, width))) <= max(width, 1)


NAMES = st.from_regex(r"[a-z]{1,9}(_[a-z]{1,9}){0,3}", fullmatch=True)
CELLS = {
    "DOUBLE": st.none() | st.floats(),
    "BIGINT": st.none() | st.integers(-(2**63), 2**63 - 1),
    "VARCHAR": st.none() | st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60),
}


@st.composite
def answers(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=12, unique=True))
    types = tuple(draw(st.sampled_from(sorted(CELLS))) for _ in names)
    rows = draw(st.lists(st.tuples(*(CELLS[kind] for kind in types)), max_size=4))
    return Rows(tuple(names), types, rows)


@given(answers(), st.integers(40, 200))
def test_no_line_is_too_long_and_no_number_is_broken(answer, width):
    lines = printed(answer, width)
    assert max(map(cell_len, lines), default=0) <= width
    hidden = left_out(lines)
    assert hidden <= set(answer.columns)
    words = " ".join(lines).split()
    for row in answer.rows:
        for name, kind, value in zip(answer.columns, answer.types, row, strict=True):
            if name not in hidden and kind != "VARCHAR" and value is not None:
                assert (f"{value:.6g}" if kind == "DOUBLE" else str(value)) in words
