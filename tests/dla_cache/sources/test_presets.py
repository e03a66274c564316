"""A component or LoRA from elsewhere fits the checkpoint as a whole, is part of the identity, or is refused."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dla_cache.errors import MissingDependencyError, SourceError, SpecError
from dla_cache.sources import open_source
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import SIDE
from tests.dla_cache.sources.tiny_variation import LORA, UNET

Weights = dict[str, torch.Tensor]


@pytest.fixture
def open_preset(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Opens a row with parameters changed."""
    sources: list[Any] = []

    def opener(row: str, **parameters: Any) -> Any:
        spec = spec_of(row, checkpoint(row))
        spec = spec.model_copy(update={"parameters": {**spec.parameters, **parameters}})
        sources.append(open_source(spec, "cpu"))
        return sources[-1]

    yield opener
    for source in sources:
        source.close()


def latents_of(source: Any) -> Any:
    return source.encode(some_pixels(SIDE, 2), [1, 2]).latents


def changed(checkpoint: Path, to: Path, change: Callable[[Weights], Weights]) -> str:
    """A copy of weights with something changed; its place as a spec has it."""
    weights = change(load_file(checkpoint))
    save_file({name: weight.clone() for name, weight in weights.items()}, to)
    return str(to)


def test_another_lora_or_scale_is_another_latent_and_another_identity(
    open_preset: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = checkpoint("hyper-sd").parent / LORA
    whole, half, none = (open_preset("hyper-sd", lora_scale=scale) for scale in (1.0, 0.5, 0.0))
    other = open_preset("hyper-sd", lora=changed(lora, tmp_path / "other.safetensors", flipped))
    assert [source.recipe.parameters["lora_scale"] for source in (whole, half)] == [1.0, 0.5]
    assert whole.recipe.weights_sha256 == half.recipe.weights_sha256 != other.recipe.weights_sha256
    plain = open_preset("hyper-sd", lora="")
    assert "lora_scale" not in plain.recipe.parameters
    assert ["peft" in source.made_with for source in (whole, plain)] == [True, False]
    np.testing.assert_allclose(latents_of(none), latents_of(plain), rtol=0, atol=1e-5)
    seen = [latents_of(source) for source in (whole, half, none, other)]
    for place, latents in enumerate(seen):
        assert all(np.abs(latents - before).max() > 1e-3 for before in seen[:place])


def flipped(weights: Weights) -> Weights:
    return {name: weight.flip(0) for name, weight in weights.items()}


def test_a_component_is_the_same_whatever_way_it_is_named(
    open_preset: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    beside = checkpoint("sdxl-lightning").parent
    as_file = open_preset("sdxl-lightning", unet=str(beside / UNET))
    in_folder = open_preset("sdxl-lightning", unet=f"{beside}#{UNET}")
    assert as_file.recipe == in_folder.recipe
    folder = tmp_path / "unet"
    as_file.pipeline.unet.save_pretrained(folder)
    whole = open_preset("sdxl-lightning", unet=str(folder))
    np.testing.assert_array_equal(latents_of(whole), latents_of(as_file))


def test_the_unet_that_is_replaced_need_not_be_there(
    open_preset: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("sdxl-lightning"), folder)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()
    assert open_preset("sdxl-lightning", model=str(folder)).recipe == open_preset("sdxl-lightning").recipe
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(SourceError, match="no `unet` to replace"):
        open_preset("sdxl-lightning", model=str(folder))


def without_a_weight(weights: Weights) -> Weights:
    return dict(list(weights.items())[1:])


def with_another_layer(weights: Weights) -> Weights:
    layer = next(name for name in weights if "attn" in name).partition(".lora")[0]
    more = {name.replace("blocks", "blocs"): weight for name, weight in weights.items() if name.startswith(layer)}
    return {**weights, **more}


def renamed(weights: Weights) -> Weights:
    return {name.replace("attentions", "attention"): weight for name, weight in weights.items()}


def widened(weights: Weights) -> Weights:
    return {name: torch.cat([weight, weight], -1) for name, weight in weights.items()}


@pytest.mark.parametrize("change", [without_a_weight, with_another_layer, renamed, widened])
def test_a_unet_that_is_not_the_whole_of_the_checkpoints_is_refused(
    change: Callable[[Weights], Weights],
    open_preset: Callable[..., Any],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    unet = changed(checkpoint("sdxl-lightning").parent / UNET, tmp_path / UNET, change)
    with pytest.raises(SourceError, match=r"`unet\.safetensors` is no `unet` of this checkpoint"):
        open_preset("sdxl-lightning", unet=unet)


@pytest.mark.parametrize("row", ["hyper-sd", "hyper-sdxl"])
@pytest.mark.parametrize("change", [with_another_layer, renamed, widened])
def test_a_lora_of_which_a_part_fits_nothing_is_refused(
    row: str,
    change: Callable[[Weights], Weights],
    open_preset: Callable[..., Any],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lora = changed(checkpoint(row).parent / LORA, tmp_path / LORA, change)
    with pytest.raises(SourceError, match=r"`lora\.safetensors` is no LoRA of this checkpoint"):
        open_preset(row, lora=lora)
    assert not caplog.records


def test_weights_that_are_no_lora_are_refused(
    open_preset: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(SourceError, match="is no LoRA of this checkpoint"):
        open_preset("hyper-sd", lora=str(checkpoint("sdxl-lightning").parent / UNET))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("{folder}", "`#lora.safetensors`"),
        ("{folder}#other.safetensors", "no file `other.safetensors`"),
        ("{folder}#../{name}/lora.safetensors", "is no file in"),
        ("{folder}#/etc/passwd", "is no file in"),
        ("{folder}#lora.bin", "can run code when they are read"),
        ("{folder}/lora.bin", "can run code when they are read"),
        ("someone/a-lora#lora.safetensors", "not on this machine"),
    ],
)
def test_a_component_that_is_not_there_or_is_a_pickle_is_refused(
    place: str, reason: str, open_preset: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "presets"
    folder.mkdir()
    shutil.copy(checkpoint("hyper-sd").parent / LORA, folder)
    torch.save({}, folder / "lora.bin")
    with pytest.raises(SourceError) as refusal:
        open_preset("hyper-sd", lora=place.format(folder=folder, name=folder.name))
    assert reason in str(refusal.value)


def test_a_row_that_replaces_nothing_takes_no_components(open_preset: Callable[..., Any]) -> None:
    with pytest.raises(SpecError, match="lora"):
        open_preset("sd-img2img", lora="somewhere")


def test_the_settings_of_a_presets_scheduler_are_said_and_may_be_set(open_preset: Callable[..., Any]) -> None:
    usual, other = open_preset("dmd2"), open_preset("dmd2", original_inference_steps=50)
    assert usual.pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert (usual.recipe.parameters["original_inference_steps"], usual.recipe.parameters["scheduler"]) == (
        4,
        "LCMScheduler",
    )
    assert other.pipeline.scheduler.timesteps.tolist() != [999, 749, 499, 249]


def test_without_peft_a_lora_says_what_to_install(
    open_preset: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(MissingDependencyError, match=r"dla\[sources\]"):
        open_preset("hyper-sd")
