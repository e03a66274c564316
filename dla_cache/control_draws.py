"""Latents that no generator made: noise, a vector a class, a random map of features.

Dimensions: n images, *shape of a latent, C channels, K codebooks, V codes, D features.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import LatentFormat
from dla_cache.store import LatentStore
from dla_cache.store.precision import STEPS

ROWS_AT_ONCE = 256
"""Latents that are read at a time to measure them."""

HIDDEN = 256
"""Width of the random map."""

Numbers = NDArray[np.generic]
Floats = NDArray[np.float64]


def generator_of(seed: int, modality: str, name: str) -> np.random.Generator:
    """What is drawn from for one image, class or matrix: nothing else has the same."""
    return np.random.Generator(np.random.Philox(sample_seed(seed, modality, name)))


class Marginals:
    """The distribution of the numbers of a modality over some images, each for itself."""

    def __init__(self, store: LatentStore, modality: str, splits: Sequence[str], *, by_place: bool = False) -> None:
        """
        Args:
            by_place: of each number of a latent; else of each channel or codebook over all places.
        """
        self.format = store.recipe(modality).format
        rows = store.rows_of(splits)
        if self.format.kind == "codes":
            self.cumulated = _count_codes(store, modality, rows)
        elif by_place:
            self.mean, self.std = measure_places(lambda: _read(store, modality, rows))
        else:
            found = store.statistics(modality, splits)
            self.mean, self.std = (along_channels(one, self.format) for one in (found.mean, found.std))

    def draw(self, rng: np.random.Generator) -> Numbers:
        """A latent [*shape] of independent numbers: normal, or codes as often as they are."""
        if self.format.kind == "codes":
            return self._draw_codes(rng)
        return self.scale(rng.standard_normal(self.format.shape))

    def draw_of(self, of_class: np.random.Generator, of_image: np.random.Generator, noise: float) -> Numbers:
        """A latent [*shape] of what is drawn for a class, alike in all draws, and of noise that is drawn for an image.

        Args:
            noise: in [0, 1]: of real numbers the share of the variance, of codes the share that is drawn anew.
        """
        latent, shape = self.format.of_one_draw, self.format.shape
        if latent.kind == "codes":
            codes = np.broadcast_to(self._draw_codes(of_class, latent), shape)
            return np.where(of_image.random(shape) < noise, self._draw_codes(of_image), codes)
        mixed = np.sqrt(1 - noise) * of_class.standard_normal(latent.shape)
        return self.scale(mixed + np.sqrt(noise) * of_image.standard_normal(shape))

    def scale(self, standard: Floats) -> Floats:
        """Standard numbers [*shape] with these means and deviations, and within what can be stored."""
        latent = self.mean + self.std * standard
        if self.format.quantisation is None:
            return latent
        step, middle = (
            along_channels(np.array(one), self.format)
            for one in (self.format.quantisation.scale, self.format.quantisation.offset)
        )
        return np.clip(latent, middle - STEPS // 2 * step, middle + STEPS // 2 * step)

    def _draw_codes(self, rng: np.random.Generator, latent: LatentFormat | None = None) -> NDArray[np.int64]:
        latent = latent or self.format
        shape = list(latent.shape)
        shape.insert(0, shape.pop(latent.channel_axis))
        # Whole numbers all the way, so that no rounding decides.
        drawn = [
            np.searchsorted(counts, rng.integers(0, counts[-1], shape[1:]), side="right") for counts in self.cumulated
        ]
        return np.moveaxis(np.stack(drawn), 0, latent.channel_axis)


def along_channels(values: Floats, latent: LatentFormat) -> Floats:
    """Values [C] shaped to stand beside a sample, as float32 has them.

    Their last digits depend on how the images were cut into shards.
    """
    shape = [1] * len(latent.shape)
    shape[latent.channel_axis] = -1
    return _rounded(values).reshape(shape)


def measure_places(batches: Callable[[], Iterator[Numbers]]) -> tuple[Floats, Floats]:
    """Mean and standard deviation [*shape] over the images of batches [n, *shape], which are gone over twice."""
    count, total = 0, np.zeros(())
    for batch in batches():
        count, total = count + len(batch), total + batch.sum(0, dtype=np.float64)
    mean, squares = total / count, np.zeros(())
    for batch in batches():
        squares = squares + ((batch.astype(np.float64) - mean) ** 2).sum(0)
    return _rounded(mean), _rounded(np.sqrt(squares / count))


class RandomMap:
    """Features through two random layers into the shape and the statistics of a latent.

    Standardised features [D] → Linear → tanh → Linear → standardised channel by channel over the training images, then
    with the mean and deviation of the real latents. In float64, so that what is stored does not depend on how many
    images are mapped at a time.
    """

    def __init__(
        self,
        features: LatentStore,
        series: str,
        measured: NDArray[np.int64],
        marginals: Marginals,
        seed: int,
        modality: str,
    ) -> None:
        """
        Args:
            series: of the features, real numbers.
            measured: rows of the training images there.
            marginals: of the real latents, which are real numbers, too.
        """
        self.features, self.series, self.marginals = features, series, marginals
        self.latent = marginals.format
        one_draw = self.latent.of_one_draw.shape
        n_features = int(np.prod(features.recipe(series).format.shape))
        inner, outer = (generator_of(seed, modality, layer) for layer in ("inner layer", "outer layer"))
        self.inner = inner.standard_normal((n_features, HIDDEN)) / np.sqrt(n_features)
        self.outer = outer.standard_normal((HIDDEN, *one_draw)).reshape(HIDDEN, -1) / np.sqrt(HIDDEN)
        mean, std = measure_places(lambda: _read(features, series, measured))
        self.feature_mean, self.feature_std = mean.ravel(), np.where(std > 0, std, 1).ravel()
        # Of each number of a latent, and from them of each channel, as the law of total variance has it.
        mean, std = measure_places(lambda: map(self._map, _read(features, series, measured)))
        others = tuple(axis for axis in range(mean.ndim) if axis != self.latent.channel_axis)
        of_channel = mean.mean(others, keepdims=True)
        variance = (std**2 + (mean - of_channel) ** 2).mean(others, keepdims=True)
        self.mean, self.std = of_channel, np.where(variance > 0, np.sqrt(variance), 1)

    def of_rows(self, rows: NDArray[np.int64]) -> Floats:
        """The latents [n, *shape] of rows of the features' store."""
        mapped = self._map(self.features.read(self.series, rows))
        return self.marginals.scale((mapped - self.mean) / self.std)

    def _map(self, features: Numbers) -> Floats:
        """[n, *shape] of features [n, ...], before they are standardised."""
        flat = features.reshape(len(features), -1).astype(np.float64)
        standard = (flat - self.feature_mean) / self.feature_std
        mapped = np.tanh(standard @ self.inner) @ self.outer
        return np.broadcast_to(
            mapped.reshape(len(features), *self._leading, *self.latent.of_one_draw.shape),
            (len(features), *self.latent.shape),
        )

    @property
    def _leading(self) -> tuple[int, ...]:
        return (1,) * (len(self.latent.shape) - len(self.latent.of_one_draw.shape))


def _rounded(values: Floats) -> Floats:
    return values.astype(np.float32).astype(np.float64)


def _read(store: LatentStore, modality: str, rows: NDArray[np.int64]) -> Iterator[Numbers]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield store.read(modality, rows[start : start + ROWS_AT_ONCE])


def _count_codes(store: LatentStore, modality: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each codebook has a code of at most this number, [K, V]."""
    latent = store.recipe(modality).format
    assert latent.vocabulary is not None
    counts = np.zeros((latent.shape[latent.channel_axis], latent.vocabulary), np.int64)
    for codes in _read(store, modality, rows):
        for codebook, of_codebook in enumerate(np.moveaxis(codes, latent.channel_axis + 1, 0)):
            counts[codebook] += np.bincount(of_codebook.ravel(), minlength=latent.vocabulary)
    return counts.cumsum(1)
