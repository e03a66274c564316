"""Tiny few-step presets."""

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import load_file

from tests.dla_cache.sources.tiny import Tiny
from tests.dla_cache.sources.tiny_variation import LORA, UNET, save_sd, save_sdxl, variation

SD, SDXL = "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"
FEW = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 0.0}
TRAILING = {"timestep_spacing": "trailing"}
UNCLIPPED = {**TRAILING, "clip_sample": False}  # as the configurations of the real checkpoints say


def prepare(
    pipeline: Any, beside: Path, *, scheduler: str = "", lora: str = "", unet: str = "", **settings: Any
) -> None:
    """As the cards of these presets say: weights, then scheduler."""
    if unet:
        pipeline.unet.load_state_dict(load_file(beside / unet))
    if lora:
        pipeline.load_lora_weights(str(beside), weight_name=lora, local_files_only=True)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **settings)


def preset(pipeline: str, *, settings: dict[str, Any] | None = None, same_as: str = "", **preparation: Any) -> Tiny:
    return variation(
        save_sd if pipeline == SD else save_sdxl,
        pipeline,
        settings or FEW,
        prepare=partial(prepare, **preparation),
        components={part: preparation[part] for part in ("lora", "unet") if part in preparation},
        same_checkpoint_as=same_as,
    )


TURBO = {**FEW, "num_inference_steps": 2}
sd = partial(preset, SD, same_as="sd-img2img")
sdxl = partial(preset, SDXL, same_as="sdxl-img2img")

TINY = {
    "sd-turbo": variation(partial(save_sd, scheduler="EulerDiscreteScheduler", **TRAILING), SD, TURBO),
    "sdxl-turbo": variation(partial(save_sdxl, scheduler="EulerAncestralDiscreteScheduler", **TRAILING), SDXL, TURBO),
    "sdxl-lightning": sdxl(unet=UNET, scheduler="EulerDiscreteScheduler", **TRAILING),
    "sdxl-lightning-lora": sdxl(lora=LORA, scheduler="EulerDiscreteScheduler", **TRAILING),
    "hyper-sd": sd(lora=LORA, scheduler="DDIMScheduler", **UNCLIPPED),
    "hyper-sdxl": sdxl(lora=LORA, scheduler="DDIMScheduler", **UNCLIPPED),
    "dmd2": sdxl(lora=LORA, scheduler="LCMScheduler", original_inference_steps=4),
    "tdd": sdxl(lora=LORA, scheduler="TCDScheduler", settings={**FEW, "guidance_scale": 1.7, "eta": 0.2}),
    "lcm-lora": sd(lora=LORA, scheduler="LCMScheduler"),
    "lcm-lora-sdxl": sdxl(lora=LORA, scheduler="LCMScheduler"),
}
