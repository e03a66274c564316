"""Tiny Marigolds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from tests.dla_cache.sources.tiny import (
    Tiny,
    generators,
    pictures,
    save_seeded,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)


def save(folder: Path, *, pipeline: str, scheduler: str, n_latents: int = 1, **settings: Any) -> None:
    def make() -> Any:
        zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        return getattr(diffusers, pipeline)(
            unet=tiny_unet(4 + 4 * n_latents, out_channels=4 * n_latents),
            vae=tiny_vae(),
            scheduler=getattr(diffusers, scheduler)(**zero_snr),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(folder.parent / "tokenizer"),
            default_denoising_steps=1,
            default_processing_resolution=768,
            **settings,
        )

    save_seeded(make, folder)


def stock(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int], *, pipeline: str) -> NDArray[np.generic]:
    loaded = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    put_out = loaded(
        pictures(pixels),
        num_inference_steps=4,
        processing_resolution=0,
        batch_size=len(pixels),
        generator=generators(seeds),
        output_latent=True,
    )
    latents: torch.Tensor = put_out.latent
    return latents.reshape(len(pixels), -1, *latents.shape[-2:]).numpy()


def marigold(pipeline: str, scheduler: str, **settings: Any) -> Tiny:
    return Tiny(
        save=partial(save, pipeline=pipeline, scheduler=scheduler, **settings),
        stock=partial(stock, pipeline=pipeline),
        decoders=("diffusers.AutoencoderKL.decode", f"diffusers.{pipeline}.decode_prediction"),
    )


DEPTH, NORMALS, INTRINSICS = "MarigoldDepthPipeline", "MarigoldNormalsPipeline", "MarigoldIntrinsicsPipeline"
DDIM = "DDIMScheduler"
DEPTH_SETTINGS = {"prediction_type": "depth", "scale_invariant": True, "shift_invariant": True}
NORMALS_SETTINGS = {"prediction_type": "normals", "use_full_z_range": True}


def intrinsics(*names: str) -> dict[str, Any]:
    targets = {"target_names": list(names), **{name: {"prediction_space": "linear"} for name in names}}
    return {"prediction_type": "intrinsics", "target_properties": targets, "n_latents": len(names)}


TINY = {
    "marigold-depth-lcm": marigold(DEPTH, "LCMScheduler", **DEPTH_SETTINGS),
    "marigold-depth": marigold(DEPTH, "DDIMScheduler", **DEPTH_SETTINGS),
    "marigold-normals-lcm": marigold(NORMALS, "LCMScheduler", **NORMALS_SETTINGS),
    "marigold-normals": marigold(NORMALS, "DDIMScheduler", **NORMALS_SETTINGS),
    "marigold-intrinsics-appearance": marigold(INTRINSICS, "DDIMScheduler", **intrinsics("albedo", "material")),
    "marigold-intrinsics-lighting": marigold(
        INTRINSICS, "DDIMScheduler", **intrinsics("albedo", "shading", "residual")
    ),
}
