"""What fills one modality of the cache: a generator stopped before its decoder, or an encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import DlaError, MissingDependencyError, SourceError, SpecError
from dla_cache.sources.catalog import SOURCES as SOURCES
from dla_cache.sources.catalog.entry import SourceEntry as SourceEntry
from dla_cache.spec import LatentSpec, Recipe


@dataclass(frozen=True, slots=True)
class Encoded:
    """Latents, and what is to be told of how they came about."""

    latents: NDArray[np.generic]
    """Raw, [B, *shape]. Rows of images that are rejected may hold anything."""
    captions: Sequence[str] = ()
    """[B], the text that each latent was made from; empty if no text of the image was used."""
    rejected: Mapping[int, str] = field(default_factory=dict)
    """Place in the batch → why this image has no latent, as one that a safety checker blanked."""


class LatentSource(Protocol):
    """One modality's source, loaded and ready.

    What may be there as well: `made_with`, a mapping of plain values that lie outside the recipe, such as versions and
    where weights came from, for the commit records; and `tolerance`, the largest absolute difference in a latent that
    other images in its batch, or their number, may make. Without it there is none, to the bit.
    """

    recipe: Recipe
    """Of one draw, as `open_source` finds it; with several draws of the sample that holds them."""

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic] | Encoded:
        """Raw latents [B, *shape], one draw, of pixels uint8 [B, 3, S, S], a seed a sample, S the recipe's view size.

        Any B > 0. On one device, a sample's numbers are a function of its pixels and its seed: they depend
        neither on B nor on the other samples, but for `tolerance`.

        Raises:
            torch.OutOfMemoryError: as it comes; the build asks again for fewer.
        """

    def close(self) -> None:
        """Frees the device."""


ENTRY_POINTS = "dla.sources"
"""Group in which an installed package names its own sources: `name = "module:Class"`."""


def open_source(spec: LatentSpec, device: str) -> LatentSource:
    """The source that `spec` names, with its weights loaded on `device`, and a recipe of as many draws.

    Raises:
        SourceError: if there is no such source, its weights are not there, or the device cannot be used.
        SpecError: if it does not know one of the parameters, or several draws are wanted where nothing is drawn.
        MissingDependencyError: if the generator's library is not installed.
    """
    source = _open_one_draw(spec, device)
    if spec.draws == 1:
        return source
    if ignores_seeds(source):
        source.close()
        raise SpecError(
            f"`{spec.source}` draws nothing: {spec.draws} draws would be {spec.draws} times the same latent",
            hint="leave `draws` out",
        )
    return SeveralDraws(source, spec.draws)


def ignores_seeds(source: LatentSource) -> bool:
    """Whether a source says that nothing is drawn: by its own attribute `ignores_seed`, or in the catalog."""
    entry = SOURCES.get(source.recipe.source)
    return bool(getattr(source, "ignores_seed", entry is not None and entry.ignores_seed))


class SeveralDraws:
    """A source whose recipe is that of samples with several draws. Its `encode` is still asked for one at a time."""

    def __init__(self, source: LatentSource, draws: int) -> None:
        self.encode, self.close = source.encode, source.close
        self.made_with: Mapping[str, str | int | float | bool] = getattr(source, "made_with", {})
        self.tolerance: float = getattr(source, "tolerance", 0.0)
        self.recipe = source.recipe.model_copy(update={"format": source.recipe.format.with_draws(draws)})


def _open_one_draw(spec: LatentSpec, device: str) -> LatentSource:
    if ":" in spec.source:
        return open_own_source(spec, spec.source, device)
    entry = SOURCES.get(spec.source)
    if entry is None:
        named = entry_points(group=ENTRY_POINTS, name=spec.source)
        if named:
            return open_own_source(spec, next(iter(named)).value, device)
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


def open_own_source(spec: LatentSpec, location: str, device: str) -> LatentSource:
    """A class that is not of dla, at `module:Class`; it takes (spec, device) and is what `LatentSource` says.

    Raises:
        SourceError: if module or class is not there, or its recipe is not of this spec.
    """
    module, name = location.split(":", 1)
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
