"""docs/studies.md against the models of the study file: every key, its values and its default."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from orchestrator.study.schema import Adaptation, Attack, FixerEntry, OutcomeThresholds, Resources, Study

PAGE = (Path(__file__).parents[3] / "docs" / "studies.md").read_text()
STUDY = {"study": "a", "subjects": ["digits"], "fixers": ["care"]}
NEEDED: dict[Any, dict[str, Any]] = {Study: STUDY, FixerEntry: {"name": "care"}}
SECTIONS = {
    "The study": Study,
    "Fixers": FixerEntry,
    "Sweeps": Adaptation,
    "Attack": Attack,
    "Outcomes": OutcomeThresholds,
    "Resources": Resources,
}
CODE = re.compile(r"`([^`]+)`")


def rows(section):
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {CODE.fullmatch(key)[1]: (default, meaning) for key, default, meaning in cells}


@pytest.mark.parametrize(("section", "model"), SECTIONS.items(), ids=list(SECTIONS))
def test_every_key_is_there_with_its_default_and_its_values(section, model):
    found = rows(section)
    assert found.keys() == model.model_fields.keys()
    for name, field in model.model_fields.items():
        default, meaning = found[name]
        assert (default == "required") == field.is_required(), name
        if written := CODE.fullmatch(default):
            # Some keys of a sweep belong to one search only.
            search = re.match(r"of `(\w+)`", meaning) if model is Adaptation else None
            needed = {"search": search[1]} if search else NEEDED.get(model, {})
            built = model.model_validate({**needed, name: yaml.safe_load(written[1])})
            assert getattr(built, name) == field.default, name
        for value in get_args(field.annotation):
            if isinstance(value, str):
                assert f"`{value}`" in meaning, f"{name}: {value}"


def test_every_link_within_the_docs_leads_somewhere():
    docs = Path(__file__).parents[3] / "docs"
    for page in [*docs.glob("*.md"), *docs.parent.glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            other = page if not path else (page.parent / path).resolve()
            assert other.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", other.read_text(), re.M)
                known = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
                assert anchor in known, f"{page.name}: {target}"
