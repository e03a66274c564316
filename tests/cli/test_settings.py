"""`--set path=value`: the value lands where the path says, or the fault is named."""

import pytest

from cli.settings import apply_overrides
from dla_cache.errors import SpecError

MAPPING = {"shard_size": 5, "latents": [{"seed": 0}], "student": {"width": 64}}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("shard_size=7", ["shard_size"], 7),
        ("latents.0.seed=3", ["latents", 0, "seed"], 3),
        ("student.width=1.5", ["student", "width"], 1.5),
        ("student.name=a=b", ["student", "name"], "a=b"),
        ("splits=[train, test]", ["splits"], ["train", "test"]),
        ("splits=null", ["splits"], None),
        ("loop.steps=10", ["loop", "steps"], 10),
        ("pair=[&x [1], *x]", ["pair"], [[1], [1]]),
    ],
)
def test_the_value_lands_where_the_path_says(override: str, path: list, value: object) -> None:
    place = apply_overrides(MAPPING, [override])
    for step in path:
        place = place[step]
    assert place == value
    assert MAPPING == {"shard_size": 5, "latents": [{"seed": 0}], "student": {"width": 64}}


def test_of_two_values_for_a_field_the_last_one_counts() -> None:
    assert apply_overrides({}, ["a=1", "a=2"]) == {"a": 2}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("shard_size", "is not `path=value`"),
        ("=3", "is not `path=value`"),
        ("a..b=3", "is not `path=value`"),
        ("a=[1", "is no YAML"),
        ("a=2024-13-45", "is no YAML: `2024-13-45` cannot be read as `timestamp`"),
        ("a={b: 1, b: 2}", "it says `b` twice"),
        ("a=&x [*x]", "what `&x` names holds itself"),
        ("a=0x_", "is no YAML"),
        ("a=!!int ''", "is no YAML"),
        ("a=!!bool no-such-word", "is no YAML"),
        ("a=!!timestamp noon", "is no YAML"),
        (f"a={'[' * 1000}", "is no YAML"),
        ("shard_size.deep=3", "`deep` stands under a plain value"),
        ("shard_size.deep.deeper=3", "`deep` stands under a plain value"),
        ("latents.1.seed=3", "no position `1`"),
        ("latents.first.seed=3", "no position `first`"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(override: str, fault: str) -> None:
    with pytest.raises(SpecError, match=fault):
        apply_overrides(MAPPING, [override])
