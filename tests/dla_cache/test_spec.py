"""Specs: what is no YAML, what does not fit, and how a misspelling is told."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from dla_cache.errors import SpecError
from dla_cache.spec import CacheSpec, LatentSpec, StrictModel, parse_spec, read_yaml

LATENT = {"modality": "depth", "source": "embedded-depth"}


class Circle(StrictModel):
    kind: Literal["circle"]
    radius: Annotated[float, Field(gt=0)] = 1.0


class Square(StrictModel):
    kind: Literal["square"]
    side: float
    colour: str = ""


class Drawing(StrictModel):
    shape: Annotated[Circle | Square, Field(discriminator="kind")] | None = None
    frame: Square | None = None
    shapes: tuple[Circle, ...] = ()
    by_name: dict[str, Circle] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x: [1", "is no YAML"),
        ("x: 2024-13-45", "is no YAML"),
        ("x: 0x_", "is no YAML"),
        ("x: !!int ''", "is no YAML"),
        ("x: !!bool maybe", "is no YAML"),
        ("x: !!timestamp now", "is no YAML"),
        ("x: !!python/object/apply:os.getcwd []", "is no YAML"),
        ("[" * 1_000, "nested too deeply"),
        ("x: " + "{y: " * 1_000, "nested too deeply"),
        ("x: 1\nx: 2", "`x` twice, line 2"),
        ("x:\n  y: 1\n  z: 1\n  y: 2", "`y` twice, line 4"),
        ("- {y: 1, y: 1}", "`y` twice, line 1"),
        ("\0", "is no YAML"),
        ("", "holds no mapping"),
        ("- x", "holds no mapping"),
        ("x", "holds no mapping"),
    ],
)
def test_what_is_no_mapping_in_yaml_is_refused_with_a_hint(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=fault) as refused:
        read_yaml(path, CacheSpec)
    assert "spec.yaml" in refused.value.message
    assert refused.value.hint


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(b"x: \xff")
    for path in (tmp_path / "spec.yaml", tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(SpecError, match=str(path)):
            read_yaml(path, CacheSpec)


def test_a_merged_mapping_may_say_a_key_again(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("frame: &square {kind: square, side: 1}\nshape: {<<: *square, side: 2}\n")
    drawing = read_yaml(path, Drawing)
    assert (drawing.frame, drawing.shape) == (Square(kind="square", side=1), Square(kind="square", side=2))


@pytest.mark.parametrize(
    ("value", "message", "fields"),
    [
        ({"shpae": None}, "unknown field `shpae`, did you mean `shape`?", Drawing),
        ({"frame": {"kind": "square", "sied": 1}}, "unknown field `frame.sied`, did you mean `side`?", Square),
        (
            {"shape": {"kind": "circle", "raduis": 1}},
            "unknown field `shape.circle.raduis`, did you mean `radius`?",
            Circle,
        ),
        ({"shape": {"kind": "square", "radius": 1}}, "unknown field `shape.square.radius`", Square),
        ({"shapes": [{"kind": "circle"}, {"king": 1}]}, "unknown field `shapes.1.king`, did you mean `kind`?", Circle),
        ({"by_name": {"a": {"kind": "circle", "sied": 1}}}, "unknown field `by_name.a.sied`", Circle),
        ({"frame": {1: 2}}, "unknown field `frame.1`", Square),
    ],
)
def test_a_misspelt_field_is_one_short_fault_with_the_nearest_and_all_names(
    value: dict[str, object], message: str, fields: type[StrictModel]
) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(value, Drawing, where="drawing.yaml")
    assert refused.value.message == f"`drawing.yaml` does not fit Drawing: {message}"
    names = ", ".join(f"`{name}`" for name in fields.model_fields)
    assert refused.value.hint == f"fields of {fields.__name__}: {names}"


def test_a_list_with_a_faulty_entry_is_not_called_too_short() -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec({"latents": [{**LATENT, "sede": 1}]}, CacheSpec, where="spec.yaml")
    fault = "unknown field `latents.0.sede`, did you mean `seed`?"
    assert refused.value.message == f"`spec.yaml` does not fit CacheSpec: {fault}"


def test_every_misspelt_field_is_named_and_each_model_lists_its_fields_once() -> None:
    value = {"shapes": [{"kind": "circle", "r": 1, "radios": 2}], "frame": {"kind": "square", "sides": 1}}
    with pytest.raises(SpecError) as refused:
        parse_spec(value, Drawing, where="drawing.yaml")
    for name in ("`shapes.0.r`", "`shapes.0.radios`, did you mean `radius`?", "`frame.sides`, did you mean `side`?"):
        assert f"unknown field {name}" in refused.value.message
    assert refused.value.hint is not None
    assert refused.value.hint.count("fields of Circle") == refused.value.hint.count("fields of Square") == 1


def test_a_value_out_of_bounds_is_told_by_its_place() -> None:
    with pytest.raises(SpecError, match=r"`shape\.circle\.radius`: Input should be greater than 0") as refused:
        parse_spec({"shape": {"kind": "circle", "radius": 0}}, Drawing, where="drawing.yaml")
    assert refused.value.hint


@pytest.mark.parametrize("splits", [[], [""], ["train", ""]])
def test_a_list_of_splits_names_at_least_one_and_none_is_empty(splits: list[str]) -> None:
    with pytest.raises(SpecError, match="`splits"):
        parse_spec({"latents": [LATENT], "splits": splits}, CacheSpec, where="spec.yaml")


def test_without_splits_all_are_built() -> None:
    assert parse_spec({"latents": [LATENT]}, CacheSpec, where="spec.yaml").splits is None


def test_what_two_fields_contradict_is_told_in_our_words() -> None:
    with pytest.raises(SpecError, match="`CacheSpec`: each modality may stand once"):
        parse_spec({"latents": [LATENT, LATENT]}, CacheSpec, where="spec.yaml")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(SpecError, match=f"parameter `guidance_scale` is {value}"):
        parse_spec({**LATENT, "parameters": {"guidance_scale": value}}, LatentSpec, where="spec.yaml")
