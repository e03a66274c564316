"""The example specs fit, and `manifests/README.md` names every field."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from dla_cache.modality import KINDS
from dla_cache.sources.fit import FitSpec
from dla_cache.spec import CacheSpec, LatentSpec, load_yaml, read_yaml
from trainer.config import RunConfig, resolve_run
from trainer.study_entries import Axis, StoreEntry
from trainer.study_spec import StudyArm, StudySpec, Tuning

MANIFESTS = Path(__file__).parents[1] / "manifests"


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*-cache.yaml")), ids=lambda path: path.name)
def test_every_example_cache_spec_is_accepted(path: Path) -> None:
    assert read_yaml(path, CacheSpec).latents


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*-run.yaml")), ids=lambda path: path.name)
def test_every_example_run_is_accepted(path: Path) -> None:
    assert resolve_run(load_yaml(path), base=MANIFESTS, where=path.name).kind


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*-fit.yaml")), ids=lambda path: path.name)
def test_every_example_fit_spec_is_accepted(path: Path) -> None:
    assert read_yaml(path, FitSpec).flow.steps


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| \[([\w.-]+)\]", (MANIFESTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in MANIFESTS.glob("*.yaml"))


@pytest.mark.parametrize(
    "model", [CacheSpec, LatentSpec, RunConfig, StudySpec, StudyArm, StoreEntry, Axis, Tuning, FitSpec]
)
def test_every_field_of_a_spec_is_explained(model: type[BaseModel]) -> None:
    text = (MANIFESTS / "README.md").read_text(encoding="utf-8")
    assert [name for name in model.model_fields if not re.search(rf"^\|.*`{name}`.*\|", text, re.MULTILINE)] == []


def test_every_modality_is_named() -> None:
    text = (MANIFESTS / "README.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []
