"""Reading a study file, names in it resolved and parameters checked: every mistake a sentence with its line."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from analysis.contract.errors import UserError
from orchestrator.study import yaml_text
from orchestrator.study.schema import Adaptation, Attack, FixerEntry, Location, OutcomeThresholds, Resources, Study
from orchestrator.study.search_space import rungs_of
from orchestrator.study.subject_files import with_subjects
from orchestrator.study.trials import combinations, type_repair


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: one sentence per mistake, each with its line.
    """
    path = Path(path)
    return parse_study(yaml_text.read_file(path, "study file"), str(path), path.parent)


def parse_study(text: str, source: str, folder: Path) -> Study:
    """Check the text of a study file.

    Args:
        text: YAML.
        source: names it in errors.
        folder: relative paths in it start here.

    Raises:
        UserError: one sentence per mistake, each with its line.
    """
    import fixers
    from fixers import registry
    from fixers.fixer import suggest

    text = with_subjects(text, source, folder)
    data, root = yaml_text.read(text, source)
    if not isinstance(data, dict) or root is None:
        raise UserError(
            f"{source}: a study file is a mapping with study, subjects and fixers or failure_types; see examples/."
        )
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        lines = [_sentence(item, root, source) for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from error
    plugins = [str((folder / item).resolve()) if item.endswith(".py") else item for item in study.plugins]
    for index, plugin in enumerate(plugins):
        try:
            registry.load(plugin)
        except fixers.FixerError as error:
            raise UserError(f"{source}, line {_line(root, ('plugins', index))}: {error}") from error
    presets = {preset for cls in fixers.all_fixers().values() for preset in cls.presets}
    if study.preset is not None and study.preset not in presets:
        known = suggest(study.preset, presets)
        raise UserError(f"{source}, line {_line(root, ('preset',))}: no approach has a preset '{study.preset}'{known}")
    entries: list[FixerEntry] = []
    for index, entry in enumerate(study.fixers):
        where = f"{source}, line {_line(root, ('fixers', index))}"
        try:
            expanded = expand(study, entry)
        except fixers.FixerError as error:
            raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
        swept = {other.name for other in entries if other.adapt}
        for one in expanded:
            # A trial of both would end in one of them, and the other would wait for it for ever.
            if one.adapt and one.name in swept:
                raise UserError(f"{where}: '{one.name}' has two sweeps; put the second into a study of its own.")
        entries += expanded
    for index, item in enumerate(study.repairs):
        try:
            type_repair(study, item.name).parameters(100)
        except fixers.FixerError as error:
            where = f"{source}, line {_line(root, ('repairs', index))}"
            raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error
    study = study.model_copy(update={"fixers": entries, "plugins": plugins})
    locations: list[Location] = [("subjects", index) for index in range(len(study.subjects))]
    locations += [("attack", "epsilon", name) for name in (study.attack.epsilon if study.attack else ())]
    study._text = text
    study._places = {location: f"{source}, line {_line(root, location)}: " for location in locations}
    return study


def expand(study: Study, entry: FixerEntry) -> list[FixerEntry]:
    """An entry with its names resolved and its parameters checked; ``all`` becomes every fixer not named itself.

    Raises:
        fixers.FixerError: an unknown fixer, preset or parameter, or a value out of range.
    """
    import fixers

    if entry.name != "all":
        return [_checked(study, entry)]
    named = {fixers.get(other.name).name for other in study.fixers if other.name != "all"}
    others = [name for name in fixers.all_fixers() if name not in named]
    return [_checked(study, entry.model_copy(update={"name": name})) for name in others]


def _checked(study: Study, entry: FixerEntry) -> FixerEntry:
    import fixers

    cls = fixers.get(entry.name)
    preset = entry.preset or (study.preset if study.preset in cls.presets else None)
    swept = entry.adapt.space if entry.adapt else {}
    settings = [*combinations(entry.params, entry.grid)]
    settings += [{**entry.params, name: value} for name, values in swept.items() for value in values]
    mistakes: dict[str, None] = {}
    for setting in settings:
        try:
            cls.build(setting, preset)
        except fixers.ParameterError as error:
            mistakes |= dict.fromkeys(str(error).splitlines())
    if mistakes:
        raise fixers.ParameterError("\n".join(mistakes))
    checked = entry.model_copy(update={"name": cls.name, "preset": preset})
    if entry.adapt and entry.adapt.search == "asha":
        rungs_of(checked)
    return checked


def _line(root: yaml.Node, location: Location) -> int:
    """Line, from 1, of the deepest node on the way to a location."""
    node = root
    line = root.start_mark.line
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == step), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


def _sentence(item: Any, root: yaml.Node, source: str) -> str:
    location: Location = item["loc"]
    where = f"{source}, line {_line(root, location)}"
    field = ".".join(str(step) for step in location)
    if item["type"] == "extra_forbidden":
        owner = _fields_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), owner, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        return f"{where}: there is no field '{field}'{hint} Valid: {', '.join(owner)}."
    if item["type"] == "missing":
        return f"{where}: the field '{field}' is missing."
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: '{field}' {message[0].lower() + message[1:]} (got {item['input']!r})."


def _fields_at(location: Location) -> list[str]:
    nested: dict[int | str, type[BaseModel]] = {
        "fixers": FixerEntry,
        "adapt": Adaptation,
        "resources": Resources,
        "outcomes": OutcomeThresholds,
        "attack": Attack,
    }
    model = next((nested[step] for step in reversed(location) if step in nested), Study)
    return sorted(model.model_fields)
