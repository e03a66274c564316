"""Runs a vision model of transformers as far as a hook, on pixels as its own image processor would hand them to it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from dla_cache.errors import SourceError, name_some
from dla_cache.lacking import require_finite
from dla_cache.preprocessing import read_preprocessing
from dla_cache.sources.activations import Hook, Pool, activations, as_array, axes_of, pooled
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.encoders import EncoderRow
from dla_cache.sources.catalog.entry import Scalar
from dla_cache.sources.loading import (
    COMPUTE_DTYPES,
    WeightParameters,
    load_model,
    made_with,
    origin_of,
    parse_settings,
    refuse_global_draws,
    told_as_source_error,
)
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import find_weights

ATTENTION = ("sdpa", "eager")
"""Backends that are part of torch. Others, as those whose names end in `_hub`, may be fetched from the hub when a model
is loaded, and are code that runs: so is `flash_attention_2` where it is not installed."""

POOLS: tuple[Pool, ...] = ("none", "mean", "cls")


class EncoderSource:
    """A vision model, or the image half of a model that also reads text."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = self.row = entry.row
        assert isinstance(row, EncoderRow)
        self.parameters, settings = parse_settings(spec, row.settings, WeightParameters)
        attention = _attention(spec, str(settings.pop("attention")))
        self.pool = pool_named(spec, str(settings["pool"]))
        self.hook = Hook.parse(str(settings["hook"])) if settings["hook"] else None
        self.device, self.tolerance = device, row.tolerance
        with told_as_source_error(spec.source):
            weights = find_weights(
                self.parameters.model or entry.model, self.parameters.revision, variant=self.parameters.variant
            )
            self.preprocessing = read_preprocessing(weights.path)
            backend = {"": "eager", row.attention_part: attention} if row.attention_part else attention
            with told_of_attention(attention):
                model, self.lacking = load_model(
                    row.model_class, weights.path, self.parameters, attn_implementation=backend, **row.load
                )
            self.model = model.to(device)
        self.view_size = self.parameters.view_size or self.preprocessing.side or row.view_size
        self.made_with = made_with(device, origin_of("model", weights)) | {"attention": attention}
        self.recipe = self._recipe(spec, weights.sha256, settings)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Features float32 [B, *shape] of pixels uint8 [B, 3, S, S]; nothing is drawn."""
        values = self.preprocessing(torch.from_numpy(pixels).to(self.device))
        values = values.to(COMPUTE_DTYPES[self.parameters.compute_dtype])
        with torch.inference_mode():
            if self.hook is not None:
                features = activations(self.model, self.hook, lambda: self._forward(values))
            else:
                features = self._result(values)
            array: NDArray[np.float32] = as_array(pooled(features, self.pool))
        return array

    def _forward(self, values: torch.Tensor) -> Any:
        # Models of images and texts want both, but for this method of theirs.
        call = getattr(self.model, "get_image_features", self.model)
        return call(pixel_values=values, **self._arguments(values))

    def _arguments(self, values: torch.Tensor) -> Mapping[str, Any]:
        if self.row.arrangement != "unmasked":
            return {}
        n_patches = self.model.embeddings.patch_embeddings.num_patches
        order = torch.linspace(0, 1, n_patches, device=values.device)
        return {"noise": order.expand(len(values), -1)}  # patches are sorted by it, and would be by a global draw

    def _result(self, values: torch.Tensor) -> torch.Tensor:
        result = self._forward(values)
        features = getattr(result, self.row.output, None)
        if not isinstance(features, torch.Tensor):
            there = name_some(list(result)) if isinstance(result, Mapping) else f"a `{type(result).__name__}`"
            raise SourceError(
                f"`{type(self.model).__name__}` puts out no `{self.row.output}`: there is {there}",
                hint="name the module whose activations are to be taken as `hook`",
            )
        return features

    def _recipe(self, spec: LatentSpec, weights_sha256: str, settings: Mapping[str, Scalar]) -> Recipe:
        """The recipe; a grey image tells the shape, and whether all weights that it takes are there."""
        fits = f"check that the model takes images of {self.view_size} x {self.view_size}, or set `view_size`"
        draws = "take another model, or a `hook` before the module that draws"
        with told_as_source_error(spec.source, fits), refuse_global_draws(spec.source, self.model.device, draws):
            grey = self.encode(np.full((1, 3, self.view_size, self.view_size), 127, np.uint8), [0])
        require_finite(spec.source, grey, self.parameters.compute_dtype, self.lacking)
        return Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=weights_sha256,
            parameters={**self.parameters.of_recipe(), **settings, "view_size": self.view_size},
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
        del self.model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def told_of_attention(name: str) -> Iterator[None]:
    """Turns the library's refusal of an attention backend into an error with a hint."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if name == "eager" or "attention" not in str(error):
            raise
        raise SourceError(
            f"this model cannot be run with the attention backend `{name}`", hint="set `attention: eager`"
        ) from error


def _attention(spec: LatentSpec, name: str) -> str:
    if name not in ATTENTION:
        raise SourceError(
            f"`{spec.source}` does not take the attention backend `{name}`: others than these may be fetched from"
            " the hub and run",
            hint=f"take one of {name_some(ATTENTION)}",
        )
    return name


def pool_named(spec: LatentSpec, name: str) -> Pool:
    """What a spec calls a pool, checked."""
    for pool in POOLS:
        if pool == name:
            return pool
    raise SourceError(f"`{spec.source}` knows no pool `{name}`", hint=f"take one of {name_some(POOLS)}")


assert transformers  # imported first, so that a missing library is told as such
