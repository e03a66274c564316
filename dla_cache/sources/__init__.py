"""What fills one modality of the cache: a generator stopped before its decoder, or an encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import MissingDependencyError, SourceError
from dla_cache.spec import LatentSpec, Modality, Recipe


class LatentSource(Protocol):
    """One modality's source, loaded and ready."""

    recipe: Recipe

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        """Raw latents [B, *shape] of pixels uint8 [B, 3, S, S], one seed a sample, S the recipe's view size.

        Any B > 0. On one device, a sample's bytes are a function of its pixels and its seed: they depend
        neither on B nor on the other samples, so a source whose kernels see the difference fills up its own batches.
        """

    def close(self) -> None:
        """Frees the device."""


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """A source that can be named in a cache spec."""

    modality: Modality
    location: str
    """`module:class`, imported when the source is opened; the class takes (spec, device)."""
    summary: str


SOURCES = {
    "embedded-depth": SourceEntry(
        Modality.DEPTH,
        "dla_cache.sources.embedded:EmbeddedDepth",
        "image-conditioned rectified flow in the latent space of a depth autoencoder, stopped before the decoder",
    ),
    "embedded-depth-ridge": SourceEntry(
        Modality.DEPTH,
        "dla_cache.sources.embedded:EmbeddedDepthRidge",
        "ridge regression from random image features to the same latents: the cheap map to beat",
    ),
}


def open_source(spec: LatentSpec, device: str) -> LatentSource:
    """The source that `spec` names, with its weights loaded on `device`.

    Raises:
        SourceError: if there is no such source, its weights are not there, or the device cannot be used.
        SpecError: if it does not know one of the parameters.
        MissingDependencyError: if the generator's library is not installed.
    """
    entry = SOURCES.get(spec.source)
    if entry is None:
        raise SourceError(
            f"there is no source `{spec.source}`", hint=f"known sources: {', '.join(f'`{name}`' for name in SOURCES)}"
        )
    module, name = entry.location.split(":")
    try:
        factory: Callable[[LatentSpec, str], LatentSource] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"source `{spec.source}` needs `{error.name}`", hint="pip install 'dla[sources]'"
        ) from error
    return factory(spec, device)
