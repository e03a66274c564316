"""How numbers lie on disk, what a reader makes of them, and how far that is from what was handed over.

    on disk             a reader gets
    float16, float32    the same
    bfloat16            float32: the 16 bits, as a uint16, are its upper half
    int8                float32: int8 * scale + offset of the channel, see `Quantisation`
    codes               the same

Storing what was read gives the same bytes again.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.spec import LatentFormat, Quantisation
from dla_cache.store.layout import stored_dtype
from dla_cache.store.statistics import StoredError

STEPS = 254
"""From the lowest number of a channel, stored as -127, to its highest, stored as 127."""

SAMPLES_AT_ONCE = 32
"""So few that what is computed of them stays in the processor's cache."""

EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits that are all set in infinity and NaN alone."""

ERRORS_AT_ONCE = 2**16
"""Numbers whose error is measured at a time: few enough for a processor's cache."""

FLOAT32_BITS = 24
"""Significant bits of a float32."""

SCALE_BITS = 16
"""Significant bits of a scale: an int8 has 7 at most, so that their product fits into a float32."""


def encode_numbers(latents: NDArray[np.generic], latent: LatentFormat) -> NDArray[np.generic]:
    """What is stored of latents [n, *shape]: the same shape in the dtype on disk, rounded to nearest, ties to even.

    The latents themselves where they have that dtype already.

    What the dtype cannot hold becomes infinity, an int8 -128; codes are taken as they are.
    """
    stored = stored_dtype(latent)
    with np.errstate(over="ignore", invalid="ignore"):
        if latent.quantisation is not None:
            scale, offset = _along_channels(latent, latent.quantisation, np.float64)
            steps = np.rint((latents.astype(np.float64) - offset) / scale)
            return np.where(np.abs(steps) <= STEPS // 2, steps, -128).astype(stored)
        if latent.dtype == "bfloat16":
            bits = latents.astype("<f4").view("<u4")
            # Half of the last bit that stays, less one if that bit is 0: a tie goes to the even one. NaN would wrap.
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            return np.where(np.isnan(latents), 0x7FC0, rounded).astype(stored)
        return latents.astype(stored, copy=False)


def decode_numbers(stored: NDArray[np.generic], latent: LatentFormat) -> NDArray[np.generic]:
    """What a reader gets of numbers on disk [n, *shape]: the same shape in `LatentFormat.read_dtype`."""
    if latent.quantisation is not None:
        scale, offset = _along_channels(latent, latent.quantisation, np.float32)
        numbers = stored.astype(np.float32)
        # As large as a sample: NumPy is slow where the last axis is the one that scales run along, and short.
        numbers *= np.ascontiguousarray(np.broadcast_to(scale, latent.shape))
        numbers += np.ascontiguousarray(np.broadcast_to(offset, latent.shape))
        return numbers
    if latent.dtype == "bfloat16":
        bits = stored.astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    return stored


def to_payloads(stored: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The bytes of samples [n, *shape], uint8 [n, payload_bytes]."""
    return np.ascontiguousarray(stored).reshape(len(stored), math.prod(stored.shape[1:])).view(np.uint8)


def from_payloads(payloads: NDArray[np.uint8], latent: LatentFormat) -> NDArray[np.generic]:
    """What a reader gets of payloads uint8 [n, payload_bytes]: [n, *shape] in `LatentFormat.read_dtype`."""
    stored = np.ascontiguousarray(payloads).view(stored_dtype(latent))
    return decode_numbers(stored.reshape(len(payloads), *latent.shape), latent)


def are_storable(stored: NDArray[np.generic], latent: LatentFormat) -> NDArray[np.bool_]:
    """Of which samples `encode_numbers` has made numbers that stand for those it was given, [n] of [n, *shape]."""
    good = np.empty(len(stored), bool)
    others = tuple(range(1, stored.ndim))
    for start in range(0, len(stored), SAMPLES_AT_ONCE):
        samples = stored[start : start + SAMPLES_AT_ONCE]
        if latent.quantisation is not None:
            fits = samples != -128
        elif latent.dtype in EXPONENT:  # by its bits, a tenth of the time that NumPy takes for a float16
            fits = (samples.view("<u2") & EXPONENT[latent.dtype]) != EXPONENT[latent.dtype]
        else:
            fits = np.isfinite(samples)
        good[start : start + SAMPLES_AT_ONCE] = fits.all(axis=others)
    return good


def quantise(minimum: NDArray[np.float64], maximum: NDArray[np.float64]) -> Quantisation:
    """What int8 have to stand for so that they span the ranges of C channels, and nothing is cut off.

    A scale is raised to four times the distance of float32 numbers in its channel if it were smaller: below that two
    int8 would stand for one float32.

    Args:
        minimum, maximum: float32 values, [C].

    Raises:
        ValueError: if a range is too wide for float32.
    """
    offset = (minimum / 2 + maximum / 2).astype(np.float32).astype(np.float64)
    _, exponent = np.frexp(np.maximum(np.abs(minimum), np.abs(maximum)))
    smallest = np.maximum(4 * np.ldexp(1.0, exponent - FLOAT32_BITS), np.finfo(np.float32).tiny)
    mantissa, exponent = np.frexp(np.maximum((maximum - minimum) / STEPS, smallest))
    scale = np.ldexp(np.ceil(np.ldexp(mantissa, SCALE_BITS)), exponent - SCALE_BITS)
    return Quantisation(scale=tuple(scale.tolist()), offset=tuple(offset.tolist()))


def measure_error(handed: NDArray[np.generic], stored: NDArray[np.generic], latent: LatentFormat) -> StoredError | None:
    """How far stored numbers [n, *shape] are from those that were handed over, as a reader gets them.

    None for codes, and where nothing was lost.
    """
    if latent.kind == "codes" or (handed.dtype == stored.dtype and latent.quantisation is None):
        return None
    n_channels = latent.shape[latent.channel_axis]
    of_channel = math.prod(latent.shape) // n_channels
    squares, largest = np.zeros(n_channels), np.zeros(n_channels)
    at_once = max(ERRORS_AT_ONCE // math.prod(latent.shape), 1)
    for start in range(0, len(handed), at_once):
        some = slice(start, start + at_once)
        dtype = np.result_type(handed, np.float32)
        error = np.abs(decode_numbers(stored[some], latent).astype(dtype) - handed[some])
        by_channel = np.moveaxis(error, latent.channel_axis + 1, 1).reshape(len(error), n_channels, of_channel)
        largest = np.maximum(largest, by_channel.max(2).max(0))
        wide = by_channel.astype(np.float64)
        squares += np.einsum("ncv,ncv->nc", wide, wide).sum(0)
    if not largest.any():
        return None
    return StoredError(
        count=len(handed),
        rms=tuple(np.sqrt(squares / (len(handed) * of_channel)).tolist()),
        max_abs=tuple(largest.tolist()),
    )


@dataclass(frozen=True, slots=True)
class Rounding:
    """What the numbers of a modality lost when they were stored."""

    stored_as: str
    rms: tuple[float, ...]
    """Root of the mean square error of each channel."""
    max_abs: tuple[float, ...]
    """Largest error of each channel."""
    share_of_std: float | None
    """Root mean square, over channels, of the error in standard deviations of the channel; None if a channel that lost
    something has no spread left."""
    worst_channel: int
    """Where that share is largest."""

    @property
    def decibels(self) -> float | None:
        """Of the standard deviation over the error: 6 for each bit."""
        return None if self.share_of_std is None else float(-20 * np.log10(self.share_of_std))

    @property
    def in_words(self) -> str:
        """`error 0.87 % of the standard deviation (41 dB), at most 0.027`."""
        largest = f"at most {max(self.max_abs):.2g}"
        if self.share_of_std is None or self.decibels is None:
            return f"error {largest}, channel {self.worst_channel} has no spread left"
        return f"error {100 * self.share_of_std:.2g} % of the standard deviation ({self.decibels:.0f} dB), {largest}"

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "decibels": self.decibels}


def summarise_error(error: StoredError, std: NDArray[np.float64], latent: LatentFormat) -> Rounding:
    """The error of a whole modality in figures.

    Args:
        std: of the stored numbers, [C].
    """
    rms = np.array(error.rms)
    shares = np.divide(rms, std, out=np.where(rms > 0, np.inf, 0.0), where=std > 0)
    whole = float(np.sqrt((shares**2).mean()))
    return Rounding(latent.dtype, error.rms, error.max_abs, whole if np.isfinite(whole) else None, int(shares.argmax()))


def _along_channels(latent: LatentFormat, quantisation: Quantisation, dtype: Any) -> Sequence[NDArray[Any]]:
    """Scale and offset, each shaped to stand beside a sample."""
    shape = [1] * len(latent.shape)
    shape[latent.channel_axis] = -1
    return [np.array(values, dtype).reshape(shape) for values in (quantisation.scale, quantisation.offset)]
