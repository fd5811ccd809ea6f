"""The subjects that a study names."""

import dataclasses
from pathlib import Path

from analysis.contract.errors import UserError
from orchestrator.study.schema import Study, subject_name
from orchestrator.subjects.subject import SubjectDefinition


def definitions(study: Study, base_dir: Path) -> dict[str, SubjectDefinition]:
    """The subjects of a study, by name, with the attack radius the study gives them.

    Args:
        study: expanded.
        base_dir: folder of the study file; relative paths of a subject start there.

    Raises:
        UserError: a subject that can't be understood, or a radius for one that isn't in the study.
    """
    from fixers.fixer import suggest
    from orchestrator.subjects.catalogue import resolve

    found = {}
    for index, spec in enumerate(study.subjects):
        try:
            found[subject_name(spec)] = resolve(spec, base_dir=base_dir)
        except UserError as error:
            raise UserError(f"{study.line_of('subjects', index)}{error}") from error
    for name, epsilon in (study.attack.epsilon if study.attack else {}).items():
        if name not in found:
            where = study.line_of("attack", "epsilon", name)
            known = suggest(name, found)
            raise UserError(f"{where}attack.epsilon names '{name}', which isn't a subject of the study{known}")
        found[name] = dataclasses.replace(found[name], epsilon=epsilon)
    return found
