import dataclasses

import pytest

from orchestrator.planning.failure_types import Grouped, type_cells
from orchestrator.study.schema import Study
from orchestrator.subjects.catalogue import resolve
from orchestrator.subjects.loaded import LoadedSubject


@pytest.fixture(scope="module")
def subjects():
    definition = resolve("digits")
    return {"digits": LoadedSubject(definition, "fingerprint", {}, definition.facts(), {"test": 0.9})}


def planned(study, subjects, training=(40, 30, 0), **changes):
    grouped = [
        dataclasses.replace(Grouped("digits", grouping, seed, f"{grouping.label} {seed}", training), **changes)
        for grouping in study.failure_types
        for seed in study.seeds
    ]
    cells = type_cells(study, grouped, subjects)
    return [(spec, cell.unmet) for cell in cells for spec in cell.final]


def study(*repairs, types=("features",)):
    return Study(study="t", subjects=["digits"], failure_types=list(types), repairs=list(repairs), seeds=[0, 1])


def test_every_type_is_tuned_on_and_all_of_them_at_once_and_small_ones_are_a_sentence(subjects):
    trials = planned(study("single", "all", "arachne"), subjects)
    runs = sorted((spec.repair, spec.type, spec.seed) for spec, unmet in trials if unmet is None and spec.type)
    assert runs == [(way, kind, seed) for way in ("matrix", "single") for kind in (1, 2) for seed in (0, 1)]
    at_once = [(spec.fixer, spec.repair) for spec, unmet in trials if unmet is None and spec.type is None]
    assert sorted(at_once) == [("arachne", "arachne")] * 2 + [("finetune", "all")] * 2
    said = {unmet.reason for spec, unmet in trials if unmet is not None}
    assert said == {"1 of the 3 types of features have fewer than 5 failures, too few to train, select and judge on."}
    assert len({spec.trial_id for spec, _ in trials}) == len(trials)


def test_repairs_run_on_the_types_of_the_first_grouping_unless_another_is_named(subjects):
    first = study("all", types=("features", "random"))
    named = study("all", types=({"grouping": "features", "repair": False}, {"grouping": "random", "repair": True}))
    for which, label in ((first, "features"), (named, "random")):
        assert {spec.grouping for spec, _ in planned(which, subjects) if spec.repair == "all"} == {label}
        assert {spec.grouping for spec, _ in planned(which, subjects) if spec.repair == "matrix"} == {
            "features",
            "random",
        }


def test_a_grouping_without_types_is_one_row_with_the_reason(subjects):
    trials = planned(study(), subjects, training=(), problem="There are no failures.")
    assert [(unmet.code, unmet.reason) for _, unmet in trials] == [("no_types", "There are no failures.")] * 2


def test_a_trial_is_another_one_where_grouping_seed_type_or_repair_is(subjects):
    ids = [spec.trial_id for spec, _ in planned(study("single", types=("features", "random")), subjects)]
    assert len(ids) == len(set(ids))
    assert ids == [spec.trial_id for spec, _ in planned(study("single", types=("features", "random")), subjects)]
