"""Variations of an image: what a generator makes of it and of its caption, as latents of the generator's VAE."""

from collections.abc import Mapping

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import PipelineRow, Scalar, SourceEntry
from dla_cache.spec import Axis

SOURCE = "dla_cache.sources.diffusers_source:DiffusersSource"
IMAGE_TO_IMAGE = "dla_cache.sources.variation:ImageToImage"
AXES: tuple[Axis, ...] = ("channel", "height", "width")

SD, SDXL = "Stable Diffusion 1 and 2", "Stable Diffusion XL"
SPACE = (
    "an image, of the VAE of {vae}, scaled by its `scaling_factor`; divide by it, then `vae.decode` of the pipeline"
    " gives three channels in [-1, 1]"
)
PACKED = (
    "an image, of the VAE of Flux, shifted, scaled and packed: a token is a square of two by two places, row by row;"
    " `_unpack_latents` of the pipeline, divide by `scaling_factor`, add `shift_factor`, then `vae.decode`"
)

OPEN_RAIL = "CreativeML Open RAIL-M"
OPEN_RAIL_2 = "CreativeML Open RAIL++-M"
FLUX_DEV = "FLUX.1 [dev] Non-Commercial License"
MIRROR = "a mirror of the community: the first repository was taken down in November 2025"

# Tried each: they draw from the generators of the images alone.
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# PNDM wants four steps before its first, unless a configuration of Stable Diffusion 1 or 2 tells it not to.
SDXL_SCHEDULERS = tuple(name for name in SCHEDULERS if name != "PNDMScheduler")
NO_CHECKER: Mapping[str, Scalar | None] = {"safety_checker": None, "requires_safety_checker": False}
NO_WATERMARK: Mapping[str, Scalar | None] = {"add_watermarker": False}
SD_IMAGE, SDXL_IMAGE = "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"
ALWAYS = {"output_type": "latent"}


def size_of(shape: tuple[int, ...]) -> tuple[str, int]:
    """What a table says of a latent in float16: its shape, its bytes."""
    size = 2
    for length in shape:
        size *= length
    return f"{' x '.join(str(length) for length in shape)} float16", size


