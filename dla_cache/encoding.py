"""One source at work: what it is called with, what it put out, and which of that is a latent."""

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import DlaError, LatentShapeError, SourceError, name_some
from dla_cache.images import Pixels
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import LatentFormat, Recipe
from dla_cache.store.content import find_unstorable

if TYPE_CHECKING:
    from dla_cache.sources import Encoded, LatentSource

LIBRARIES = ("torch", "diffusers", "transformers")
"""Whose versions are recorded with every shard, where the source has loaded them."""


@dataclass(frozen=True, slots=True)
class PutOut:
    """What a source put out for one batch, unchecked."""

    calls: tuple[tuple["Encoded", ...], ...]
    """By draw, and then as many as it took to get through the batch."""
    images_per_call: int
    out_of_memory: int
    """How often the device had run out of memory by then, in this run."""
    seconds: float
    """Of the device."""


@dataclass(frozen=True, slots=True)
class Latents:
    """What became of the images of one batch."""

    values: NDArray[np.generic]
    """Raw, [n, *shape]; rows of images in `bad` hold anything."""
    bad: Mapping[int, str]
    """Place in the batch → why there is no latent."""
    captions: tuple[str, ...]
    """[n], or none."""


class Encoder:
    """A source, called with the same number of images every time, until its device runs out of memory."""

    def __init__(self, source: "LatentSource", batch_size: int, *, shares_pixels: bool = False) -> None:
        """
        Args:
            shares_pixels: whether another source is asked with the same pixels afterwards.
        """
        self.source = source
        self.recipe: Recipe = source.recipe
        self.batch_size = batch_size
        """Images per call: what the user said, halved as often as the memory ran out."""
        self.out_of_memory = 0
        # What a source does to its pixels, the next draw and the next source must not see. NumPy is kept from writing;
        # torch passes over that, with a warning that is of no use to anybody here.
        self._needs_copies = shares_pixels or self.recipe.format.n_draws > 1
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    @property
    def modality(self) -> str:
        return self.recipe.modality.value

    @property
    def made_with(self) -> dict[str, str | int | float | bool]:
        """Versions of libraries, and what the source says of itself: provenance outside the recipe."""
        loaded = ((name, getattr(sys.modules.get(name), "__version__", None)) for name in LIBRARIES)
        versions = {name: str(version) for name, version in loaded if version is not None}
        torch = sys.modules.get("torch")
        of_torch = {} if torch is None else _settings_of(torch)
        return {**versions, **of_torch, **getattr(self.source, "made_with", {})}

    def seeds_of(self, image_id: str) -> list[int]:
        """A seed for each draw."""
        draws = range(self.recipe.format.n_draws)
        return [sample_seed(self.recipe.seed, self.modality, image_id, draw) for draw in draws]

    def put_out(self, pixels: Pixels, seeds: Sequence[Sequence[int]], image_ids: Sequence[str]) -> PutOut:
        """What the source makes of a batch.

        Args:
            pixels: [B, 3, S, S], behind the images anything of that shape.
            seeds: B for each draw.
            image_ids: of the n ≤ B images at its beginning.

        Raises:
            SourceError: naming the images, if the source fails, or its device cannot hold one image.
        """
        while (put_out := self._try(pixels, seeds, image_ids)) is None:
            self.out_of_memory += 1
            if self.batch_size == 1:
                raise SourceError(
                    f"the device has not enough memory for one image of `{self.modality}`: `{image_ids[0]}`",
                    hint="end what else runs there, take a larger device, or a source with a smaller view or dtype",
                )
            self.batch_size //= 2
            _empty_cache()
        return put_out

    def _try(self, pixels: Pixels, seeds: Sequence[Sequence[int]], image_ids: Sequence[str]) -> PutOut | None:
        """None if the memory ran out. What the failed call held is free again when this has returned."""
        started = time.perf_counter()
        try:
            calls = tuple(tuple(self._calls(pixels, of_draw, len(image_ids))) for of_draw in seeds)
        except DlaError:
            raise
        except Exception as error:  # whatever a source's library raises
            if _is_out_of_memory(error):
                return None
            raise SourceError(
                f"`{self.recipe.source}` failed for {name_some(image_ids)}: {error!r}",
                hint="what is committed stays; look at these images and at the source's parameters, then run it again",
            ) from error
        return PutOut(calls, self.batch_size, self.out_of_memory, time.perf_counter() - started)

    def _calls(self, pixels: Pixels, seeds: Sequence[int], n_images: int) -> Iterator["Encoded"]:
        from dla_cache.sources import Encoded

        size = self.batch_size
        for start in range(0, n_images, size):
            if len(pixels) == size:
                seen, of_seen = pixels.copy() if self._needs_copies else pixels.view(), seeds
            else:
                places = np.arange(start, start + size).clip(max=n_images - 1)
                seen, of_seen = pixels[places], [seeds[place] for place in places]
            seen.flags.writeable = False
            put_out = self.source.encode(seen, of_seen)
            encoded = put_out if isinstance(put_out, Encoded) else Encoded(put_out)
            # A source may use its memory again.
            yield replace(encoded, latents=_copied(encoded.latents), rejected=dict(encoded.rejected))


