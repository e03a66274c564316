"""Runs the encoding half of an autoencoder of diffusers: latents or codes of an image, and no decoding."""

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from dla_cache.lacking import require_finite
from dla_cache.preprocessing import SYMMETRIC
from dla_cache.sources.activations import as_array
from dla_cache.sources.captions import integer_for
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.encoders import EncoderRow
from dla_cache.sources.loading import (
    COMPUTE_DTYPES,
    WeightParameters,
    guarded,
    load_model,
    made_with,
    origin_of,
    parse_settings,
    told_as_source_error,
)
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import find_weights

CODES = "codes"


class AutoencoderSource:
    """An autoencoder, used as an encoder."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = self.row = entry.row
        assert isinstance(row, EncoderRow)
        self.parameters, self.settings = parse_settings(spec, row.settings, WeightParameters)
        self.device, self.tolerance = device, row.tolerance
        self.view_size = self.parameters.view_size or row.view_size
        self.ignores_seed = not self.settings.get("sample", False)  # the mean of a posterior draws nothing
        with told_as_source_error(spec.source):
            weights = find_weights(
                self.parameters.model or entry.model,
                self.parameters.revision,
                variant=self.parameters.variant,
                without=[name for name, value in row.load.items() if value is None],
            )
            inner = weights.path / row.component
            folder = inner if inner.is_dir() else weights.path
            said = {name: value for name, value in row.load.items() if value is not None}
            model, _ = load_model(row.model_class, folder, self.parameters, **said)
            self.model = model.to(device)
        self.made_with = made_with(device, origin_of("model", weights))
        self.recipe = self._recipe(spec, weights.sha256)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[Any]:
        """Latents float32 [B, *shape] of pixels uint8 [B, 3, S, S], or codes as integers."""
        values = SYMMETRIC(torch.from_numpy(pixels).to(self.device))
        with torch.inference_mode(), guarded(self.model, self.row.guard):
            put_out = self.model.encode(values.to(COMPUTE_DTYPES[self.parameters.compute_dtype]))
            if self.row.output == CODES:
                return self._codes(put_out.latents)
            latents = getattr(put_out, self.row.output)
            if self.row.output == "latent_dist":
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
                latents = latents.mode() if self.ignores_seed else latents.sample(generators)
            array: NDArray[np.float32] = as_array(latents)
        return array

    def _codes(self, latents: torch.Tensor) -> NDArray[Any]:
        """The entries of the codebook that are nearest, [B, 1, h, w]."""
        _, _, (_, _, indices) = self.model.quantize(latents)
        codes: NDArray[Any] = indices.reshape(len(latents), 1, *latents.shape[-2:]).cpu().numpy()
        return codes.astype(integer_for(self.model.config.num_vq_embeddings))

    def _recipe(self, spec: LatentSpec, weights_sha256: str) -> Recipe:
        """The recipe; a grey image tells the shape, and whether all weights that it takes are there."""
        fits = f"check that the model takes images of {self.view_size} x {self.view_size}, or set `view_size`"
        with told_as_source_error(spec.source, fits):
            grey = self.encode(np.full((1, 3, self.view_size, self.view_size), 127, np.uint8), [0])
        require_finite(spec.source, grey, self.parameters.compute_dtype)
        vocabulary = self.model.config.num_vq_embeddings if self.row.output == CODES else None
        return Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=weights_sha256,
            parameters={**self.parameters.of_recipe(), **self.settings, "view_size": self.view_size},
            seed=spec.seed,
            source_view_size=self.view_size,
            format=LatentFormat(
                kind="codes" if vocabulary else "continuous",
                shape=grey.shape[1:],
                axes=self.row.axes,
                dtype=integer_for(vocabulary) if vocabulary else spec.dtype,
                vocabulary=vocabulary,
                space=self.row.space,
            ),
        )

    def close(self) -> None:
        """Frees the device."""
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


assert diffusers  # imported first, so that a missing library is told as such
