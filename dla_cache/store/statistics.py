"""Moments of latents, and of the error of storing them, that merge: kept per shard, put together for any shards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dla_cache.spec import RecordModel


class SplitStatistics(RecordModel):
    """Per-channel moments of one split's images in one shard, as a commit record keeps them.

    Mean and variance rather than sum and sum of squares: the difference of two large sums has
    few digits left where the mean is large beside the spread.
    """

    count: Annotated[int, Field(gt=0)]
    """Images, not values."""
    mean: tuple[float, ...]
    variance: tuple[float, ...]
    """Of the population, over images and positions."""
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


class StoredError(RecordModel):
    """How far the stored latents of one shard are from those that were handed over, as its commit record keeps it.

    Measured once, when they were written: nothing can tell it later. Statistics, hashes and sums are those of the
    stored numbers and can be computed again.
    """

    count: Annotated[int, Field(gt=0)]
    """Images that were written, be it that some were removed since; not values."""
    rms: tuple[float, ...]
    """Per channel, root of the mean square, over images and positions."""
    max_abs: tuple[float, ...]
    """Per channel."""


@dataclass(frozen=True, slots=True)
class LatentStatistics:
    """Per-channel statistics of raw latents over a set of images; codebooks count as channels."""

    count: int
    """Images, not values."""
    mean: NDArray[np.float64]
    """[C]"""
    std: NDArray[np.float64]
    """[C], of the population."""
    minimum: NDArray[np.float64]
    """[C]"""
    maximum: NDArray[np.float64]
    """[C]"""


def measure(latents: NDArray[np.generic], channel_axis: int) -> SplitStatistics:
    """Statistics of latents [n, *shape], n > 0, accumulated in float64.

    Args:
        channel_axis: an axis of one sample, so without the leading one.
    """
    channels = np.moveaxis(latents, channel_axis + 1, 0)
    if math.prod(latents.shape[channel_axis + 2 :]) == 1:
        # Of channels that lie side by side NumPy adds up image by image, else pairwise. Another way to add would find
        # another last digit than is recorded.
        moments = [_moments(np.moveaxis(latents.astype(np.float64), channel_axis + 1, 0).reshape(len(channels), -1))]
    else:  # one after the other, since together they do not fit into a processor's cache
        moments = [_moments(channel.astype(np.float64, order="C").reshape(1, -1)) for channel in channels]
    mean, variance, minimum, maximum = (tuple(np.concatenate(parts).tolist()) for parts in zip(*moments, strict=True))
    return SplitStatistics(count=len(latents), mean=mean, variance=variance, minimum=minimum, maximum=maximum)


def _moments(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Mean, variance, minimum and maximum of each row, [C] of [C, n]; `values` is used up."""
    mean, minimum, maximum = values.mean(1), values.min(1), values.max(1)
    values -= mean[:, None]
    values *= values
    return mean, values.mean(1), minimum, maximum


def merge_statistics(parts: Sequence[SplitStatistics]) -> LatentStatistics:
    """The statistics of all parts together, whatever way the images were cut into parts.

    Every image has as many values as any other, so image counts weigh the parts.

    Source: law of total variance; Chan, Golub, LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979.
    """
    counts = np.array([part.count for part in parts], np.float64)
    means = np.array([part.mean for part in parts])
    variances = np.array([part.variance for part in parts])
    mean = np.average(means, axis=0, weights=counts)
    variance = np.average(variances + (means - mean) ** 2, axis=0, weights=counts)
    return LatentStatistics(
        count=sum(part.count for part in parts),
        mean=mean,
        std=np.sqrt(variance),
        minimum=np.min([part.minimum for part in parts], axis=0),
        maximum=np.max([part.maximum for part in parts], axis=0),
    )


def merge_errors(parts: Sequence[tuple[int, StoredError | None]]) -> StoredError | None:
    """The error of several shards together; None if nothing was lost in any.

    Args:
        parts: of each shard its number of images, and the error that its record keeps.
    """
    found = [error for _, error in parts if error is not None]
    if not found:
        return None
    counts = np.array([error.count if error is not None else n_images for n_images, error in parts], np.float64)
    nothing = np.zeros(len(found[0].rms))
    squares = np.array([np.square(error.rms) if error is not None else nothing for _, error in parts])
    return StoredError(
        count=int(counts.sum()),
        rms=tuple(np.sqrt(np.average(squares, axis=0, weights=counts)).tolist()),
        max_abs=tuple(np.max([error.max_abs for error in found], axis=0).tolist()),
    )
