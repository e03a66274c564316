"""`docs/guides/objectives.md` names every objective of the registry, with its weight and with what it must be given."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import get_args

import pytest

from trainer.features import LOGITS
from trainer.objectives import ModelOutline, Need, ObjectiveConfig, TermConfig

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "objectives.md"
TEACHER = ModelOutline({"0": 8, "1": 8}, ("cls", "image", "depth"), n_classes=2)
REQUIRED: Mapping[str, Mapping[str, object]] = {"latents": {"modalities": ["depth"]}}
"""Settings without a default, which the guide says."""


def registry() -> dict[str, TermConfig]:
    """Every objective by its name, with its defaults."""
    terms: dict[str, TermConfig] = {}
    for name, field in ObjectiveConfig.model_fields.items():
        (config,) = [one for one in get_args(field.annotation) if one is not NoneType]
        terms[name] = config.model_validate(REQUIRED.get(name, {}))
    return terms


def rows() -> dict[str, list[str]]:
    """The cells of the table of all objectives, by the name in the first one."""
    (table,) = re.findall(r"^\| name \| weight \|.*\n\|[-|]+\n((?:\|.*\n)+)", GUIDE.read_text("utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return {first.strip("`"): others for first, *others in cells}


def needs_of(term: TermConfig) -> list[str]:
    """What the guide must say that an objective is given, in its words."""
    asked = term.targets(TEACHER) if Need.REFERENCE in term.needs else ()
    words = {
        "labels": Need.LABELS in term.needs,
        "logits": LOGITS in asked,
        "blocks": any(target != LOGITS for target in asked),
        "latents": Need.LATENTS in term.needs,
        "teachers": Need.TEACHERS in term.needs,
    }
    return [word for word, is_needed in words.items() if is_needed]


def test_every_objective_of_the_registry_stands_in_the_guide_and_no_other() -> None:
    assert sorted(rows()) == sorted(registry())


@pytest.mark.parametrize("name", registry())
def test_the_guide_says_the_default_weight_of_an_objective(name: str) -> None:
    assert rows()[name][0] == f"{registry()[name].weight:g}"


@pytest.mark.parametrize("name", registry())
def test_the_guide_says_what_an_objective_needs(name: str) -> None:
    assert rows()[name][3].split(", ") == needs_of(registry()[name])