def _copied(latents: Any) -> Any:
    """An array, or a list of arrays where a source has put out one of each image.

    Raises:
        LatentShapeError: if it is an array with a mask, which a store cannot keep.
    """
    if isinstance(latents, np.ma.MaskedArray):
        raise LatentShapeError(
            "the source put out an array with a mask, which a store cannot keep",
            hint="fill it, or reject the image: see docs/guides/own-source.md",
        )
    return latents.copy() if isinstance(latents, np.ndarray) else [np.array(latent) for latent in latents]


def _settings_of(torch: Any) -> dict[str, str | int | float | bool]:
    """Of the whole process, which round what is computed in another way."""
    return {"threads": torch.get_num_threads(), "float32_matmul": torch.get_float32_matmul_precision()}


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # who has not loaded it has not raised it
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _empty_cache() -> None:
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_latents(put_out: PutOut, latent_format: LatentFormat, image_ids: Sequence[str]) -> Latents:
    """The latents of n images, with several draws along axis 1, and what is wrong with single ones.

    Raises:
        LatentShapeError: if the source put out something else than its recipe declares for all of them.
    """
    bad: dict[int, str] = {}
    draws = []
    for calls in put_out.calls:
        parts = []
        for number, encoded in enumerate(calls):
            first = number * put_out.images_per_call
            ids = image_ids[first : first + put_out.images_per_call]
            values, wrong = _of_call(encoded.latents, latent_format.of_one_draw, put_out.images_per_call, ids)
            parts.append(values)
            wrong |= {place: reason for place, reason in encoded.rejected.items() if place < len(ids)}
            bad |= {first + place: reason for place, reason in wrong.items()}
        draws.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
    captions = tuple(caption for encoded in put_out.calls[0] for caption in encoded.captions)[: len(image_ids)]
    values = draws[0] if latent_format.n_draws == 1 and "draw" not in latent_format.axes else np.stack(draws, axis=1)
    return Latents(values, dict(sorted(bad.items())), captions)


def _of_call(
    latents: Any, one_draw: LatentFormat, n_asked: int, image_ids: Sequence[str]
) -> tuple[NDArray[np.generic], dict[int, str]]:
    """The latents of the images at the beginning of a call, and why some are none."""
    if not isinstance(latents, np.ndarray):
        latents, bad = _stacked(latents, one_draw, image_ids)
        n_asked = len(latents)
    else:
        bad = {}
    if len(latents) != n_asked:
        raise LatentShapeError(
            f"the source put out latents of shape `{list(latents.shape)}`, its recipe declares"
            f" `{[n_asked, *one_draw.shape]}` for {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    values = latents[: len(image_ids)]
    problem, unstorable = find_unstorable(values, one_draw, image_ids)
    return values, dict.fromkeys(unstorable, f"the source put out {problem}") | bad


def _stacked(
    latents: Sequence[NDArray[np.generic]], one_draw: LatentFormat, image_ids: Sequence[str]
) -> tuple[NDArray[np.generic], dict[int, str]]:
    """One array of those that came as one an image; zeros stand for those of another shape."""
    fits = [latent.shape == one_draw.shape for latent in latents]
    if len(latents) < len(image_ids) or not any(fits):
        shapes = [list(latent.shape) for latent in latents[:3]]
        raise LatentShapeError(
            f"the source put out latents of shape {shapes}, its recipe declares `{list(one_draw.shape)}` for each of"
            f" {name_some(image_ids)}",
            hint="the source and its recipe disagree: mend the source",
        )
    blank = np.zeros_like(latents[fits.index(True)])
    whole = np.stack([latent if fit else blank for latent, fit in zip(latents, fits, strict=True)])
    return whole, {
        place: f"the source put out a latent of shape {list(latents[place].shape)}, not {list(one_draw.shape)}"
        for place, fit in enumerate(fits)
        if not fit and place < len(image_ids)
    }


def encode_batch(source: "LatentSource", image_ids: Sequence[str], pixels: Sequence[Pixels]) -> NDArray[np.generic]:
    """Checked raw latents of images outside a build, [n, *shape], as the source put them out.

    Args:
        pixels: uint8 [3, S, S] of each.

    Raises:
        SourceError: if the source fails, or has no latent for one of them.
    """
    encoder = Encoder(source, len(image_ids))
    draws = [list(of_draw) for of_draw in zip(*map(encoder.seeds_of, image_ids), strict=True)]
    latents = check_latents(encoder.put_out(np.stack(pixels), draws, image_ids), encoder.recipe.format, image_ids)
    for place, reason in latents.bad.items():
        raise SourceError(
            f"`{encoder.recipe.source}` has no latent for `{image_ids[place]}`: {reason}",
            hint="look at this image and at the source's parameters",
        )
    return latents.values
