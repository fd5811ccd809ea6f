"""YAML that users write: read with the line of whatever is wrong with it."""

from typing import Any

import yaml

from orchestrator.base.errors import UserError


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


def read(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """What a text means, and its nodes, which know their lines; None for an empty one.

    Args:
        text: YAML.
        source: names it in errors.

    Raises:
        UserError: it isn't valid; one sentence with the line.
    """
    try:
        # A second time for the nodes, because merge keys (<<) are resolved by changing them.
        return yaml.load(text, Loader=_Loader), yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{source}, line {line}: this isn't valid YAML ({error.problem}).") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{source}, line {line}: this isn't valid YAML (the character {error.character:#04x} may not be in it; "
            "delete it)."
        ) from error
