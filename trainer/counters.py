"""Random numbers that are a pure function of what they are for: no generator is advanced.

Dimensions: B images.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniform_numbers(
    seed: int, image_ids: Sequence[str], draw: int, n_numbers: int, *, purpose: str = ""
) -> NDArray[np.float64]:
    """[B, n_numbers] in [0, 1): the image's stream, read from a position that the draw decides.

    Args:
        seed: 0 to 2⁶⁴ - 1.
        draw: 0 to 2³² - 1.
        purpose: at most 16 characters. Each has streams of its own, so that a new one leaves the numbers of the
            others as they are.

    Source: SplitMix64, Steele et al., OOPSLA 2014, figure 17; keyed by BLAKE2b of seed, purpose and image ID.
    """
    key, person = seed.to_bytes(8, "little"), purpose.encode()
    digests = b"".join(
        hashlib.blake2b(name.encode(), digest_size=8, key=key, person=person).digest() for name in image_ids
    )
    streams = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    counters = np.arange(n_numbers, dtype=np.uint64) + np.uint64(draw * n_numbers + 1)
    return _fractions(split_mix(streams[:, None], counters))


def normal_numbers(stream: int, n_numbers: int) -> NDArray[np.float64]:
    """The first numbers of a stream, normally distributed, [n_numbers].

    Source: Box and Muller, Annals of Mathematical Statistics 29 (1958), page 610.
    """
    counters = np.arange(1, 2 * n_numbers + 1, dtype=np.uint64)
    first, second = _fractions(split_mix(np.uint64(stream), counters)).reshape(2, n_numbers)
    return as_normal(first, second)


def as_normal(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """One normally distributed number of two uniform ones."""
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    return normal


def split_mix(streams: NDArray[np.uint64] | np.uint64, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for each counter of each stream; the two are broadcast."""
    bits = streams + counters * GOLDEN_GAMMA
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


def _fractions(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    fractions: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fractions
