"""Encoders: what a model sees in an image, as a control for generators or a teacher; and a denoiser's activations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import PipelineRow, Scalar, SourceEntry
from dla_cache.spec import Axis

TRANSFORMERS = "dla_cache.sources.encoder_source:EncoderSource"
AUTOENCODER = "dla_cache.sources.autoencoder_source:AutoencoderSource"
DENOISER = "dla_cache.sources.denoiser_source:DenoiserSource"

HOOK = {"hook": "", "pool": "none", "attention": "sdpa"}
"""`hook`: the module whose activations are taken, as `encoder.layer.11`, or `head:input`; empty for the model's own
result. `pool`: none, mean or cls."""
TOKENS: tuple[Axis, ...] = ("token", "channel")
MAP: tuple[Axis, ...] = ("channel", "height", "width")


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """A single model that makes features of an image: an encoder of transformers, half an autoencoder of diffusers."""

    model_class: str
    """As `transformers.Dinov2Model`."""
    output: str
    """Field of what the model puts out that holds the features, unless a `hook` says another place."""
    axes: tuple[Axis, ...]
    """Of one latent with the default settings; those of another hook are found."""
    space: str
    """What the numbers are, and what they were left without."""
    view_size: int
    """Side in pixels of the square view with the default model. An encoder of transformers sees what its own image
    processor makes of an image, unless a spec says another `view_size`."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """What a spec may set, and the defaults."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained`; a component that is None is neither loaded nor part of the weights' hash."""
    component: str = ""
    """Folder of the model, in a checkpoint of a whole pipeline."""
    guard: tuple[str, ...] = ()
    """Methods that decode: each is replaced by one that raises."""
    attention_part: str = ""
    """The part of the model's configuration that alone knows the attention backend, as `backbone_config`."""
    arrangement: Literal["", "unmasked"] = ""
    """`unmasked`: an autoencoder that drops patches at random sees all of them, in their order."""
    tolerance: float = 1e-5
    """Largest absolute difference that other images in the batch made when it was measured, on a CPU in float32 with
    random weights, rounded up."""


def encoder(
    model_class: str,
    model: str,
    summary: str,
    licence: str,
    *,
    shape: tuple[int, ...],
    view_size: int = 224,
    is_gated: bool = False,
    note: str = "",
    space: str = "last hidden state, one token a patch behind the class token; has no decoder",
    axes: tuple[Axis, ...] = TOKENS,
    settings: Mapping[str, Scalar] = HOOK,
    **row: Any,
) -> SourceEntry:
    """A model of transformers.

    Args:
        shape: of a latent with the default settings and view.
    """
    return SourceEntry(
        Modality.FEATURES,
        TRANSFORMERS,
        summary,
        licence,
        note,
        model=model,
        is_gated=is_gated,
        ignores_seed=True,
        size=_size(shape),
        bytes_per_image=_bytes(shape),
        row=EncoderRow(
            model_class=f"transformers.{model_class}",
            output="last_hidden_state",
            axes=axes,
            space=space,
            view_size=view_size,
            settings=settings,
            **row,
        ),
    )


def autoencoder(
    model_class: str,
    model: str,
    summary: str,
    licence: str,
    *,
    shape: tuple[int, ...],
    view_size: int,
    output: str,
    space: str,
    axes: tuple[Axis, ...] = MAP,
    dtype: str = "float16",
    **row: Any,
) -> SourceEntry:
    """The encoding half of an autoencoder of diffusers; its decoder must not run."""
    return SourceEntry(
        Modality.FEATURES,
        AUTOENCODER,
        summary,
        licence,
        model=model,
        ignores_seed=True,
        size=_size(shape, dtype),
        bytes_per_image=_bytes(shape),
        row=EncoderRow(
            model_class=f"diffusers.{model_class}",
            output=output,
            axes=axes,
            space=space,
            view_size=view_size,
            guard=("decode",),
            **row,
        ),
    )


def denoiser(
    pipeline: str,
    model: str,
    summary: str,
    licence: str,
    *,
    shape: tuple[int, ...],
    axes: tuple[Axis, ...],
    block: str,
    load: Mapping[str, Any],
    schedulers: tuple[str, ...],
    is_gated: bool = False,
) -> SourceEntry:
    """A pipeline whose denoiser is asked once, see `dla_cache.sources.denoiser_source`."""
    return SourceEntry(
        Modality.FEATURES,
        DENOISER,
        summary,
        licence,
        model=model,
        is_gated=is_gated,
        size=_size(shape),
        bytes_per_image=_bytes(shape),
        row=PipelineRow(
            pipeline=pipeline,
            output="",
            axes=axes,
            space="what `block` of the denoiser puts out; has no decoder",
            view_size=512,
            # Step and block of DIFT's semantic features, arXiv:2306.03881, of 1000 steps.
            settings={"block": block, "noise_step": 261, "pool": "none", "prompt": "", "caption_tokens": 30},
            load=load,
            image_form="tensor",
            text_argument="prompt",
            schedulers=schedulers,
            tolerance=1e-4,
        ),
    )


def _size(shape: tuple[int, ...], dtype: str = "float16") -> str:
    return f"{' x '.join(map(str, shape))} {dtype}"


def _bytes(shape: tuple[int, ...]) -> int:
    """Of two-byte numbers."""
    size = 2
    for side in shape:
        size *= side
    return size


KANDINSKY = "kandinsky-community/kandinsky-2-2-decoder"
MOVQ: dict[str, Any] = {
    "model": KANDINSKY,
    "licence": "Apache-2.0",
    "view_size": 512,
    "component": "movq",
    "load": {"unet": None, "scheduler": None},
}

