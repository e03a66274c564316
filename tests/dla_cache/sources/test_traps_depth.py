"""What would spoil a cache of Marigold's latents without a word, and that it does not."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from dla_cache.build import build_cache
from dla_cache.errors import SourceError, SpecError
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.sources import SOURCES, open_source
from dla_cache.spec import CacheSpec
from dla_cache.store import open_store
from tests.dla_cache.conftest import sha256_of
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import SIDE, generators, pictures

LCM = "marigold-depth-lcm"
SEEDS = (11, 12, 13)


def test_later_images_of_a_call_get_their_own_noise_which_the_librarys_default_would_not_give_them(
    checkpoint: Callable[[str], Path],
) -> None:
    pixels = some_pixels(SIDE)
    pipeline = diffusers.MarigoldDepthPipeline.from_pretrained(checkpoint(LCM), local_files_only=True)
    call = {"num_inference_steps": 4, "processing_resolution": 0, "output_latent": True}
    by_default = pipeline(pictures(pixels), generator=generators(SEEDS), **call).latent.numpy()
    with closing(open_source(spec_of(LCM, checkpoint(LCM)), "cpu")) as source:
        ours = source.encode(pixels, SEEDS).latents
        alone = np.concatenate([source.encode(pixels[n : n + 1], SEEDS[n : n + 1]).latents for n in range(3)])
    np.testing.assert_allclose(ours, alone, rtol=0, atol=SOURCES[LCM].row.tolerance)
    assert np.abs(by_default[1:] - alone[1:]).max() > 0.5


@pytest.mark.parametrize("name", [LCM, "marigold-normals", "marigold-intrinsics-lighting"])
def test_a_pipeline_that_decodes_although_it_is_asked_not_to_is_an_error_and_not_a_slow_run(
    name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SOURCES[name]
    monkeypatch.setitem(SOURCES, name, replace(entry, row=replace(entry.row, fix_up="")))
    with pytest.raises(SourceError, match=r"the generator called its decoder, `vae\.decode`"):
        open_source(spec_of(name, checkpoint(name)), "cpu")


def test_a_guard_that_guards_nothing_is_an_error(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SOURCES[LCM]
    monkeypatch.setitem(SOURCES, LCM, replace(entry, row=replace(entry.row, guard=("vae.decode_all",))))
    with pytest.raises(SourceError, match=r"has no `vae\.decode_all` to guard"):
        open_source(spec_of(LCM, checkpoint(LCM)), "cpu")


def test_the_decoder_is_whole_again_after_a_call(checkpoint: Callable[[str], Path]) -> None:
    with closing(open_source(spec_of(LCM, checkpoint(LCM)), "cpu")) as source:
        source.encode(some_pixels(SIDE), SEEDS)
        assert "decode" not in vars(source.pipeline.vae)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "depth_latent"}, "put out no `depth_latent`: it has"),
        ({"output": "uncertainty", "fix_up": "", "guard": ()}, "put out `uncertainty` NoneType for 1 images"),
        ({"axes": ("token", "channel")}, "its row says the axes token, channel"),
    ],
)
def test_a_missing_output_field_or_another_shape_is_an_error(
    changes: dict[str, object], message: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = SOURCES[LCM]
    monkeypatch.setitem(SOURCES, LCM, replace(entry, row=replace(entry.row, **changes)))
    with pytest.raises(SourceError, match=message):
        open_source(spec_of(LCM, checkpoint(LCM)), "cpu")


def test_a_checkpoint_of_another_pipeline_is_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(SourceError, match="`marigold-normals` cannot be opened"):
        open_source(
            spec_of("marigold-normals", checkpoint(LCM), parameters={"model": str(checkpoint(LCM) / "vae")}), "cpu"
        )


def test_bfloat16_device_attention_and_batch_size_stand_in_the_records_and_the_dtype_in_the_recipe(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    rows = []
    for number, picture in enumerate(pictures(some_pixels(SIDE))):
        picture.save(tmp_path / f"{number}.png")
        sha256 = sha256_of(tmp_path / f"{number}.png")
        rows.append(ManifestRow(f"image-{number}", f"{number}.png", None, "train", sha256, SIDE, SIDE))
    manifest = write_manifest(tmp_path / "manifest.parquet", rows, ())
    spec = spec_of(LCM, checkpoint(LCM))
    coarse = spec.model_copy(update={"parameters": {**spec.parameters, "compute_dtype": "bfloat16"}})
    build_cache(manifest, CacheSpec(latents=(coarse,)), tmp_path / "s", open_source=open_source, batch_size=2)
    store = open_store(tmp_path / "s")
    assert store.recipe("depth").parameters["compute_dtype"] == "bfloat16"
    made_with = store.committed("depth")[0].made_with
    assert made_with["batch_size"] == 2
    assert made_with["attention"] == "native"
    assert str(made_with["device"]).startswith("cpu")
    assert {"torch", "diffusers", "transformers"} <= made_with.keys()


def test_a_device_that_cannot_hold_one_image_is_an_error_when_the_source_is_opened(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(diffusers.MarigoldDepthPipeline, "__call__", run_out)
    with pytest.raises(SourceError, match=f"not enough memory for `{LCM}`"):
        open_source(spec_of(LCM, checkpoint(LCM)), "cpu")


@pytest.mark.parametrize("row", ["sd-img2img", "musicgen", "denoiser-features"])
def test_a_prompt_with_a_place_that_nothing_fills_is_refused(row: str) -> None:
    with pytest.raises(SpecError, match=r"has `\{captoin\}`, which stands for nothing"):
        open_source(spec_of(row, Path("nowhere"), parameters={"prompt": "a photo of {captoin}"}), "cpu")
