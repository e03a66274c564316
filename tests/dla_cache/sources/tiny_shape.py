"""A tiny Shap-E: 32 tokens of 16 channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.dla_cache.sources.tiny import Tiny, generators, pictures, save_seeded, tiny_vision

STEPS = 2


def save(folder: Path) -> None:
    save_seeded(make, folder)


def make() -> Any:
    from diffusers import HeunDiscreteScheduler, PriorTransformer, ShapEImg2ImgPipeline
    from diffusers.pipelines.shap_e import ShapERenderer
    from transformers import CLIPImageProcessor, CLIPVisionModel

    return ShapEImg2ImgPipeline(
        prior=PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            embedding_dim=16,
            num_embeddings=32,
            embedding_proj_dim=16,
            time_embed_dim=16,
            num_layers=1,
            clip_embed_dim=32,
            additional_embeddings=0,
            time_embed_act_fn="gelu",
            norm_in_type="layer",
            embedding_proj_norm_type="layer",
            encoder_hid_proj_type=None,
            added_emb_type=None,
        ),
        image_encoder=tiny_vision(CLIPVisionModel),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        scheduler=HeunDiscreteScheduler(
            beta_schedule="exp",
            num_train_timesteps=1024,
            prediction_type="sample",
            use_karras_sigmas=True,
            clip_sample=True,
            clip_sample_range=1.0,
        ),
        shap_e_renderer=ShapERenderer(
            param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_output=12
        ),
    )


def stock(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
    from diffusers import ShapEImg2ImgPipeline

    pipeline = ShapEImg2ImgPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    latents: NDArray[np.generic] = pipeline(
        pipeline.image_processor(pictures(pixels), return_tensors="pt").pixel_values,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=generators(seeds),
        output_type="latent",
    ).images.numpy()
    return latents


TINY = {
    "shap-e-img2img": Tiny(
        save=save,
        stock=stock,
        decoders=("diffusers.ShapEImg2ImgPipeline.numpy_to_pil",),
        parameters={"num_inference_steps": STEPS, "pooled_tokens": 0},
    )
}
