"""The contracts of approaches and of subjects: for all there are, or for yours.

``pytest tests/conformance --fixer my_fixer.py`` tests the approaches of one file or module only, and
``pytest tests/conformance --subject my_subject.yaml`` a subject of your own.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import fixers
from fixers.testing import approaches, repeatable
from orchestrator.cli.options import subject_from
from orchestrator.subjects.catalogue import catalogue
from orchestrator.subjects.testing import NoDataError

HERE = Path(__file__).parent
EMBEDDED = ("digits", "digits-s")
LIMIT = 400
"""Samples of a subject of the catalogue, over all four splits."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fixer", action="append", default=[], help="File or module of an approach: test only this one.")
    parser.addoption("--subject", action="append", default=[], help="YAML file of a subject: test only this one.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        given = [subject_from(source) for source in metafunc.config.getoption("subject", default=[])]
        small = [dataclasses.replace(definition, limit=LIMIT) for definition in catalogue().values()]
        # Reading a whole dataset for a few samples of it takes seconds, in each process, and so do large networks.
        slow = [] if given else [pytest.mark.slow]
        metafunc.parametrize(
            "subject",
            [pytest.param(item, id=item.name, marks=[] if item.name in EMBEDDED else slow) for item in given or small],
            scope="session",
        )
    if "fixer" in metafunc.fixturenames:
        given = [cls for source in metafunc.config.getoption("fixer", default=[]) for cls in approaches(source)]
        chosen = given or list(fixers.all_fixers().values())
        metafunc.parametrize("fixer", chosen, ids=[cls.name for cls in chosen], scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Who gives an approach asks nothing about subjects, and the other way round."""
    given = [kind for kind in ("fixer", "subject") if config.getoption(kind, default=[])]
    if len(given) != 1:
        return
    [other] = {"fixer", "subject"} - {*given}
    left_out = [item for item in items if item.path.parent == HERE and other in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Data that aren't on this machine are skipped, visibly."""
    try:
        return (yield)
    except NoDataError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session", autouse=True)
def same_bits() -> Iterator[None]:
    with repeatable():
        yield
