"""What fills one modality of the cache: a generator stopped before its decoder, or an encoder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import DlaError, MissingDependencyError, SourceError, SpecError, name_some
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

    def __post_init__(self) -> None:
        """
        Raises:
            SourceError: if what is told is not of these images.
        """
        count = len(self.latents)
        if not isinstance(self.captions, list | tuple) or not all(isinstance(one, str) for one in self.captions):
            raise SourceError("a source told captions that are no list of texts", hint="mend the source")
        if len(self.captions) not in (0, count):
            raise SourceError(
                f"a source told {len(self.captions)} captions of {count} images",
                hint="let it tell one of each, or none",
            )
        for place in self.rejected:
            if isinstance(place, bool) or not isinstance(place, int | np.integer) or not 0 <= place < count:
                raise SourceError(
                    f"a source rejected image `{place}` of a batch of {count}",
                    hint="a place in the batch counts from 0: mend the source",
                )


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
        try:
            several = source.recipe.format.with_draws(draws)
        except ValueError as error:  # a latent too large, or one that has draws already
            shape = list(source.recipe.format.shape)
            raise SpecError(
                f"`{source.recipe.source}` cannot be stored in {draws} draws of shape {shape}",
                hint="take fewer draws, or a smaller latent",
            ) from error
        self.recipe = source.recipe.model_copy(update={"format": several})


def _open_one_draw(spec: LatentSpec, device: str) -> LatentSource:
    if ":" in spec.source:
        return open_own_source(spec, spec.source, device)
    entry = SOURCES.get(spec.source)
    if entry is None:
        locations = sorted({point.value for point in entry_points(group=ENTRY_POINTS, name=spec.source)})
        if len(locations) > 1:
            raise SourceError(
                f"{len(locations)} installed packages have a source `{spec.source}`: {name_some(locations)}",
                hint="name one of these places as `source`, or uninstall the others",
            )
        if locations:
            return open_own_source(spec, locations[0], device)
        raise SourceError(
            f"there is no source `{spec.source}`",
            hint=f"known sources: {', '.join(f'`{name}`' for name in SOURCES)}; one of your own is `module:Class`",
        )
    if spec.modality.kind != entry.modality.kind:
        raise SourceError(
            f"`{spec.source}` makes `{entry.modality}`, not `{spec.modality}`", hint=f"set `modality: {entry.modality}`"
        )
    module, name = entry.location.split(":")
    try:
        factory: Callable[[LatentSpec, str], LatentSource] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"source `{spec.source}` needs `{error.name}`", hint="pip install 'dla[sources]'"
        ) from error
    except Exception as error:  # what libraries raise of an environment variable that they cannot make sense of
        raise SourceError(
            f"what `{spec.source}` needs cannot be imported: {error!r}",
            hint="look at environment variables such as DIFFUSERS_ATTN_BACKEND, and at the versions in constraints.txt",
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
    if fault := _fault_of(source):
        raise SourceError(f"`{spec.source}` {fault}", hint="mend the source, see docs/guides/own-source.md")
    return source


def _fault_of(source: LatentSource) -> str:
    """What would fail only when the first shard has been computed; empty if nothing does."""
    latent, told = source.recipe.format, getattr(source, "made_with", {})
    tolerance = getattr(source, "tolerance", 0.0)
    channel = "channel" if latent.vocabulary is None else "codebook"
    if channel not in latent.axes:
        return f"has no axis `{channel}` among {list(latent.axes)}: statistics are kept along it"
    if latent.axes[0] == "draw":
        return "says an axis `draw` of its own: `draws` of the spec makes it"
    if not callable(getattr(source, "close", None)):
        return "has no method `close`"
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        return f"states the tolerance `{tolerance}`, which is no number from 0 on"
    if not isinstance(told, Mapping) or not all(isinstance(name, str) for name in told):
        return "states `made_with` that is no mapping from names"
    wrong = [name for name, value in told.items() if not _is_plain(value)]
    if wrong:
        return f"states `made_with` of which {name_some(wrong)} is no text, finite number or truth value"
    return next(
        (
            f"has the parameter `{name}` of {value}"
            for name, value in source.recipe.parameters.items()
            if not _is_plain(value)
        ),
        "",
    )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