ENTRIES = {
    "clip": encoder(
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-large-patch14",
        "image half of CLIP ViT-L/14: patch tokens; `hook: visual_projection` for the embedding",
        "not stated on the model card; OpenAI's code is MIT",
        shape=(257, 1024),
    ),
    "siglip": encoder(
        "SiglipVisionModel",
        "google/siglip-base-patch16-224",
        "image half of SigLIP ViT-B/16: patch tokens; `hook: head` for the embedding",
        "Apache-2.0",
        shape=(196, 768),
        space="last hidden state, one token a patch; has no decoder",
    ),
    "dinov2": encoder(
        "Dinov2Model",
        "facebook/dinov2-base",
        "DINOv2 ViT-B/14, self-supervised: class token and patch tokens",
        "Apache-2.0",
        shape=(257, 768),
    ),
    "dinov3": encoder(
        "DINOv3ViTModel",
        "facebook/dinov3-vitb16-pretrain-lvd1689m",
        "DINOv3 ViT-B/16, self-supervised: class token, four register tokens and patch tokens",
        "DINOv3 licence of Meta; see model card",
        shape=(201, 768),
        is_gated=True,
        space="last hidden state, one token a patch behind the class token and four registers; has no decoder",
    ),
    "flava": encoder(
        "FlavaImageModel",
        "facebook/flava-full",
        "image half of FLAVA ViT-B/16: class token and patch tokens",
        "BSD-3-Clause",
        shape=(197, 768),
        settings=HOOK | {"attention": "eager"},
    ),
    "vit-mae": encoder(
        "ViTMAEModel",
        "facebook/vit-mae-base",
        "masked autoencoder ViT-B/16 with nothing masked: class token and patch tokens",
        "Apache-2.0",
        shape=(197, 768),
        load={"mask_ratio": 0.0},
        arrangement="unmasked",
        space="last hidden state of all patches in their order behind the class token; the decoder is not loaded",
    ),
    "depth-anything": encoder(
        "DepthAnythingForDepthEstimation",
        "depth-anything/Depth-Anything-V2-Small-hf",
        "coarsest fused feature that the head of Depth Anything V2 Small is handed; `hook: head:input[-1]` for the one"
        " it makes depth of, 64 x 296 x 296",
        "Apache-2.0",
        shape=(64, 37, 37),
        view_size=518,
        axes=MAP,
        settings=HOOK | {"hook": "head:input[0]"},
        attention_part="backbone_config",
        space="feature of the neck, before the head that makes depth of it",
        note="trained to predict depth: no control for depth",
    ),
    "auto-model": encoder(
        "AutoModel",
        "google/vit-base-patch16-224-in21k",
        "any vision model that transformers' AutoModel loads, at any `hook`; the default is a ViT-B/16 trained on"
        " labels of ImageNet-21k",
        "Apache-2.0; of another `model` its own",
        shape=(197, 768),
        space="activations at `hook`, or the model's last hidden state",
        note="the default model was trained with labels",
    ),
    "vae-sd": autoencoder(
        "AutoencoderKL",
        "stabilityai/sd-vae-ft-mse",
        "autoencoder of Stable Diffusion 1: mean of the posterior; `sample: true` for a draw",
        "MIT",
        shape=(4, 32, 32),
        view_size=256,
        output="latent_dist",
        settings={"sample": False},
        space="posterior, not scaled: `vae.decode` of it gives an image in [-1, 1]",
    ),
    "vae-tiny": autoencoder(
        "AutoencoderTiny",
        "madebyollin/taesd",
        "tiny autoencoder into the latent space of Stable Diffusion 1",
        "MIT",
        shape=(4, 32, 32),
        view_size=256,
        output="latents",
        space="scaled as the UNet of Stable Diffusion 1 wants it: `decode` of it gives an image in [-1, 1]",
    ),
    "vae-dc": autoencoder(
        "AutoencoderDC",
        "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
        "deep compression autoencoder of Sana: a 32nd of each side",
        "see model card",
        shape=(32, 16, 16),
        view_size=512,
        output="latent",
        space="not scaled: `decode` of it gives an image in [-1, 1]",
    ),
    "vq": autoencoder(
        "VQModel",
        summary="autoencoder of Kandinsky 2.2: latent before it is quantised",
        shape=(4, 64, 64),
        output="latents",
        space="not quantised: `movq.decode` of it quantises, and gives an image in [-1, 1]",
        **MOVQ,
    ),
    "vq-codes": autoencoder(
        "VQModel",
        summary="autoencoder of Kandinsky 2.2: the nearest entry of its codebook, place by place",
        shape=(1, 64, 64),
        output="codes",
        axes=("codebook", "height", "width"),
        dtype="int16",
        space="indices into `movq.quantize.embedding`",
        **MOVQ,
    ),
    "denoiser-features": denoiser(
        "StableDiffusionPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "activations inside the UNet of Stable Diffusion 1.5, which is shown the image's latent with noise of a step",
        "CreativeML Open RAIL-M",
        shape=(1280, 32, 32),
        axes=MAP,
        block="up_blocks.1",
        load={
            "safety_checker": None,
            "feature_extractor": None,
            "image_encoder": None,
            "requires_safety_checker": False,
        },
        schedulers=("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "LCMScheduler"),
    ),
    "denoiser-features-sd3": denoiser(
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-medium",
        "activations inside the transformer of Stable Diffusion 3.5 Medium, without its T5: image tokens of the latent"
        " with noise of a step",
        "Stability AI Community License; see model card",
        shape=(1024, 1536),
        axes=TOKENS,
        is_gated=True,
        block="transformer_blocks.12[1]",
        load={"text_encoder_3": None, "tokenizer_3": None, "image_encoder": None, "feature_extractor": None},
        schedulers=("FlowMatchEulerDiscreteScheduler",),
    ),
}
