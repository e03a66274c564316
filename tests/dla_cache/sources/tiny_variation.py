"""Tiny image-to-image pipelines."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tests.dla_cache.sources.tiny import (
    SIDE,
    Tiny,
    generators,
    pictures,
    save_seeded,
    tiny_t5,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
    tiny_vision,
)

PROMPT = "A CAT"
LORA, UNET = "lora.safetensors", "unet.safetensors"
STEPS = {"num_inference_steps": 3, "strength": 0.7}


def beta_schedule(kind: str, **settings: Any) -> Any:
    """A scheduler with the noise of Stable Diffusion."""
    if kind == "PNDMScheduler":
        settings["skip_prk_steps"] = True
    return getattr(diffusers, kind)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


def sd_parts(folder: Path, **unet: Any) -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(folder.parent / "tokenizer"),
        "unet": tiny_unet(**unet),
    }


def save_sd(folder: Path, *, scheduler: str = "PNDMScheduler", **settings: Any) -> None:
    """Stable Diffusion, and a LoRA for it in the format of kohya."""

    def make() -> Any:
        made = diffusers.StableDiffusionImg2ImgPipeline(
            **sd_parts(folder),
            scheduler=beta_schedule(scheduler, steps_offset=1, **settings),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        save_file(tiny_lora(made.unet, "lora_unet_{}.lora_down", "lora_unet_{}.lora_up"), folder.parent / LORA)
        return made

    save_seeded(make, folder)


def save_sdxl(folder: Path, *, scheduler: str = "EulerDiscreteScheduler", **settings: Any) -> None:
    """Stable Diffusion XL, and for it a LoRA in the format of diffusers and another UNet."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def make() -> Any:
        projected = tiny_text_encoder(projection_dim=16).config
        made = diffusers.StableDiffusionXLImg2ImgPipeline(
            **sd_parts(
                folder,
                width=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
            ),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**projected.to_dict())),
            tokenizer_2=tiny_tokenizer(folder.parent / "tokenizer_2"),
            scheduler=beta_schedule(scheduler, steps_offset=1, **settings),
        )
        save_file(tiny_lora(made.unet, "unet.{}.lora_A", "unet.{}.lora_B"), folder.parent / LORA)
        other = {name: weight.flip(0).contiguous() for name, weight in made.unet.state_dict().items()}
        save_file(other, folder.parent / UNET)
        return made

    save_seeded(make, folder)


