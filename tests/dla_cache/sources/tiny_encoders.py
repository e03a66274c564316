"""Tiny encoders, autoencoders, and the denoiser of a tiny Stable Diffusion."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.dla_cache.sources.tiny import (
    SIDE,
    Tiny,
    generators,
    save_seeded,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
TEXT = {**VISION, "vocab_size": 10, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
Make = Callable[[], Any]


def processor(kind: str) -> Any:
    """The image processor of a kind of model, with a mean and a standard deviation of its own."""
    return getattr(transformers, kind)(
        size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )


def save_encoder(folder: Path, *, make: Make, kind: str) -> None:
    save_seeded(make, folder)
    if kind:
        processor(kind).save_pretrained(folder)
    else:  # torchvision alone brings the one of DINOv3
        said = {
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": MEAN,
            "image_std": STD,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(said | {"size": {"height": SIDE, "width": SIDE}}))


def processed(folder: Path, pixels: NDArray[np.uint8], kind: str) -> torch.Tensor:
    """What the stock processor makes of pixels that are a square already."""
    if not kind:
        mean, std = (torch.tensor(numbers).reshape(1, 3, 1, 1) for numbers in (MEAN, STD))
        return (torch.from_numpy(pixels) / 255 - mean) / std
    loaded = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    made = loaded(list(pixels), do_resize=False, do_center_crop=False, return_tensors="pt")
    return made["pixel_values"]


def stock_encoder(
    folder: Path, pixels: NDArray[np.uint8], _seeds: Sequence[int], *, model_class: str, kind: str, **call: Any
) -> NDArray[np.generic]:
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    with torch.inference_mode():
        return model(processed(folder, pixels, kind), **call).last_hidden_state.numpy()


def encoder(
    model_class: str,
    make: Make,
    *,
    kind: str,
    stock: Callable[..., NDArray[np.generic]] = stock_encoder,
    parameters: Mapping[str, Any] | None = None,
) -> Tiny:
    return Tiny(
        save=partial(save_encoder, make=make, kind=kind),
        stock=partial(stock, model_class=model_class, kind=kind),
        decoders=(),
        parameters=parameters or {},
    )


def tiny_clip() -> Any:
    vision = {**VISION, "projection_dim": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=8))


def tiny_siglip() -> Any:
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))


def tiny_flava() -> Any:
    parts = {"image_config": VISION, "text_config": TEXT, "multimodal_config": VISION}
    codebook = {"hidden_size": 8, "vocab_size": 8, "num_blocks_per_group": 1}
    settings = {"hidden_size": 16, "projection_dim": 8, "image_codebook_config": codebook}
    return transformers.FlavaForPreTraining(transformers.FlavaConfig(**parts, **settings))


def tiny_depth_anything() -> Any:
    backbone = transformers.Dinov2Config(
        **VISION, reshape_hidden_states=False, out_features=["stage1", "stage2"], apply_layernorm=True
    )
    model = transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=16,
            reassemble_hidden_size=16,
            reassemble_factors=[2, 1],
            neck_hidden_sizes=[8, 8],
            fusion_hidden_size=8,
            head_hidden_size=8,
        )
    )
    for weights in model.neck.parameters():
        torch.nn.init.normal_(weights, std=0.2)  # as they come, features would be smaller than any tolerance
    return model


def stock_depth_feature(
    folder: Path, pixels: NDArray[np.uint8], _seeds: Sequence[int], *, model_class: str, kind: str
) -> NDArray[np.generic]:
    """The coarsest feature that the head is handed, of a model that runs to its end."""
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    handed: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, arguments: handed.append(arguments[0][0]))
    with torch.inference_mode():
        model(processed(folder, pixels, kind))
    return handed[0].numpy()


def stock_unmasked(
    folder: Path, pixels: NDArray[np.uint8], _seeds: Sequence[int], *, model_class: str, kind: str
) -> NDArray[np.generic]:
    """All patches in their order: the embedding's own, without dropping any."""
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    model.embeddings.random_masking = lambda sequence, _noise=None: (sequence, None, None)
    with torch.inference_mode():
        return model(processed(folder, pixels, kind)).last_hidden_state.numpy()


def stock_layer(
    folder: Path, pixels: NDArray[np.uint8], _seeds: Sequence[int], *, model_class: str, kind: str
) -> NDArray[np.generic]:
    """What the first layer puts out, averaged over tokens."""
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    with torch.inference_mode():
        states = model(processed(folder, pixels, kind), output_hidden_states=True).hidden_states
    return states[1].mean(1).numpy()


def autoencoder(model_class: str, make: Make, latents_of: Callable[[Any, torch.Tensor], torch.Tensor]) -> Tiny:
    def stock(folder: Path, pixels: NDArray[np.uint8], _seeds: Sequence[int]) -> NDArray[np.generic]:
        model = getattr(diffusers, model_class).from_pretrained(folder, local_files_only=True)
        with torch.inference_mode():
            return latents_of(model, 2 * (torch.from_numpy(pixels) / 255) - 1).numpy()

    return Tiny(partial(save_seeded, make), stock, decoders=(f"diffusers.{model_class}.decode",))


def tiny_vq() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=300,
        vq_embed_dim=4,
    )


def tiny_dc() -> Any:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types=("rms_norm", "rms_norm"),
        decoder_act_fns=("silu", "silu"),
    )


