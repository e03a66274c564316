"""Whether a source keeps what a cache promises of it, measured on a few images before a build relies on it."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dla_cache.data.relief_digits import load_textures
from dla_cache.errors import DlaError, ImageError, LatentShapeError, NonFiniteLatentError, SourceError
from dla_cache.images import Pixels, centre_square, decode_image
from dla_cache.sources import Encoded, LatentSource, ignores_seeds
from dla_cache.sources.decoders import DecoderCalls, watch_decoders
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import LatentFormat, LatentSpec
from dla_cache.store.content import checked_latents

N_IMAGES = 4
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")

Latents = NDArray[np.generic]
Images = Mapping[str, Pixels]
"""Pixels uint8 [3, H, W] of any size by image ID, two or more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that has to be true of every source, and what was measured of this one."""

    name: str
    holds: bool
    measured: str


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What was found of a source. If its latents are not what its recipe says, nothing else was measured."""

    source: str
    modality: str
    device: str
    n_images: int
    tolerance: float
    """That it states, see `LatentSource`."""
    claims: tuple[Claim, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(claim.name for claim in self.claims if not claim.holds)


def sample_images() -> dict[str, Pixels]:
    """Four pieces of two photos, uint8 [3, 160, 120]: for who has no images at hand."""
    photos = np.rint(load_textures() * 255).astype(np.uint8).transpose(2, 0, 1)
    halves = [half for photo in np.split(photos, 2, axis=1) for half in np.split(photo, 2, axis=2)]
    return {f"sample-{number}": np.ascontiguousarray(half) for number, half in enumerate(halves)}


def images_in(folder: Path) -> dict[str, Pixels]:
    """The first four images of a folder, by name.

    Raises:
        ImageError: if there are fewer than two, or one cannot be decoded.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    if len(files) < 2:
        raise ImageError(
            f"`{folder}` holds {len(files)} images, and a check compares images",
            hint="name a folder with two or more, or none: dla brings four of its own",
        )
    return {str(file.relative_to(folder)): decode_image(file.read_bytes(), file.name) for file in files[:N_IMAGES]}


def check_source(
    spec: LatentSpec,
    device: str,
    images: Images,
    *,
    open_source: Callable[[LatentSpec, str], LatentSource],
    on_call: Callable[[int, int], None] = lambda _done, _total: None,
) -> SourceCheck:
    """Measures every claim on a source, and a last one on the same source opened anew.

    Args:
        on_call: told after each call of the source how many of how many there were.

    Raises:
        SourceError: if the source cannot be opened, refuses an image, or fails.
    """
    n_calls = len(images) + 9
    with (
        closing(open_source(spec, device)) as source,
        watch_decoders(source, _guarded_names(source)) as decoders,
        _kept_random_states(),
    ):
        trial = _Trial(source, images, lambda done: on_call(done, n_calls))
        tolerance = float(getattr(source, "tolerance", 0.0))
        claims, base = _fits_recipe(trial)
        if base is not None:
            claims += _claims(trial, base, tolerance, decoders, ignores_seeds(source))
    if base is not None:
        del source, trial  # on many a device there is no room for two
        with _kept_random_states():
            set_global_seeds(2)  # shows weights that are not loaded, but drawn
            with closing(open_source(spec, device)) as anew:
                again = _Trial(anew, images, lambda _: on_call(n_calls, n_calls)).encode()
                claims.append(_same("a newly opened source gives the same", anew.recipe.format, [(base, again)], 0.0))
    return SourceCheck(spec.source, spec.modality.value, device, len(images), tolerance, tuple(claims))


def _guarded_names(source: LatentSource) -> set[str]:
    """Methods that the source's row says must not be called, such as a vocoder's."""
    places = getattr(getattr(source, "row", None), "guard", ())
    return {place.rpartition(".")[2] for place in places} - {"forward"}


class _Trial:
    """A source, the views of a few images, and what its calls did to the global random states."""

    def __init__(self, source: LatentSource, images: Images, on_call: Callable[[int], None]) -> None:
        self.source, self.format = source, source.recipe.format
        self.image_ids = list(images)
        self.pixels = np.stack([centre_square(image, source.recipe.source_view_size) for image in images.values()])
        self.seeds = self.draw(0)
        self.touched: set[str] = set()
        self.captions: tuple[str, ...] = ()
        """Of the last call, if there were any."""
        self._on_call, self._n_calls = on_call, 0

    def draw(self, number: int) -> list[int]:
        """The seeds of the images, other ones for each number."""
        recipe = self.source.recipe
        return [sample_seed(recipe.seed, recipe.modality.value, image_id, number) for image_id in self.image_ids]

    def encode(self, pixels: Pixels | None = None, seeds: Sequence[int] | None = None) -> Latents:
        """What the source makes of all images with their own seeds, or of others."""
        before = random_states()
        try:
            put_out = self.source.encode(
                (self.pixels if pixels is None else pixels).copy(), list(self.seeds if seeds is None else seeds)
            )
        except DlaError:
            raise
        except torch.OutOfMemoryError as error:
            raise SourceError(
                f"the device has not enough memory for {len(self.image_ids)} images of `{self.source.recipe.source}`",
                hint="check it with a folder of two images, or a larger device; a build halves its batches by itself",
            ) from error
        except Exception as error:  # whatever a stranger's source does
            raise SourceError(f"`{self.source.recipe.source}` fails: {error!r}", hint="mend its `encode`") from error
        self.touched |= {name for name, state in random_states().items() if before[name] != state}
        if isinstance(put_out, Encoded):
            if put_out.rejected:
                place, reason = next(iter(put_out.rejected.items()))
                raise SourceError(
                    f"the source refuses `{self.image_ids[place % len(self.image_ids)]}`: {reason}",
                    hint="check it on other images",
                )
            self.captions = tuple(put_out.captions)
            put_out = put_out.latents
        self._n_calls += 1
        self._on_call(self._n_calls)
        try:
            latents = np.array(put_out)
        except ValueError as error:  # a list of arrays of several shapes
            raise LatentShapeError(
                f"the source put out latents of several shapes: {sorted({np.shape(latent) for latent in put_out})}",
                hint="the source and its recipe disagree: mend the source",
            ) from error
        n_images = len(self.pixels if pixels is None else pixels)
        if self._n_calls > 1 and latents.shape != (n_images, *self.format.shape):  # the first call makes a claim of it
            raise LatentShapeError(
                f"the source put out latents of shape {list(latents.shape)} for {n_images} images",
                hint=f"they are to be {[n_images, *self.format.shape]}, for one image, too: mend the source",
            )
        return latents


def _fits_recipe(trial: _Trial) -> tuple[list[Claim], Latents | None]:
    """The claims without which none of the others can be measured, and the latents if they hold."""
    latents = trial.encode()
    what = f"{' x '.join(map(str, latents.shape[1:]))} {latents.dtype}"
    try:
        checked_latents(latents, trial.format, trial.image_ids)
    except LatentShapeError as error:
        return [Claim("shape and dtype are those of the recipe", False, error.message)], None
    except NonFiniteLatentError as error:
        fits = Claim("shape and dtype are those of the recipe", True, what)
        return [fits, Claim("every number can be stored", False, error.message)], None
    fits = Claim("shape and dtype are those of the recipe", True, f"{what}, stored as {trial.format.dtype}")
    largest = f"the largest is {np.abs(latents.astype(np.float64)).max():.4g}"
    return [fits, Claim("every number can be stored", True, largest)], latents


def _claims(
    trial: _Trial, base: Latents, tolerance: float, decoders: DecoderCalls, ignores_seed: bool
) -> Iterator[Claim]:
    latent, count = trial.format, len(base)
    alone = [trial.encode(trial.pixels[place : place + 1], [trial.seeds[place]]) for place in range(count)]
    yield _same("a batch of one gives the same", latent, [(base, np.concatenate(alone))], tolerance)
    reversed_ = trial.encode(trial.pixels[::-1], trial.seeds[::-1])[::-1]
    yield _same("another order gives the same", latent, [(base, reversed_)], tolerance)
    yield _same("other neighbours give the same", latent, list(_among_others(trial, base)), tolerance)
    yield _same("a second call gives the same", latent, [(base, trial.encode())], 0.0)
    redrawn = trial.encode(seeds=trial.draw(1))
    if ignores_seed:
        yield _same("another seed gives the same: it says that it ignores seeds", latent, [(base, redrawn)], tolerance)
    else:
        yield _others("another seed gives another latent", latent, list(zip(base, redrawn, strict=True)), tolerance)
    one_seed = trial.encode(seeds=[trial.seeds[0]] * count)
    places = [(one, other) for one in range(count) for other in range(one)]
    if (
        len(set(trial.captions)) > 1
    ):  # of two images with one caption a pipeline that reads nothing else makes one thing
        places = [(one, other) for one, other in places if trial.captions[one] != trial.captions[other]]
    pairs = [(one_seed[one], one_seed[other]) for one, other in places]
    yield _others("another image gives another latent", latent, pairs, tolerance)
    set_global_seeds(1)
    yield _same("global seeds change nothing", latent, [(base, trial.encode())], 0.0)
    touched = ", ".join(sorted(trial.touched)) or f"none of {', '.join(random_states())}"
    yield Claim("global random states are left alone", not trial.touched, f"touched: {touched}")
    yield _decoder_claim(decoders, is_declared=bool(getattr(getattr(trial.source, "row", None), "decodes", False)))


def _decoder_claim(decoders: DecoderCalls, *, is_declared: bool) -> Claim:
    """
    Args:
        is_declared: whether the row says that the source decodes, as one does that encodes again what it decoded.
    """
    called = ", ".join(f"{name} {calls} times" for name, calls in sorted(decoders.calls.items()))
    if is_declared:
        return Claim("it decodes, as it says", True, called or "0 calls")
    found = [f"{name}{' (replaced)' if name in decoders.replaced else ''}" for name in sorted(decoders.watched)]
    return Claim(
        "no decoder is called", not decoders.total, called or f"0 calls: {', '.join(found) or 'it holds none'}"
    )


def _among_others(trial: _Trial, base: Latents) -> Iterator[tuple[Latents, Latents]]:
    """The latents of every other image, its neighbours as they were, and as negatives with other seeds."""
    other_seeds = trial.draw(2)
    for first in (0, 1):
        kept = np.arange(len(base)) % 2 == first
        pixels = np.where(kept[:, None, None, None], trial.pixels, 255 - trial.pixels)
        seeds = [own if stays else other for own, other, stays in zip(trial.seeds, other_seeds, kept, strict=True)]
        yield base[kept], trial.encode(pixels, seeds)[kept]


def _same(name: str, latent: LatentFormat, pairs: Sequence[tuple[Latents, Latents]], tolerance: float) -> Claim:
    largest = max(difference(one, other, latent) for one, other in pairs)
    allowed = f"{tolerance:.2g} is allowed" if tolerance else "none is allowed"
    return Claim(name, largest <= tolerance, f"largest difference {_told(largest, latent)}, {allowed}")


def _others(name: str, latent: LatentFormat, pairs: Sequence[tuple[Latents, Latents]], tolerance: float) -> Claim:
    """Of codes one pair is enough: a captioner may rightly say the same of two images."""
    differences = [difference(one, other, latent) for one, other in pairs]
    if latent.vocabulary is not None:
        return Claim(name, max(differences) > tolerance, f"largest difference {_told(max(differences), latent)}")
    return Claim(name, min(differences) > tolerance, f"smallest difference {_told(min(differences), latent)}")


def _told(number: float, latent: LatentFormat) -> str:
    return f"{number:.2g}" if latent.vocabulary is None else f"{100 * number:.3g} % of an image's codes"


def difference(one: Latents, other: Latents, latent: LatentFormat) -> float:
    """The largest absolute difference of two arrays of latents; of codes the share that differs. 0 for equal bytes."""
    if one.shape == other.shape and one.tobytes() == other.tobytes():
        return 0.0
    if one.shape != other.shape:
        return float("inf")
    if latent.vocabulary is not None:
        return float((one != other).mean())
    largest = float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
    return max(largest, float(np.finfo(np.float32).tiny)) if np.isfinite(largest) else float("inf")


def random_states() -> dict[str, bytes]:
    """The state of every global random generator, as bytes that differ when it was drawn from or seeded."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": f"{kind}{np.asarray(keys).tolist()}{rest}".encode(),
        "python": repr(random.getstate()).encode(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = b"".join(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
    return states


def set_global_seeds(seed: int) -> None:
    """Seeds every global random generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Puts the global random generators back where they were, whatever the block does."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
