"""The example specs fit, and `manifests/README.md` names every field."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dla_cache.spec import CacheSpec, LatentSpec, Modality, read_yaml

MANIFESTS = Path(__file__).parents[1] / "manifests"


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*-cache.yaml")), ids=lambda path: path.name)
def test_every_example_cache_spec_is_accepted(path: Path) -> None:
    assert read_yaml(path, CacheSpec).latents


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| \[([\w.-]+)\]", (MANIFESTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in MANIFESTS.glob("*.yaml"))


@pytest.mark.parametrize("model", [CacheSpec, LatentSpec])
def test_every_field_of_a_spec_is_explained(model: type[BaseModel]) -> None:
    text = (MANIFESTS / "README.md").read_text(encoding="utf-8")
    assert [name for name in model.model_fields if f"| `{name}` |" not in text] == []


def test_every_modality_is_named() -> None:
    text = (MANIFESTS / "README.md").read_text(encoding="utf-8")
    assert [modality.value for modality in Modality if f"`{modality.value}`" not in text] == []