def image_to_image(
    summary: str,
    model: str,
    licence: str,
    *,
    pipeline: str,
    view_size: int,
    steps: int,
    strength: float,
    guidance: float,
    load: Mapping[str, Scalar | None],
    note: str = "",
    settings: Mapping[str, Scalar] | None = None,
    schedulers: tuple[str, ...] = SCHEDULERS,
    fix_up: str = IMAGE_TO_IMAGE,
    components: Mapping[str, str] | None = None,
    scheduler: str = "",
    scheduler_settings: Mapping[str, Scalar] | None = None,
) -> SourceEntry:
    """A pipeline of Stable Diffusion that begins at the image with some noise."""
    size, bytes_per_image = size_of((4, view_size // 8, view_size // 8))
    return SourceEntry(
        Modality.VARIATION,
        SOURCE,
        summary,
        licence,
        note,
        model=model,
        size=size,
        bytes_per_image=bytes_per_image,
        row=PipelineRow(
            pipeline=pipeline,
            output="images",
            axes=AXES,
            space=SPACE.format(vae=SDXL if pipeline == SDXL_IMAGE else SD),
            view_size=view_size,
            settings={
                "num_inference_steps": steps,
                "strength": strength,
                "guidance_scale": guidance,
                **(settings or {}),
            },
            call=ALWAYS,
            load=load,
            text_argument="prompt",
            schedulers=schedulers,
            fix_up=fix_up,
            components=components or {},
            scheduler=scheduler,
            scheduler_settings=scheduler_settings or {},
        ),
    )


def from_noise(
    summary: str,
    model: str,
    licence: str,
    note: str,
    *,
    pipeline: str,
    side: int,
    settings: Mapping[str, Scalar],
    load: Mapping[str, Scalar | None],
    text_argument: str = "",
) -> SourceEntry:
    """A pipeline of Stable Diffusion that begins at noise and is told what is in the image by its embedding.

    Args:
        side: of the image that the latent stands for: the checkpoint's own, whatever the view.
    """
    size, bytes_per_image = size_of((4, side // 8, side // 8))
    return SourceEntry(
        Modality.VARIATION,
        SOURCE,
        summary,
        licence,
        note,
        model=model,
        size=size,
        bytes_per_image=bytes_per_image,
        row=PipelineRow(
            pipeline=pipeline,
            output="images",
            axes=AXES,
            space=SPACE.format(vae=SD),
            view_size=224,
            settings=settings,
            call=ALWAYS,
            load=load,
            text_argument=text_argument,
            schedulers=SCHEDULERS,
        ),
    )


def flux(
    summary: str, model: str, licence: str, *, pipeline: str, settings: Mapping[str, Scalar], fix_up: str
) -> SourceEntry:
    """A pipeline of Flux, whose latents are packed into tokens."""
    size, bytes_per_image = size_of((4096, 64))
    return SourceEntry(
        Modality.VARIATION,
        SOURCE,
        summary,
        licence,
        model=model,
        is_gated=True,
        size=size,
        bytes_per_image=bytes_per_image,
        row=PipelineRow(
            pipeline=pipeline,
            output="images",
            axes=("token", "channel"),
            space=PACKED,
            view_size=1024,
            settings=settings,
            side_arguments=("height", "width"),
            call=ALWAYS,
            text_argument="prompt",
            schedulers=("FlowMatchEulerDiscreteScheduler",),
            fix_up=fix_up,
        ),
    )


ENTRIES = {
    "sd-img2img": image_to_image(
        "the image and its caption through Stable Diffusion 1.5, 37 of 50 steps",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        OPEN_RAIL,
        pipeline=SD_IMAGE,
        view_size=512,
        steps=50,
        strength=0.75,
        guidance=7.5,
        load=NO_CHECKER,
    ),
    "sdxl-img2img": image_to_image(
        "the image and its caption through Stable Diffusion XL, 25 of 50 steps, without watermark",
        "stabilityai/stable-diffusion-xl-base-1.0",
        OPEN_RAIL_2,
        pipeline=SDXL_IMAGE,
        view_size=1024,
        steps=50,
        strength=0.5,
        guidance=5.0,
        load=NO_WATERMARK,
        schedulers=SDXL_SCHEDULERS,
    ),
    "lcm-img2img": image_to_image(
        "the image and its caption through a latent consistency model of Dreamshaper, 4 steps",
        "SimianLuo/LCM_Dreamshaper_v7",
        "MIT",
        pipeline="LatentConsistencyModelImg2ImgPipeline",
        view_size=768,
        steps=4,
        strength=0.5,
        guidance=8.0,
        load=NO_CHECKER,
        schedulers=("LCMScheduler",),
        fix_up="dla_cache.sources.variation:ConsistencyImageToImage",
    ),
    "sd-depth2img": image_to_image(
        "the depth of the image, the image and its caption through Stable Diffusion 2, 35 of 50 steps",
        "sd2-community/stable-diffusion-2-depth",
        OPEN_RAIL_2,
        pipeline="StableDiffusionDepth2ImgPipeline",
        view_size=512,
        steps=50,
        strength=0.7,
        guidance=7.5,
        load={},
        note=MIRROR,
    ),
    "sd-image-variation": from_noise(
        "another image of the same CLIP embedding, by Stable Diffusion 1.4 without text, 50 steps",
        "lambdalabs/sd-image-variations-diffusers",
        OPEN_RAIL,
        "the repository's safetensors lie in a proposal, not in its main branch: set `revision` to `refs/pr/20`",
        pipeline="StableDiffusionImageVariationPipeline",
        side=512,
        settings={"num_inference_steps": 50, "guidance_scale": 3.0},
        load=NO_CHECKER,
    ),
    "stable-unclip": from_noise(
        "another image of the same CLIP embedding and caption, by Stable unCLIP 2.1, 20 steps",
        "sd2-community/stable-diffusion-2-1-unclip",
        OPEN_RAIL_2,
        MIRROR,
        pipeline="StableUnCLIPImg2ImgPipeline",
        side=768,
        settings={"num_inference_steps": 20, "guidance_scale": 10.0, "noise_level": 0},
        load={},
        text_argument="prompt",
    ),
    "flux-img2img": flux(
        "the image and its caption through FLUX.1 [schnell], 3 of 4 steps",
        "black-forest-labs/FLUX.1-schnell",
        "Apache-2.0",
        pipeline="FluxImg2ImgPipeline",
        settings={
            "num_inference_steps": 4,
            "strength": 0.75,
            "guidance_scale": 0.0,
            "max_sequence_length": 256,
        },
        fix_up="dla_cache.sources.variation:FlowImageToImage",
    ),
    "flux-kontext": flux(
        "the image changed by what its caption says, by FLUX.1 Kontext [dev], 28 steps",
        "black-forest-labs/FLUX.1-Kontext-dev",
        FLUX_DEV,
        pipeline="FluxKontextPipeline",
        settings={"num_inference_steps": 28, "guidance_scale": 2.5, "max_sequence_length": 512},
        fix_up="dla_cache.sources.variation:OwnArea",
    ),
}
