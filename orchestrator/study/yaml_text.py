"""YAML that users write: read as they mean it, with the line of whatever is wrong with it.

PyYAML reads YAML 1.1, in which ``1e-3`` is a text, ``1:30`` the number 90, ``010`` eight, and ``no`` is false. Numbers
and truth values are those of YAML 1.2 here; the rest is YAML 1.1.
"""

import re
from pathlib import Path
from typing import Any, Final

import yaml

from analysis.contract.errors import UserError

MOST_VALUES: Final = 100_000
"""Of a text with its aliases written out: a few hundred characters of aliases may stand for billions."""
_CORE_SCHEMA: Final = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        before: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            # Several merge keys (<<) all count; of other equal keys PyYAML takes the last one without a word.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            first = before.setdefault((key.tag, key.value), key)
            if first is not key:
                problem = f"'{key.value}' is in line {first.start_mark.line + 1} already; keep one of them"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # What PyYAML's constructors of numbers, truth values and times let through, none with a line.
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            problem = f"'{str(node.value)[:40]}' is no {kind}; quote it if it is a text"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark) from error


_OF_PYYAML = {f"tag:yaml.org,2002:{kind}" for kind, *_ in _CORE_SCHEMA}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OF_PYYAML]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _firsts in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_firsts))


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that would be read as something else, by either version."""


for _kind, _pattern, _firsts in _CORE_SCHEMA:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_firsts))


def read_file(path: Path, what: str) -> str:
    """The text of a file that a user wrote.

    Args:
        path: the file.
        what: names its kind in errors, such as "study file".

    Raises:
        UserError: it can't be read, or isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The {what} {path} isn't UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"The {what} {path} can't be read: {error}.") from error


def read(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """What a text means, and its nodes, which know their lines; None for an empty one.

    Args:
        text: YAML.
        source: names it in errors.

    Raises:
        UserError: it isn't valid; one sentence with the line.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None and _values(root, {}) > MOST_VALUES:
            raise UserError(f"{source}: with its aliases written out this has over {MOST_VALUES:,} values; use fewer.")
        # A second time for the values, because merge keys (<<) are resolved by changing the nodes.
        return yaml.load(text, Loader=_Loader), root
    except RecursionError:
        raise UserError(f"{source}: lists or mappings lie too deep inside each other; use fewer brackets.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}, line {line}: this isn't valid YAML ({error.problem}).") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{source}, line {line}: this isn't valid YAML (the character {error.character:#04x} may not be in it; "
            "delete it)."
        ) from error


def written(content: object, *, flow: bool = False) -> str:
    """Values as YAML, which :func:`read` reads as the same; in one line if ``flow``."""
    width = float("inf") if flow else None
    text: str = yaml.dump(
        content, Dumper=_Dumper, default_flow_style=flow, width=width, sort_keys=False, allow_unicode=True
    )
    return text


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; an alias is its anchor's node again."""
    if id(node) not in known:
        # One that holds itself has no end; PyYAML builds it, and what takes it refuses it.
        known[id(node)] = 1
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]
