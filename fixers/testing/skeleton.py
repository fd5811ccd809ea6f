"""The beginning of a new approach: a file that keeps the contract as it is, and waits for its own core step."""

import keyword
import re
from pathlib import Path
from typing import Final

from fixers.errors import FixerError
from fixers.fixer import Level
from fixers.registry import all_fixers

EXAMPLE: Final = Path(__file__).with_name("my_approach.py")
"""What CONTRIBUTING shows."""


def write_skeleton(name: str, level: Level, folder: Path) -> Path:
    """Write ``NAME.py``, the example for authors under another name.

    Returns:
        The file.

    Raises:
        FixerError: the name can't be one or is taken, or the file exists or can't be written.
    """
    example, target = EXAMPLE.read_text(encoding="utf-8"), folder / f"{name}.py"
    class_name = name.title().replace("_", "")
    # The class mustn't hide what the example imports.
    imported = re.findall(r"\w+", " ".join(re.findall("import (.*)", example)))
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or {name, class_name} & {*keyword.kwlist, *imported}:
        raise FixerError(
            f"'{name}' can't be the name of an approach, its file and its class; take another one of small letters, "
            "digits and _, such as my_approach."
        )
    for fixer in all_fixers().values():
        if name in (fixer.name.lower(), fixer.abbreviation.lower()):
            raise FixerError(f"The name '{name}' is taken by the approach {fixer.name}; choose another one.")
    for said, own in {
        "my_approach": name, "MyApproach": class_name, "MY_APPROACH": name.upper(), '"layer"': f'"{level}"',
    }.items():  # fmt: skip
        example = example.replace(said, own)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(example)
    except FileExistsError:
        raise FixerError(f"There is a file {target} already, and it stays; choose another name or folder.") from None
    except OSError as error:
        raise FixerError(f"{target} can't be written: {error.strerror}.") from error
    return target
