"""`--set path=value`: one field of a spec or run file, named by its dotted path."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dla_cache.errors import SpecError


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with each `path=value` put in; the value is read as YAML.

    A step of the path is a key, or in a list a position: `latents.0.seed=3`. Mappings on the way
    are made if absent, so that a field of a default section can be set; the model checks the rest.

    Raises:
        SpecError: if an override has no `=`, its value is no YAML, or its path leads through a value.
    """
    from dla_cache.strict_yaml import StrictLoader

    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise SpecError(f"`--set {override}` is not `path=value`", hint="for example --set shard_size=256")
        try:
            value = StrictLoader(text).get_single_data()
        except (yaml.YAMLError, RecursionError) as error:
            raise SpecError(f"the value of `--set {override}` is no YAML: {error}", hint="quote it") from error
        *parents, last = path.split(".")
        place: Any = result
        for step in parents:
            place = _step_into(place, step, override)
        _put(place, last, value, override)
    return result


def _step_into(place: Any, step: str, override: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(step, {})
    return _checked_list(place, step, override)[int(step)]


def _put(place: Any, step: str, value: Any, override: str) -> None:
    if isinstance(place, dict):
        place[step] = value
    else:
        _checked_list(place, step, override)[int(step)] = value


def _checked_list(place: Any, step: str, override: str) -> list[Any]:
    if not isinstance(place, list):
        raise SpecError(f"`--set {override}`: `{step}` stands under a plain value", hint="check the path")
    if not step.isdecimal() or int(step) >= len(place):
        raise SpecError(
            f"`--set {override}`: the list has no position `{step}`", hint=f"positions are 0 to {len(place) - 1}"
        )
    return place
