"""The order and the names of classes, where the data or the subject file name them."""

from collections.abc import Mapping

import numpy as np

from analysis.contract.errors import UserError
from orchestrator.subjects.reading.files import listed
from orchestrator.subjects.reading.labels import Labels


def agreed(parts: Mapping[str, Labels], given: tuple[str, ...], where: str) -> dict[str, Labels]:
    """Every part's labels by one order of the classes, with the names of all.

    Where samples come with names alone (class folders, labels that are texts), the names that are given say the order;
    the others stay as they are numbered, and given names are names only.

    Args:
        parts: labels of each part of the data.
        given: names of all classes in the order of the model's outputs; the data's own when empty.
        where: names the data in errors.

    Raises:
        UserError: a class isn't among the names that are given, the parts have other classes, or names contradict the
            numbers that the data give them.
    """
    own = {name: labels.names for name, labels in parts.items()}
    if all(labels.numbered for labels in parts.values()):
        named = {names for names in own.values() if names}
        for names in named if given else ():
            if sorted(names) == sorted(given) and names != given:
                raise UserError(
                    f"'classes' has another order than the labels of {where}, which are numbered as "
                    f"[{listed(names)}]; drop 'classes'."
                )
        if len(named) > 1:
            raise UserError(f"The parts of {where} name their classes differently; give all parts the same.")
        names = given or next(iter(named), ())
        return {part: Labels(labels.values, names) for part, labels in parts.items()}
    if any(labels.numbered for labels in parts.values()):
        raise UserError(f"Some parts of {where} have numbers as labels and others names; give all parts one kind.")
    if given:
        unknown = sorted({name for names in own.values() for name in names} - set(given))
        if unknown:
            raise UserError(
                f"'classes' has no {listed(unknown)}, which {where} has; it must have every class of the data, in the "
                "order of the model's outputs."
            )
        names = given
    else:
        names = next(iter(own.values()))
        if any(others != names for others in own.values()):
            lacking = {
                name: sorted({one for all_ in own.values() for one in all_} - set(has)) for name, has in own.items()
            }
            part, missing = next((part, missing) for part, missing in lacking.items() if missing)
            raise UserError(
                f"The classes of the parts of {where} differ ('{part}' has no {listed(missing)}); name all of them in "
                "'classes', in the order of the model's outputs."
            )
    number = {name: i for i, name in enumerate(names)}
    return {
        part: Labels(np.array([number[name] for name in labels.names], dtype=np.int64)[labels.values], names)
        for part, labels in parts.items()
    }
