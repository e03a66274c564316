"""Intervals by drawing teachers, seeds and test images again from those that were there.

Dimensions: T teachers, S seeds, I images, A arrays.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
GENERATOR_SEED = 20260
DRAWN_AT_ONCE = 4_000_000
"""Images of resamples in memory at one time."""


def bootstrap_means(
    arrays: Sequence[NDArray[np.float64]], *, confidence: float, resamples: int = RESAMPLES
) -> list[tuple[float, float]]:
    """Percentile intervals of the means of arrays [T, S, I], each axis drawn again with replacement.

    The axes are crossed: one draw of images serves every run and every array, so that what is paired stays paired, and
    one draw of teachers serves all seeds. The generator's seed is fixed: the same arrays give the same intervals.

    It is a cross-check, not exact: what teachers, seeds and images do to each other is counted two or three times,
    which makes it wide; of n teachers it knows n - 1 of n parts of their variance, which makes it narrow where three
    teachers differ much. `bench/study_statistics.py` prints its coverage.

    Args:
        arrays: each [T, S, I] with an I of its own or shared; [T, S, 1] for scores of which nothing is known by image.

    Source: Owen, The pigeonhole bootstrap (2007), sections 2 and 3; Efron and Tibshirani (1993), section 13.3.
    """
    means: list[NDArray[np.float64]] = [np.empty(0)] * len(arrays)
    for n_images in {array.shape[2] for array in arrays}:
        alike = [number for number, array in enumerate(arrays) if array.shape[2] == n_images]
        runs = np.concatenate([arrays[number].reshape(-1, n_images) for number in alike])
        parts = np.split(
            _means_of_drawn_images(runs, resamples),
            np.cumsum([arrays[number].shape[0] * arrays[number].shape[1] for number in alike])[:-1],
            axis=1,
        )
        for number, part in zip(alike, parts, strict=True):
            n_teachers, n_seeds = arrays[number].shape[:2]
            generator = np.random.default_rng([GENERATOR_SEED, n_teachers, n_seeds])
            teachers = generator.multinomial(n_teachers, [1 / n_teachers] * n_teachers, resamples) / n_teachers
            seeds = generator.multinomial(n_seeds, [1 / n_seeds] * n_seeds, resamples) / n_seeds
            grid = part.reshape(resamples, n_teachers, n_seeds)
            means[number] = np.einsum("rts,rt,rs->r", grid, teachers, seeds)
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]
    return [(float(low), float(high)) for low, high in (np.quantile(mean, bounds) for mean in means)]


def _means_of_drawn_images(runs: NDArray[np.float64], resamples: int) -> NDArray[np.float64]:
    """The mean of each run [N, I] over each draw of images [resamples, N]."""
    n_images = runs.shape[1]
    if n_images == 1:
        return np.repeat(runs.T, resamples, axis=0)
    generator = np.random.default_rng([GENERATOR_SEED, n_images])
    runs_first = np.ascontiguousarray(runs.T, np.float32)
    means = np.empty((resamples, len(runs)))
    at_once = max(1, DRAWN_AT_ONCE // n_images)
    for start in range(0, resamples, at_once):
        n_drawn = min(at_once, resamples - start)
        drawn = generator.integers(n_images, size=(n_drawn, n_images), dtype=np.int32)
        places = drawn + n_images * np.arange(n_drawn, dtype=np.int32)[:, None]
        counts = np.bincount(places.ravel(), minlength=n_drawn * n_images).reshape(n_drawn, n_images)
        means[start : start + n_drawn] = counts.astype(np.float32) @ runs_first / n_images
    return means
