"""Activations inside the denoiser of a diffusion pipeline, which is shown an image's latent with noise of one step.

Source: DIFT, arXiv:2306.03881, section 4: noise of step t is added to the latent of a real image, and the features are
what a block on the way up puts out when the UNet is asked once. For the transformer of Stable Diffusion 3 the same.
"""

from collections.abc import Mapping, Sequence

import diffusers
import numpy as np
import torch
from diffusers.models.attention_dispatch import attention_backend
from numpy.typing import NDArray
from torch import Tensor

from dla_cache.errors import SpecError
from dla_cache.lacking import require_finite
from dla_cache.preprocessing import SYMMETRIC
from dla_cache.sources import Encoded
from dla_cache.sources.activations import Hook, activations, as_array, axes_of, pooled
from dla_cache.sources.captions import BlipCaptioner, open_captioner, require_no_caption_settings
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.entry import CAPTION, PipelineRow, Scalar
from dla_cache.sources.diffusers_source import require_prompt_fits
from dla_cache.sources.encoder_source import pool_named
from dla_cache.sources.loading import (
    ATTENTION,
    COMPUTE_DTYPES,
    guarded,
    load_pipeline,
    made_with,
    parse_parameters,
    refuse_global_draws,
    told_as_source_error,
)
from dla_cache.sources.presets import preset_of
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import joint_hash


class DenoiserSource:
    """A pipeline's VAE and denoiser, asked once and stopped at a block: a UNet, or the transformer of a flow."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = self.row = entry.row
        assert isinstance(row, PipelineRow)
        self.parameters, self.settings = parse_parameters(spec, row.settings, row)
        self.hook = Hook.parse(str(self.settings["block"]))
        self.pool = pool_named(spec, str(self.settings["pool"]))
        self.step, self.prompt = int(self.settings["noise_step"]), str(self.settings["prompt"])
        if CAPTION not in self.prompt:
            del self.settings["caption_tokens"]
            require_no_caption_settings(spec.source, self.parameters)
        with told_as_source_error(spec.source):
            self.pipeline, hashes, origin, self.lacking = load_pipeline(
                entry, row, self.parameters, preset_of(row, {}), device
            )
            require_prompt_fits(spec.source, self.pipeline, self.prompt, self.settings)
        self.is_flow = hasattr(self.pipeline, "transformer")
        n_steps = self.pipeline.scheduler.config.num_train_timesteps
        if not 0 <= self.step < n_steps:
            raise SpecError(
                f"parameters of `{spec.source}`: `noise_step` is {self.step}",
                hint=f"the checkpoint was trained on steps 0 to {n_steps - 1}",
            )
        self.captioner: BlipCaptioner | None = None
        if CAPTION in self.prompt:
            self.captioner, captioner_hashes, captioner_origin = open_captioner(
                self.parameters, int(self.settings["caption_tokens"]), device
            )
            hashes, origin = hashes | captioner_hashes, origin | captioner_origin
        self.device, self.tolerance = device, row.tolerance
        self.view_size = self.parameters.view_size or row.view_size
        self.made_with = made_with(device, origin)
        self.recipe = self._recipe(spec, hashes)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> Encoded:
        """Features float32 [B, *shape] of pixels uint8 [B, 3, S, S], and the captions if there are any."""
        captions = self.captioner.describe(pixels) if self.captioner is not None else []
        with torch.inference_mode(), attention_backend(ATTENTION), guarded(self.pipeline, self.row.guard):
            noisy = self._noisy_latents(torch.from_numpy(pixels), seeds)
            prompts = [self.prompt.replace(CAPTION, caption) for caption in captions or [""] * len(pixels)]
            denoiser = self.pipeline.transformer if self.is_flow else self.pipeline.unet
            asked = self._flow_arguments(noisy, prompts) if self.is_flow else self._unet_arguments(noisy, prompts)
            features = activations(denoiser, self.hook, lambda: denoiser(**asked))
            return Encoded(as_array(pooled(features, self.pool)), captions)

    def _noisy_latents(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """[B, C, h, w]: the mean of the VAE's posterior as the denoiser wants it, and noise of each image's seed.

        The mean in place of a draw leaves one source of chance, the noise.
        """
        vae, dtype = self.pipeline.vae, COMPUTE_DTYPES[self.parameters.compute_dtype]
        mean = vae.encode(SYMMETRIC(pixels.to(self.device)).to(dtype)).latent_dist.mode()
        latents = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        drawn = [torch.randn(mean.shape[1:], generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        noise = torch.stack(drawn).to(latents)
        if self.is_flow:  # the share of noise is the step's share of all: Source: rectified flow, arXiv:2209.03003
            share: float = self.step / self.pipeline.scheduler.config.num_train_timesteps
            return torch.lerp(latents, noise, share)
        noisy: Tensor = self.pipeline.scheduler.add_noise(latents, noise, self._steps(latents))
        return noisy

    def _steps(self, latents: Tensor) -> Tensor:
        return torch.full((len(latents),), self.step, device=latents.device)

    def _unet_arguments(self, noisy: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        texts, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"sample": noisy, "timestep": self._steps(noisy), "encoder_hidden_states": texts}

    def _flow_arguments(self, noisy: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        texts, _, pooled_texts, _ = self.pipeline.encode_prompt(
            prompts, prompts, prompts, self.device, do_classifier_free_guidance=False
        )
        return {
            "hidden_states": noisy,
            "timestep": self._steps(noisy),
            "encoder_hidden_states": texts,
            "pooled_projections": pooled_texts,
        }

    def _recipe(self, spec: LatentSpec, hashes: Mapping[str, str]) -> Recipe:
        """The recipe; a grey image tells the shape."""
        with told_as_source_error(spec.source), refuse_global_draws(spec.source, self.pipeline.device):
            grey = self.encode(np.full((1, 3, self.view_size, self.view_size), 127, np.uint8), [0]).latents
        require_finite(spec.source, grey, self.parameters.compute_dtype, self.lacking)
        told: dict[str, Scalar] = {"view_size": self.view_size, "scheduler": type(self.pipeline.scheduler).__name__}
        return Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=joint_hash(dict(hashes)),
            parameters={**self.parameters.of_recipe(), **self.settings, **told},
            seed=spec.seed,
            source_view_size=self.view_size,
            format=LatentFormat(
                kind="continuous",
                shape=grey.shape[1:],
                axes=axes_of(grey.shape[1:]),
                dtype=spec.dtype,
                space=self.row.space,
            ),
        )

    def close(self) -> None:
        """Frees the device."""
        del self.pipeline, self.captioner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


assert diffusers  # imported first, so that a missing library is told as such
