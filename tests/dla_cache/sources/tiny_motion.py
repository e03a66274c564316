"""Tiny generators of videos."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from tests.dla_cache.sources.tiny import SIDE, Tiny, generators, pictures, save_seeded, tiny_t5, tiny_vision

PROMPT = "A CAT WALKS"


def save_stable_video(folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    def make() -> Any:
        return diffusers.StableVideoDiffusionPipeline(
            vae=diffusers.AutoencoderKLTemporalDecoder(
                block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
            ),
            image_encoder=tiny_vision(CLIPVisionModelWithProjection, image_size=224, patch_size=112),
            unet=diffusers.UNetSpatioTemporalConditionModel(
                block_out_channels=(32, 32),
                layers_per_block=1,
                sample_size=32,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                cross_attention_dim=16,
                num_attention_heads=2,
                projection_class_embeddings_input_dim=24,
                addition_time_embed_dim=8,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                steps_offset=1,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
            feature_extractor=CLIPImageProcessor(),
        )

    save_seeded(make, folder)


def save_ltx(folder: Path) -> None:
    def make() -> Any:
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        )
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=16,
        )
        tokenizer, text_encoder = tiny_t5()
        return diffusers.LTXImageToVideoPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(), vae, text_encoder, tokenizer, transformer
        )

    save_seeded(make, folder)


def save_cogvideox(folder: Path) -> None:
    """Frames of 48 x 32 pixels, as the learned positions of the real one know frames of 720 x 480 alone."""

    def make() -> Any:
        vae = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        )
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=16,
            in_channels=8,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=16,
            num_layers=1,
            sample_width=6,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )
        tokenizer, text_encoder = tiny_t5()
        return diffusers.CogVideoXImageToVideoPipeline(
            tokenizer, text_encoder, vae, transformer, diffusers.CogVideoXDDIMScheduler()
        )

    save_seeded(make, folder)


def stock(
    folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int], *, pipeline: str, settings: Mapping[str, Any]
) -> NDArray[np.generic]:
    loaded = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    if "prompt" in settings:
        settings = {**settings, "prompt": [settings["prompt"]] * len(pixels)}
    frames: torch.Tensor = loaded(
        image=pictures(pixels), generator=generators(seeds), output_type="latent", **settings
    ).frames
    return frames.numpy()


def stock_cogvideox(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int], **settings: Any) -> Any:
    """The view between its mirror images; four of six columns of the latent are its own."""
    framed = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (8, 8)), mode="reflect")
    return stock(folder, framed, seeds, **settings)[..., 1:5]


def tiny(
    pipeline: str, save: Any, stock: Any, vae: str, kept: Mapping[str, Any], side: int = SIDE, **settings: Any
) -> Tiny:
    """Of a pipeline whose frames are as large as the view, or as large as its checkpoint says."""
    square = {"max_sequence_length": 16} if "Cog" in pipeline else {"height": side, "width": side}
    return Tiny(
        save=save,
        stock=partial(stock, pipeline=pipeline, settings={**settings, **square}),
        decoders=(f"diffusers.{vae}.decode",),
        parameters={**settings, **kept},
        view_size=side,
    )


WHOLE = {"kept_frames": 0, "pooled_by": 1}
SVD = tiny(
    "StableVideoDiffusionPipeline",
    save_stable_video,
    stock,
    "AutoencoderKLTemporalDecoder",
    WHOLE,
    side=16,
    num_frames=3,
    num_inference_steps=2,
)

TINY = {
    "svd": SVD,
    "ltx-video": tiny(
        "LTXImageToVideoPipeline",
        save_ltx,
        stock,
        "AutoencoderKLLTXVideo",
        {"kept_frames": 0},
        prompt=PROMPT,
        num_frames=9,
        num_inference_steps=2,
        negative_prompt="BAD",
        frame_rate=25,
        guidance_scale=3.0,
    ),
    "cogvideox-i2v": tiny(
        "CogVideoXImageToVideoPipeline",
        save_cogvideox,
        stock_cogvideox,
        "AutoencoderKLCogVideoX",
        WHOLE,
        prompt=PROMPT,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=6.0,
    ),
}
TINY["svd-xt"] = replace(SVD, same_checkpoint_as="svd")