def tiny_lora(unet: Any, first: str, second: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 for every layer of a UNet's attention and residual blocks.

    Args:
        first, second: names of its two matrices, `{}` for the layer's.
    """
    weights: dict[str, torch.Tensor] = {}
    for layer, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ("attentions" in layer or "resnets" in layer):
            said = layer.replace(".", "_") if "lora_unet" in first else layer  # kohya's format has no dots in a layer
            n_out, n_in, *kernel = module.weight.shape
            weights[f"{first.format(said)}.weight"] = 0.1 * torch.randn(2, n_in, *kernel)
            weights[f"{second.format(said)}.weight"] = 0.1 * torch.randn(n_out, 2, *(1 for _ in kernel))
    return weights


def save_lcm(folder: Path) -> None:
    def make() -> Any:
        return diffusers.LatentConsistencyModelImg2ImgPipeline(
            **sd_parts(folder, time_cond_proj_dim=16),
            scheduler=beta_schedule("LCMScheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    save_seeded(make, folder)


def save_depth2img(folder: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    def make() -> Any:
        depth = DPTConfig(
            image_size=SIDE,
            patch_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
        return diffusers.StableDiffusionDepth2ImgPipeline(
            **sd_parts(folder, in_channels=5),
            scheduler=beta_schedule("PNDMScheduler"),
            depth_estimator=DPTForDepthEstimation(depth),
            feature_extractor=DPTImageProcessor(size={"height": SIDE, "width": SIDE}),
        )

    save_seeded(make, folder)


def save_image_variation(folder: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    def make() -> Any:
        return diffusers.StableDiffusionImageVariationPipeline(
            vae=tiny_vae(),
            unet=tiny_unet(),
            image_encoder=tiny_vision(CLIPVisionModelWithProjection),
            scheduler=beta_schedule("PNDMScheduler"),
            feature_extractor=clip_processor(),
            safety_checker=None,
            requires_safety_checker=False,
        )

    save_seeded(make, folder)


def save_stable_unclip(folder: Path) -> None:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionModelWithProjection

    def make() -> Any:
        return diffusers.StableUnCLIPImg2ImgPipeline(
            **sd_parts(folder, class_embed_type="projection", projection_class_embeddings_input_dim=32),
            image_encoder=tiny_vision(CLIPVisionModelWithProjection),
            feature_extractor=clip_processor(),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
            image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            scheduler=beta_schedule("PNDMScheduler"),
        )

    save_seeded(make, folder)


def clip_processor() -> Any:
    from transformers import CLIPImageProcessor

    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side)


def save_flux(folder: Path, *, pipeline: str) -> None:
    def make() -> Any:
        tokenizer_2, text_encoder_2 = tiny_t5()
        return getattr(diffusers, pipeline)(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(folder.parent / "tokenizer"),
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            ),
        )

    save_seeded(make, folder)


def stock(
    folder: Path,
    pixels: NDArray[np.uint8],
    seeds: Sequence[int],
    *,
    pipeline: str,
    settings: Mapping[str, Any],
    load: Mapping[str, Any],
    prepare: Callable[[Any, Path], None] | None = None,
    prompted: bool = True,
) -> NDArray[np.generic]:
    """Latents of the pipeline as its users call it.

    Args:
        prepare: what is done to the pipeline, beside the folder of the checkpoint, before it is called.
    """
    loaded = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True, **load)
    loaded.set_progress_bar_config(disable=True)
    if prepare is not None:
        prepare(loaded, folder.parent)
    text = {"prompt": [PROMPT] * len(pixels)} if prompted else {}
    put_out = loaded(image=pictures(pixels), generator=generators(seeds), output_type="latent", **text, **settings)
    latents: NDArray[np.generic] = put_out.images.numpy()
    return latents


def variation(
    save: Callable[[Path], None],
    pipeline: str,
    settings: Mapping[str, Any],
    *,
    call: Mapping[str, Any] | None = None,
    load: Mapping[str, Any] | None = None,
    prepare: Callable[[Any, Path], None] | None = None,
    prompted: bool = True,
    **of_tiny: Any,
) -> Tiny:
    """A row whose spec and whose stock call have the same settings.

    Args:
        call: further arguments of the stock call.
    """
    told = {"prompt": PROMPT} if prompted else {}
    return Tiny(
        save=save,
        stock=partial(
            stock,
            pipeline=pipeline,
            settings={**settings, **(call or {})},
            load=load or {},
            prepare=prepare,
            prompted=prompted,
        ),
        decoders=("diffusers.AutoencoderKL.decode",),
        parameters={**told, **settings},
        **of_tiny,
    )


SIDES = {"height": SIDE, "width": SIDE}
GUIDED = {**STEPS, "guidance_scale": 5.0}
TINY = {
    "sd-img2img": variation(save_sd, "StableDiffusionImg2ImgPipeline", GUIDED),
    "sdxl-img2img": variation(save_sdxl, "StableDiffusionXLImg2ImgPipeline", GUIDED),
    "lcm-img2img": variation(
        save_lcm,
        "LatentConsistencyModelImg2ImgPipeline",
        {"num_inference_steps": 3, "strength": 0.5, "guidance_scale": 8.0},
    ),
    "sd-depth2img": variation(save_depth2img, "StableDiffusionDepth2ImgPipeline", GUIDED),
    "sd-image-variation": variation(
        save_image_variation,
        "StableDiffusionImageVariationPipeline",
        {"num_inference_steps": 2, "guidance_scale": 3.0},
        prompted=False,
    ),
    "stable-unclip": variation(
        save_stable_unclip,
        "StableUnCLIPImg2ImgPipeline",
        {"num_inference_steps": 2, "guidance_scale": 10.0, "noise_level": 10},
    ),
    "flux-img2img": variation(
        partial(save_flux, pipeline="FluxImg2ImgPipeline"),
        "FluxImg2ImgPipeline",
        {"num_inference_steps": 3, "strength": 0.6, "guidance_scale": 2.0, "max_sequence_length": 16},
        call=SIDES,
    ),
    "flux-kontext": variation(
        partial(save_flux, pipeline="FluxKontextPipeline"),
        "FluxKontextPipeline",
        {"num_inference_steps": 2, "guidance_scale": 2.5, "max_sequence_length": 16},
        call={**SIDES, "max_area": SIDE**2, "_auto_resize": False},
    ),
}
