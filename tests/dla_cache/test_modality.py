"""The vocabulary of modalities: kinds, and labels where a store holds several of one."""

import copy

import pytest
from pydantic import BaseModel, ValidationError

from dla_cache.modality import KINDS, Modality, is_modality


class Holder(BaseModel):
    modality: Modality


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_modality_and_has_a_constant(kind: str) -> None:
    assert getattr(Modality, kind.upper()) == Modality(kind) == kind
    assert Modality(kind).kind == Modality(kind).value == kind


def test_a_label_tells_two_of_a_kind_apart() -> None:
    first, second = Modality("features-dinov2"), Modality("features-vae-sd")
    assert first != second
    assert first.kind == second.kind == "features"
    assert type(first.value) is str


@pytest.mark.parametrize(
    "name",
    ["", "sound", "depth-", "depth--a", "depth-A", "depth/a", "depth.a", "images", "depth-" + "a" * 48, "depth\n"],
)
def test_what_could_be_another_path_or_is_of_no_kind_is_refused(name: str) -> None:
    assert not is_modality(name)
    with pytest.raises(ValueError, match="is no modality"):
        Modality(name)
    with pytest.raises(ValidationError, match="is no modality"):
        Holder(modality=name)


def test_it_goes_through_json_and_a_copy_as_it_is() -> None:
    held = Holder(modality="features-dinov2")
    assert isinstance(held.modality, Modality)
    assert Holder.model_validate_json(held.model_dump_json()) == held
    assert copy.deepcopy(held.modality) == held.modality
