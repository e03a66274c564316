"""YAML files without second thoughts."""

from pathlib import Path
from typing import Any

import yaml

from dla_cache.errors import SpecError


class StrictLoader(yaml.SafeLoader):
    """Safe YAML without second thoughts: a key stands once in a mapping, nothing holds itself, and every fault is a
    `yaml.YAMLError`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.unfinished: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; an alias of one that is not whole yet would make a value that holds itself."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.unfinished:
            problem = f"what `&{event.anchor}` names holds itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
        anchor = getattr(event, "anchor", None)
        if anchor is None:
            return super().compose_node(parent, index)
        self.unfinished.add(anchor)
        node = super().compose_node(parent, index)
        self.unfinished.discard(anchor)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written: what `<<` merges into it may be said again."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"it says `{key.value}` twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node, as a date of which Python may say that there is no month 13."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
            fault = f"`{node.value}` cannot be read as `{node.tag.rpartition(':')[2]}`"
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked.

    Raises:
        SpecError: if the file is missing, holds no mapping, or says a key twice.
    """
    try:
        value = StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise SpecError(f"`{path}` cannot be read: {error.strerror}", hint="check the path") from error
    except RecursionError as error:
        raise SpecError(f"`{path}` is nested too deeply", hint="check for brackets that are never closed") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(
            f"`{path}` is no YAML: {_yaml_fault(error)}", hint="check quotes, brackets and indentation there"
        ) from error
    if not isinstance(value, dict):
        raise SpecError(f"`{path}` holds no mapping of keys to values", hint="see manifests/README.md for the fields")
    return value


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())