def tiny_taesd() -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def nearest_codes(model: Any, values: torch.Tensor) -> torch.Tensor:
    """By arithmetic of our own: the entry of the codebook with the smallest distance."""
    latents = model.encode(values).latents
    away = latents[:, None] - model.quantize.embedding.weight[None, :, :, None, None]
    return away.square().sum(2).argmin(1, keepdim=True)


def save_denoiser(folder: Path) -> None:
    def make() -> Any:
        return diffusers.StableDiffusionPipeline(
            unet=tiny_unet(),
            vae=tiny_vae(),
            scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(folder.parent / "tokenizer"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    save_seeded(make, folder)


BLOCK, STEP = "up_blocks.0", 261


def stock_denoiser(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
    """What the block puts out while the UNet runs to its end."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    values = pipeline.image_processor.preprocess(torch.from_numpy(pixels) / 255)
    seen: list[torch.Tensor] = []
    pipeline.unet.get_submodule(BLOCK).register_forward_hook(lambda _module, _arguments, result: seen.append(result))
    with torch.inference_mode():
        latents = pipeline.vae.config.scaling_factor * pipeline.vae.encode(values).latent_dist.mode()
        noise = torch.cat(
            [torch.randn((1, *latents.shape[1:]), generator=generator) for generator in generators(seeds)]
        )
        noisy = pipeline.scheduler.add_noise(latents, noise, torch.tensor([STEP]))
        texts, _ = pipeline.encode_prompt("", "cpu", 1, False)
        pipeline.unet(noisy, STEP, encoder_hidden_states=texts.expand(len(pixels), -1, -1))
    return seen[0].numpy()


def save_flow(folder: Path) -> None:
    def make() -> Any:
        texts = [tiny_text_encoder(projection_dim=16).config for _ in range(2)]
        tokenizers = [tiny_tokenizer(folder.parent / f"tokenizer-{number}") for number in range(2)]
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=SIDE,
        )
        return diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5),
            text_encoder=transformers.CLIPTextModelWithProjection(texts[0]),
            text_encoder_2=transformers.CLIPTextModelWithProjection(texts[1]),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            text_encoder_3=None,
            tokenizer_3=None,
        )

    save_seeded(make, folder)


FLOW_BLOCK = "transformer_blocks.0"


def stock_flow(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
    """What the block puts out for image tokens while the transformer runs to its end."""
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, local_files_only=True, text_encoder_3=None, tokenizer_3=None
    )
    values = pipeline.image_processor.preprocess(torch.from_numpy(pixels) / 255)
    seen: list[torch.Tensor] = []
    pipeline.transformer.get_submodule(FLOW_BLOCK).register_forward_hook(lambda _, __, result: seen.append(result[1]))
    with torch.inference_mode():
        mean = pipeline.vae.encode(values).latent_dist.mean
        latents = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        noise = torch.cat([torch.randn((1, *mean.shape[1:]), generator=generator) for generator in generators(seeds)])
        texts, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
        pipeline.transformer(
            (1 - STEP / 1000) * latents + STEP / 1000 * noise,
            texts.expand(len(pixels), -1, -1),
            pooled.expand(len(pixels), -1),
            torch.tensor([STEP]).expand(len(pixels)),
        )
    return seen[0].numpy()


def of_class(model_class: str, config_class: str) -> Make:
    return lambda: getattr(transformers, model_class)(getattr(transformers, config_class)(**VISION))


TINY = {
    "clip": encoder("CLIPVisionModel", tiny_clip, kind="CLIPImageProcessorPil"),
    "siglip": encoder("SiglipVisionModel", tiny_siglip, kind="SiglipImageProcessorPil"),
    "dinov2": encoder("Dinov2Model", of_class("Dinov2Model", "Dinov2Config"), kind="BitImageProcessorPil"),
    "dinov3": encoder("DINOv3ViTModel", of_class("DINOv3ViTModel", "DINOv3ViTConfig"), kind=""),
    "flava": encoder("FlavaImageModel", tiny_flava, kind="FlavaImageProcessorPil"),
    "vit-mae": encoder(
        "ViTMAEModel", of_class("ViTMAEModel", "ViTMAEConfig"), kind="ViTImageProcessorPil", stock=stock_unmasked
    ),
    "depth-anything": encoder(
        "DepthAnythingForDepthEstimation", tiny_depth_anything, kind="DPTImageProcessorPil", stock=stock_depth_feature
    ),
    "auto-model": encoder(
        "ViTModel",
        of_class("ViTModel", "ViTConfig"),
        kind="ViTImageProcessorPil",
        stock=stock_layer,
        parameters={"hook": "layers.0", "pool": "mean"},
    ),
    "vae-sd": autoencoder("AutoencoderKL", tiny_vae, lambda model, values: model.encode(values).latent_dist.mean),
    "vae-tiny": autoencoder("AutoencoderTiny", tiny_taesd, lambda model, values: model.encode(values).latents),
    "vae-dc": autoencoder("AutoencoderDC", tiny_dc, lambda model, values: model.encode(values).latent),
    "vq": autoencoder("VQModel", tiny_vq, lambda model, values: model.encode(values).latents),
    "vq-codes": autoencoder("VQModel", tiny_vq, nearest_codes),
    "denoiser-features": Tiny(save_denoiser, stock_denoiser, parameters={"block": BLOCK, "noise_step": STEP}),
    "denoiser-features-sd3": Tiny(save_flow, stock_flow, parameters={"block": f"{FLOW_BLOCK}[1]", "noise_step": STEP}),
}
