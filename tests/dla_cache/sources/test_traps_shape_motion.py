"""What generators of shapes and videos would do to a cache without a word."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dla_cache.errors import SourceError, SpecError
from dla_cache.sources import SOURCES, Encoded, LatentSource, open_source
from dla_cache.sources.reductions import last_of_groups, mean_of_groups, mean_of_squares
from tests.dla_cache.sources.conftest import some_pixels, spec_of, tiny_rows
from tests.dla_cache.sources.tiny import generators, pictures

SEEDS = (11, 12, 13)


def encoded(source: LatentSource, n_images: int = 3) -> np.ndarray[Any, Any]:
    put_out = source.encode(some_pixels(source.recipe.source_view_size, n_images), SEEDS[:n_images])
    assert isinstance(put_out, Encoded)
    return put_out.latents


def with_parameters(row: str, folder: Path, **parameters: Any) -> Any:
    return spec_of(row, folder, parameters={**spec_of(row, folder).parameters, **parameters})


def test_shap_e_sees_every_image_of_a_batch_of_which_it_would_take_the_first(
    checkpoint: Callable[[str], Path], opened: Callable[[str], LatentSource]
) -> None:
    seen: list[int] = []

    def counts(pipeline: Any) -> Any:
        return pipeline.image_encoder.register_forward_hook(
            lambda _model, _arguments, put_out: seen.append(len(put_out.last_hidden_state))
        )

    stock = diffusers.ShapEImg2ImgPipeline.from_pretrained(checkpoint("shap-e-img2img"), local_files_only=True)
    with counts(stock), suppress(RuntimeError):  # of other versions there is not even this error
        stock(pictures(some_pixels(32)), generator=generators(SEEDS), num_inference_steps=1, output_type="latent")
    source = opened("shap-e-img2img")
    with counts(source.pipeline):  # type: ignore[attr-defined]
        encoded(source)
    assert seen == [1, 3]


def test_the_decoder_of_shap_e_is_not_even_loaded(opened: Callable[[str], LatentSource]) -> None:
    assert opened("shap-e-img2img").pipeline.shap_e_renderer is None  # type: ignore[attr-defined]


def test_pooled_tokens_are_means_of_neighbours_and_stand_in_the_recipe(
    checkpoint: Callable[[str], Path], opened: Callable[[str], LatentSource]
) -> None:
    whole = encoded(opened("shap-e-img2img"))
    pooled_spec = with_parameters("shap-e-img2img", checkpoint("shap-e-img2img"), pooled_tokens=8)
    with closing(open_source(pooled_spec, "cpu")) as pooled:
        assert pooled.recipe.parameters["pooled_tokens"] == 8
        assert pooled.recipe.format.shape == (8, 16)
        means = whole.reshape(3, 8, 4, 16).mean(2)
        np.testing.assert_allclose(encoded(pooled), means, rtol=0, atol=1e-5)


def test_kept_frames_and_pooled_places_are_those_of_the_whole_latent(
    checkpoint: Callable[[str], Path], opened: Callable[[str], LatentSource]
) -> None:
    whole = encoded(opened("svd"), 1)
    spec = with_parameters("svd", checkpoint("svd"), kept_frames=1, pooled_by=4)
    with closing(open_source(spec, "cpu")) as fewer:
        assert fewer.recipe.format.shape == (1, 4, 2, 2)
        means = whole[:, 2:].reshape(1, 1, 4, 2, 4, 2, 4).mean((4, 6))
        np.testing.assert_allclose(encoded(fewer, 1), means, rtol=0, atol=1e-4)


def test_kept_frames_of_packed_latents_are_whole_frames(
    checkpoint: Callable[[str], Path], opened: Callable[[str], LatentSource]
) -> None:
    whole = encoded(opened("ltx-video"), 1)
    n_frames = 3
    with closing(open_source(with_parameters("ltx-video", checkpoint("ltx-video"), kept_frames=1), "cpu")) as fewer:
        last = whole.reshape(1, n_frames, -1, 8)[:, -1]
        np.testing.assert_allclose(encoded(fewer, 1), last, rtol=0, atol=1e-5)


def test_reductions_keep_the_last_frame_and_lose_nothing_when_they_keep_all() -> None:
    latents = torch.arange(2 * 14 * 3, dtype=torch.float32).reshape(2, 14, 3)
    for kept in range(1, 15):
        assert torch.equal(last_of_groups(latents, kept)[:, -1], latents[:, -1])
    assert torch.equal(last_of_groups(latents, 14), latents)
    assert torch.equal(last_of_groups(latents, 7), latents[:, 1::2])
    assert torch.equal(mean_of_groups(latents, 14), latents)
    assert mean_of_groups(latents, 1).squeeze(1).tolist() == latents.mean(1).tolist()
    square = torch.arange(16, dtype=torch.float32).reshape(1, 4, 4)
    assert mean_of_squares(square, 2).tolist() == [[[2.5, 4.5], [10.5, 12.5]]]


@pytest.mark.parametrize(
    ("row", "parameters", "fault"),
    [
        ("shap-e-img2img", {"pooled_tokens": 5}, "`pooled_tokens` 5 does not divide 32 tokens"),
        ("shap-e-img2img", {"pooled_tokens": -1}, "`pooled_tokens` -1 does not divide 32 tokens"),
        ("svd", {"kept_frames": 4}, "`kept_frames` 4 of 3 frames"),
        ("svd", {"pooled_by": 3}, "`pooled_by` 3 does not divide 8 x 8 places"),
        ("svd", {"pooled_by": 0}, "`pooled_by` 0"),
        ("ltx-video", {"kept_frames": -1}, "`kept_frames` -1 of 3 frames"),
    ],
)
def test_a_reduction_that_does_not_come_out_even_is_refused_when_the_source_is_opened(
    checkpoint: Callable[[str], Path], row: str, parameters: dict[str, Any], fault: str
) -> None:
    with pytest.raises(SpecError, match=fault):
        open_source(with_parameters(row, checkpoint(row), **parameters), "cpu")


def test_stable_video_is_refused_a_scheduler_that_draws_from_the_global_generator(
    checkpoint: Callable[[str], Path],
) -> None:
    spec = with_parameters("svd", checkpoint("svd"), scheduler="EulerAncestralDiscreteScheduler")
    with pytest.raises(SourceError, match="not known to be repeatable"):
        open_source(spec, "cpu")


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with another value in one of its files of JSON."""
    shutil.copytree(folder, target)
    config = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(config | changes))
    return target


