"""What the subjects of the catalogue have in common: an architecture of ours, trained by a recipe."""

from orchestrator.subjects.architectures import NamedArchitecture
from orchestrator.subjects.subject import DataSource, OriginalRecipe, SubjectDefinition


def trained_subject(
    name: str,
    dataset: str,
    architecture: str,
    data: DataSource,
    recipe: OriginalRecipe,
    *,
    shape: tuple[int, ...],
    epsilon: float,
    n_classes: int = 10,
    sensitive: tuple[str, str, str] | None = None,
    class_names: tuple[str, ...] = (),
) -> SubjectDefinition:
    """A definition with one of our architectures.

    Args:
        name: of the subject; its module has the same, with underscores.
        dataset: what the data are, for reports.
        architecture: a name of :mod:`orchestrator.subjects.architectures`.
        data: where the samples come from.
        recipe: how the original is trained.
        shape: of an input, (C, H, W).
        epsilon: radius of the attack, in pixels of [0, 1].
        n_classes: outputs of the model.
        sensitive: the attribute and the names of groups 0 and 1.
        class_names: in the order of the labels; empty where classes have none but their numbers.
    """
    return SubjectDefinition(
        name=name,
        dataset=dataset,
        architecture=architecture,
        n_classes=n_classes,
        input_shape=shape,
        epsilon=epsilon,
        sensitive_attribute=sensitive[0] if sensitive else None,
        sensitive_groups=sensitive[1:] if sensitive else None,
        recipe=recipe,
        model=NamedArchitecture(architecture, n_classes),
        data=data,
        class_names=class_names,
    )
