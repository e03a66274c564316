"""What fills one modality of the cache: a generator stopped before its decoder, or an encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import DlaError, MissingDependencyError, SourceError
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
    licence: str = ""
    """What its weights may be used for."""
    note: str = ""
    """What whoever reads a figure must know of how the source was made; shown beside every figure."""


EMBEDDED_LICENCE = "Apache-2.0; fitted on renderings of MNIST digits (CC BY-SA 3.0) over photo textures (CC BY 2.0)"
FRIENDLY_CASE = "fitted on images of the very renderer that made relief-digits: a friendly case"
SAW_LABELS = "paired with sounds by class, so it has seen the labels of 2,500 other digits"
CHEAP_MAP = "ridge regression from random image features to the same latents: the cheap map to beat"

SOURCES = {
    "embedded-depth": SourceEntry(
        Modality.DEPTH,
        "dla_cache.sources.embedded:EmbeddedDepth",
        "image-conditioned rectified flow in the latent space of a depth autoencoder, stopped before the decoder",
        EMBEDDED_LICENCE,
        FRIENDLY_CASE,
    ),
    "embedded-depth-ridge": SourceEntry(
        Modality.DEPTH, "dla_cache.sources.embedded:EmbeddedDepthRidge", CHEAP_MAP, EMBEDDED_LICENCE, FRIENDLY_CASE
    ),
    "embedded-audio": SourceEntry(
        Modality.AUDIO,
        "dla_cache.sources.embedded:EmbeddedAudio",
        "the same in the latent space of spoken digits: what a digit in an image is called, stopped before the decoder",
        EMBEDDED_LICENCE,
        f"{FRIENDLY_CASE}, and {SAW_LABELS}",
    ),
    "embedded-audio-ridge": SourceEntry(
        Modality.AUDIO,
        "dla_cache.sources.embedded:EmbeddedAudioRidge",
        CHEAP_MAP,
        EMBEDDED_LICENCE,
        f"{FRIENDLY_CASE}, and {SAW_LABELS}",
    ),
}


def open_source(spec: LatentSpec, device: str) -> LatentSource:
    """The source that `spec` names, with its weights loaded on `device`.

    Raises:
        SourceError: if there is no such source, its weights are not there, or the device cannot be used.
        SpecError: if it does not know one of the parameters.
        MissingDependencyError: if the generator's library is not installed.
    """
    if ":" in spec.source:
        return open_own_source(spec, device)
    entry = SOURCES.get(spec.source)
    if entry is None:
        raise SourceError(
            f"there is no source `{spec.source}`",
            hint=f"known sources: {', '.join(f'`{name}`' for name in SOURCES)}; one of your own is `module:Class`",
        )
    module, name = entry.location.split(":")
    try:
        factory: Callable[[LatentSpec, str], LatentSource] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"source `{spec.source}` needs `{error.name}`", hint="pip install 'dla[sources]'"
        ) from error
    return factory(spec, device)


def open_own_source(spec: LatentSpec, device: str) -> LatentSource:
    """A user's own class, named `module:Class`; it takes (spec, device) and is what `LatentSource` says.

    Raises:
        SourceError: if module or class is not there, or its recipe is not of this spec.
    """
    module, name = spec.source.split(":", 1)
    try:
        factory: Callable[[LatentSpec, str], LatentSource] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise SourceError(
            f"source `{spec.source}` needs the module `{error.name}`",
            hint="run from the folder that holds it, or install it into dla's environment",
        ) from error
    except AttributeError as error:
        raise SourceError(f"there is no `{name}` in module `{module}`", hint="check the spelling") from error
    except Exception as error:  # whatever a stranger's module does
        raise SourceError(f"module `{module}` cannot be imported: {error!r}", hint="mend the module") from error
    try:
        source = factory(spec, device)
    except DlaError:
        raise
    except Exception as error:  # whatever a stranger's class does
        raise SourceError(f"`{spec.source}` cannot be opened: {error!r}", hint="mend its `__init__`") from error
    recipe = getattr(source, "recipe", None)
    if not isinstance(recipe, Recipe) or not callable(getattr(source, "encode", None)):
        raise SourceError(
            f"`{spec.source}` is no source: it needs a `recipe` and a method `encode`",
            hint="see docs/guides/own-source.md",
        )
    said = {"source": recipe.source, "modality": recipe.modality, "seed": recipe.seed}
    wanted = {"source": spec.source, "modality": spec.modality, "seed": spec.seed}
    wrong = [key for key in wanted if said[key] != wanted[key]]
    if wrong:
        raise SourceError(
            f"the recipe of `{spec.source}` says {wrong[0]} `{said[wrong[0]]}`, the spec `{wanted[wrong[0]]}`",
            hint="take `source`, `modality` and `seed` of the recipe from the spec: they name what is stored",
        )
    return source
