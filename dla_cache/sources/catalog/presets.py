"""Few-step presets: variations of an image in two or three steps, by a denoiser, LoRA and scheduler of their own."""

from functools import partial

from dla_cache.sources.catalog.variation import (
    NO_CHECKER,
    NO_WATERMARK,
    OPEN_RAIL,
    OPEN_RAIL_2,
    SD_IMAGE,
    SDXL_IMAGE,
    SDXL_SCHEDULERS,
    image_to_image,
)

SD_BASE, SDXL_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
STABILITY = "Stability AI Community License; see model card"
TRAILING = {"timestep_spacing": "trailing"}


few_steps = partial(image_to_image, steps=4, strength=0.5, guidance=0.0)
sd = partial(few_steps, pipeline=SD_IMAGE, view_size=512, load=NO_CHECKER)
sdxl = partial(few_steps, pipeline=SDXL_IMAGE, view_size=1024, load=NO_WATERMARK, schedulers=SDXL_SCHEDULERS)


ENTRIES = {
    "sd-turbo": sd(
        "the image and its caption through SD-Turbo, 1 of 2 steps", "stabilityai/sd-turbo", STABILITY, steps=2
    ),
    "sdxl-turbo": sdxl(
        "the image and its caption through SDXL-Turbo, 1 of 2 steps",
        "stabilityai/sdxl-turbo",
        STABILITY,
        steps=2,
        view_size=512,
    ),
    "sdxl-lightning": sdxl(
        "the image and its caption through SDXL-Lightning, 2 of 4 steps",
        SDXL_BASE,
        OPEN_RAIL_2,
        components={"unet": "ByteDance/SDXL-Lightning#sdxl_lightning_4step_unet.safetensors"},
        scheduler="EulerDiscreteScheduler",
        scheduler_settings=TRAILING,
    ),
    "sdxl-lightning-lora": sdxl(
        "the image and its caption through SDXL with the LoRA of SDXL-Lightning, 2 of 4 steps",
        SDXL_BASE,
        OPEN_RAIL_2,
        components={"lora": "ByteDance/SDXL-Lightning#sdxl_lightning_4step_lora.safetensors"},
        scheduler="EulerDiscreteScheduler",
        scheduler_settings=TRAILING,
    ),
    "hyper-sd": sd(
        "the image and its caption through Stable Diffusion 1.5 with the LoRA of Hyper-SD, 2 of 4 steps",
        SD_BASE,
        f"{OPEN_RAIL}, of the LoRA see model card",
        components={"lora": "ByteDance/Hyper-SD#Hyper-SD15-4steps-lora.safetensors"},
        scheduler="DDIMScheduler",
        scheduler_settings=TRAILING,
    ),
    "hyper-sdxl": sdxl(
        "the image and its caption through SDXL with the LoRA of Hyper-SD, 2 of 4 steps",
        SDXL_BASE,
        f"{OPEN_RAIL_2}, of the LoRA see model card",
        components={"lora": "ByteDance/Hyper-SD#Hyper-SDXL-4steps-lora.safetensors"},
        scheduler="DDIMScheduler",
        scheduler_settings=TRAILING,
    ),
    "dmd2": sdxl(
        "the image and its caption through SDXL with the LoRA of DMD2, 2 of 4 steps",
        SDXL_BASE,
        f"{OPEN_RAIL_2}, the LoRA CC-BY-NC-4.0: no commercial use",
        components={"lora": "tianweiy/DMD2#dmd2_sdxl_4step_lora_fp16.safetensors"},
        scheduler="LCMScheduler",
        # A schedule of four, of which four steps are 999, 749, 499, 249: those that DMD2 was distilled on.
        scheduler_settings={"original_inference_steps": 4},
    ),
    "tdd": sdxl(
        "the image and its caption through SDXL with the LoRA of Target-Driven Distillation, 2 of 4 steps",
        SDXL_BASE,
        f"{OPEN_RAIL_2}, the LoRA Apache-2.0",
        note="its authors sample with a scheduler of their own, which diffusers does not have: here it is TCD's",
        guidance=1.7,
        settings={"eta": 0.2},
        components={"lora": "RED-AIGC/TDD#sdxl_tdd_lora_weights.safetensors"},
        scheduler="TCDScheduler",
    ),
    "lcm-lora": sd(
        "the image and its caption through Stable Diffusion 1.5 with the LoRA of LCM, 2 of 4 steps",
        SD_BASE,
        f"{OPEN_RAIL}, the LoRA {OPEN_RAIL_2}",
        guidance=1.0,
        components={"lora": "latent-consistency/lcm-lora-sdv1-5#pytorch_lora_weights.safetensors"},
        scheduler="LCMScheduler",
    ),
    "lcm-lora-sdxl": sdxl(
        "the image and its caption through SDXL with the LoRA of LCM, 2 of 4 steps",
        SDXL_BASE,
        OPEN_RAIL_2,
        guidance=1.0,
        components={"lora": "latent-consistency/lcm-lora-sdxl#pytorch_lora_weights.safetensors"},
        scheduler="LCMScheduler",
    ),
}