def test_a_checkpoint_that_brings_such_a_scheduler_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    ancestral = ["diffusers", "EulerAncestralDiscreteScheduler"]
    folder = edited(checkpoint("svd"), tmp_path / "other", "model_index.json", scheduler=ancestral)
    with pytest.raises(SourceError, match="brings the scheduler `EulerAncestralDiscreteScheduler`"):
        open_source(spec_of("svd", folder), "cpu")


def test_a_known_scheduler_that_is_set_to_draw_from_the_global_generator_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    file = "scheduler/scheduler_config.json"
    folder = edited(checkpoint("ltx-video"), tmp_path / "other", file, stochastic_sampling=True)
    with pytest.raises(SourceError, match="no seed of an image decides"):
        open_source(spec_of("ltx-video", folder), "cpu")


def test_both_schedulers_of_cogvideox_draw_from_the_seeds_alone(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("cogvideox-i2v")
    spec = with_parameters("cogvideox-i2v", folder, scheduler="CogVideoXDPMScheduler", num_inference_steps=3)
    with closing(open_source(spec, "cpu")) as source:
        together = encoded(source)
        torch.rand(1)  # whatever state the global generator is in
        np.testing.assert_array_equal(encoded(source), together)
        np.testing.assert_allclose(encoded(source, 1), together[:1], rtol=0, atol=source.tolerance)  # type: ignore[attr-defined]


def test_a_turned_image_is_placed_in_the_frame_of_cogvideox_as_its_turned_self(
    opened: Callable[[str], LatentSource],
) -> None:
    pixels = torch.from_numpy(some_pixels(32, 1))
    images = opened("cogvideox-i2v").fix_up.images  # type: ignore[attr-defined]
    framed, turned = np.asarray(images(pixels)[0]), np.asarray(images(pixels.flip(-1))[0])
    assert framed.shape == (32, 48, 3)
    np.testing.assert_array_equal(framed[:, 8:40], pixels[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(turned, framed[:, ::-1])


def test_a_checkpoint_of_cogvideox_1_5_is_refused_because_some_of_its_frames_are_padding() -> None:
    from dla_cache.sources.video import InWideFrame

    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(patch_size_t=2)))
    with pytest.raises(SourceError, match=r"CogVideoX 1\.5"):
        InWideFrame(pipeline, SOURCES["cogvideox-i2v"].row, {"kept_frames": 0, "pooled_by": 1})


def test_a_source_that_takes_few_images_at_once_takes_any_number_in_parts(
    opened: Callable[[str], LatentSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sizes = opened("svd"), []
    call = diffusers.StableVideoDiffusionPipeline.__call__

    def counted(self: Any, image: Any, **arguments: Any) -> Any:
        sizes.append(len(image))
        return call(self, image, **arguments)

    monkeypatch.setattr(diffusers.StableVideoDiffusionPipeline, "__call__", counted)
    put_out = source.encode(some_pixels(source.recipe.source_view_size, 5), range(5))
    assert isinstance(put_out, Encoded)
    assert sizes == [4, 1]
    assert put_out.latents.shape[0] == 5


def test_every_row_of_this_family_keeps_whole_latents_in_the_suite_that_compares_them() -> None:
    for row in ("svd", "svd-xt", "ltx-video", "cogvideox-i2v"):
        assert tiny_rows()[row].parameters["kept_frames"] == 0
    assert tiny_rows()["shap-e-img2img"].parameters["pooled_tokens"] == 0
