"""What would make a wrong variation without a word: marks, blanked images, steps left out, another space."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as sdxl
from safetensors.torch import load_file, save_file

from dla_cache.errors import SourceError, SpecError
from dla_cache.sources import SOURCES, LatentSource, open_source
from dla_cache.sources.catalog import variation
from dla_cache.spec import LatentSpec
from tests.dla_cache.sources.conftest import some_pixels, spec_of, tiny_rows
from tests.dla_cache.sources.tiny import SIDE, generators, pictures
from tests.dla_cache.sources.tiny_variation import PROMPT, clip_processor

SEEDS = (11, 12)


def encode(spec: LatentSpec) -> Any:
    source: Any = open_source(spec, "cpu")
    try:
        return source.encode(some_pixels(SIDE, 2), SEEDS).latents
    finally:
        source.close()


def test_no_watermark_is_put_into_the_latents_of_sdxl(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watermark:
        def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
            return images + 1

    spec = spec_of("sdxl-img2img", checkpoint("sdxl-img2img"))
    before = encode(spec)
    monkeypatch.setattr(sdxl, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(sdxl, "StableDiffusionXLWatermarker", Watermark, raising=False)
    marked = tiny_rows()["sdxl-img2img"].stock(checkpoint("sdxl-img2img"), some_pixels(SIDE, 2), SEEDS)
    assert np.abs(marked - before).min() > 0.5  # the library by itself marks latents, too
    np.testing.assert_array_equal(encode(spec), before)


@pytest.mark.parametrize("row", ["sd-img2img", "sd-image-variation"])
def test_a_safety_checker_of_a_checkpoint_blanks_nothing_since_it_is_not_loaded(
    row: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import CLIPConfig

    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(row), folder)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**tower, "image_size": SIDE, "patch_size": 8}, projection_dim=16)
    checked = getattr(diffusers, SOURCES[row].row.pipeline).from_pretrained(folder, local_files_only=True)
    checked.register_modules(safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=clip_processor())
    checked.register_to_config(requires_safety_checker=True)
    checked.save_pretrained(folder)
    source: Any = open_source(spec_of(row, folder), "cpu")
    assert source.pipeline.safety_checker is None
    latents = source.encode(some_pixels(SIDE, 2), SEEDS).latents
    np.testing.assert_array_equal(latents, encode(spec_of(row, checkpoint(row))))


@pytest.mark.parametrize("row", sorted(variation.ENTRIES))
def test_the_space_that_a_row_states_is_the_one_that_its_pipeline_decodes(
    row: str, opened: Callable[[str], LatentSource]
) -> None:
    source: Any = opened(row)
    pixels, pipeline = some_pixels(SIDE, 2), source.pipeline
    latents = torch.from_numpy(source.encode(pixels, SEEDS).latents)
    call = {
        **source.row.call,
        **{name: source.settings[name] for name in source.row.settings},
        **dict.fromkeys(source.row.side_arguments, SIDE),
        **source.fix_up.arguments(2),
        **({"prompt": [PROMPT] * 2} if source.row.text_argument else {}),
    }
    call |= {"image": pictures(pixels), "generator": generators(SEEDS), "output_type": "pt"}
    with torch.no_grad():
        expected = pipeline(**call).images
        if "packed" in source.row.space:
            latents = pipeline._unpack_latents(latents, SIDE, SIDE, pipeline.vae_scale_factor)
        latents = latents / pipeline.vae.config.scaling_factor
        if "add `shift_factor`" in source.row.space:
            latents = latents + pipeline.vae.config.shift_factor
        decoded = pipeline.vae.decode(latents).sample
    np.testing.assert_allclose((decoded / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_weights_that_a_checkpoint_lacks_are_not_drawn_but_refused(
    part: str, file: str, checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("sd-img2img"), folder)
    weights = load_file(folder / part / f"{file}.safetensors")
    lacking = next(name for name in weights if name.endswith(("to_q.weight", "q_proj.weight")))
    del weights[lacking]
    save_file(weights, folder / part / f"{file}.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"checkpoint (lacks|does not hold).*{part}.{lacking}"):
        open_source(spec_of("sd-img2img", folder), "cpu")
    assert not caplog.records


NO_STEP = [
    ("sd-img2img", {"num_inference_steps": 4, "strength": 0.2}, "no step left"),
    ("sdxl-turbo", {"num_inference_steps": 1, "strength": 0.5}, "no step left"),
    ("sdxl-lightning", {"strength": 0.0}, "`strength`"),
    ("hyper-sd", {"strength": 1.5}, "`strength`"),
    ("sd-turbo", {"num_inference_steps": 0}, "`num_inference_steps`"),
    ("lcm-img2img", {"num_inference_steps": 8, "strength": 0.1}, "leaves 5 of the 50"),
    ("flux-img2img", {"num_inference_steps": 4, "strength": 0.9}, "nothing of its image"),
    ("flux-img2img", {"num_inference_steps": 1, "strength": 1.0}, "nothing of its image"),
]


@pytest.mark.parametrize(("row", "settings", "reason"), NO_STEP)
def test_settings_that_leave_no_step_or_nothing_of_the_image_are_refused_before_weights_are_looked_for(
    row: str, settings: dict[str, Any], reason: str
) -> None:
    parameters = {"model": "/nowhere", "prompt": "", **settings}
    spec = LatentSpec.model_validate({"modality": "variation", "source": row, "parameters": parameters, "seed": 1})
    with pytest.raises(SourceError, match=reason) as refusal:
        open_source(spec, "cpu")
    assert "hint: " in str(refusal.value)


def test_the_library_by_itself_makes_flux_latents_that_see_nothing_of_their_image(
    checkpoint: Callable[[str], Path],
) -> None:
    """What the refusal above is for: 3 steps at a strength of 0.9, and two images with one seed get one latent."""
    pipeline = diffusers.FluxImg2ImgPipeline.from_pretrained(checkpoint("flux-img2img"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pictures(some_pixels(SIDE, 2))
    settings = {"num_inference_steps": 3, "strength": 0.9, "height": SIDE, "width": SIDE, "max_sequence_length": 16}
    latents = pipeline(
        prompt=[""] * 2, image=images, generator=generators([5, 5]), output_type="latent", **settings
    ).images
    assert torch.allclose(latents[0], latents[1], atol=1e-5)


def with_prompt(name: str, folder: Path, prompt: str) -> LatentSpec:
    spec = spec_of(name, folder)
    return spec.model_copy(update={"parameters": {**spec.parameters, "prompt": prompt}})


def test_a_prompt_that_would_be_cut_off_before_its_caption_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(SpecError, match=r"has 22 tokens, and 16 are read"):
        encode(with_prompt("sd-img2img", checkpoint("sd-img2img"), "! " * 20 + "{caption}"))


@pytest.mark.parametrize("name", ["sd-img2img", "sdxl-img2img", "lcm-img2img", "sd-depth2img", "flux-img2img"])
def test_another_prompt_is_another_latent(name: str, checkpoint: Callable[[str], Path]) -> None:
    one, other = (encode(with_prompt(name, checkpoint(name), prompt)) for prompt in ("A CAT", "MY DOG"))
    assert not np.array_equal(one, other)
