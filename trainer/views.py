"""Replayable augmentations: a view is the full record of its parameters.

A view is a pure function of (seed, image ID, draw). No generator is advanced, so neither the batch,
the worker nor the order matters, and a target stored for a view can be met with that very view later.

Dimensions: B images, H and W their sides in pixels.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from dla_cache.spec import StrictModel

N_RANDOM_NUMBERS = 5
"""Random numbers a view is made of: area, aspect, left, top, flip."""


class ViewConfig(StrictModel):
    """Distribution of views: a random resized crop of the whole original and a flip.

    Without a crop, as by default, a view is the centre square that evaluation sees.
    """

    scale_min: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest area of the crop, as a fraction of the image."""
    scale_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    ratio_min: Annotated[float, Field(gt=0)] = 1.0
    """Smallest aspect of the crop: width over height in pixels, whatever the image's own."""
    ratio_max: Annotated[float, Field(gt=0)] = 1.0
    horizontal_flip: bool = False
    """Whether every second view, on average, is mirrored. Latents stay those of the whole image."""
    count: Annotated[int, Field(gt=0)] | None = None
    """Different views of an image, seen in turn, one an epoch; the run's seed says which is first. None: a new one
    each epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Of the views; that of the run when absent. Runs of different seeds with one here see the same views."""
    scaled_decode: bool = False
    """Whether a JPEG with far more pixels than views need is decoded at 1/2, 1/4 or 1/8 of its size: several times
    faster, and not to the pixel the same. Evaluation decodes all of it."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.scale_min > self.scale_max or self.ratio_min > self.ratio_max:
            raise ValueError("`scale_min` and `ratio_min` may not exceed their maxima")
        return self

    def number_in(self, epoch: int, seed: int) -> int:
        """Which view of each image a run of a seed sees in an epoch; the draw of its latents goes with it."""
        return epoch if self.count is None else (seed + epoch) % self.count

    @property
    def is_random(self) -> bool:
        """Whether views of an image differ."""
        return self.is_cropped or self.horizontal_flip

    @property
    def is_cropped(self) -> bool:
        """Whether views are crops."""
        return not self.scale_min == self.scale_max == self.ratio_min == self.ratio_max == 1


@dataclass(frozen=True, slots=True)
class Views:
    """One view for each image of a batch; the box in fractions of the image's sides."""

    left: NDArray[np.float64]
    top: NDArray[np.float64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    flip: NDArray[np.bool_]
    """Whether the crop is mirrored left to right; the box is that of the unmirrored image."""

    def of(self, places: Sequence[int]) -> Self:
        """The views of some of the images, in the order of `places`."""
        return type(self)(*(getattr(self, field.name)[places] for field in fields(self)))


def draw_views(
    seed: int, image_ids: Sequence[str], draw: int, config: ViewConfig, aspects: NDArray[np.float64] | float = 1.0
) -> Views:
    """The `draw`-th view of each image.

    The crop's area and log aspect are uniform; a side that would leave the image is cut to it, and
    the other one as far as the aspect would leave its bounds. The usual rejection sampling would need
    another number of random numbers for every image.

    Args:
        seed: of the run's views, 0 to 2⁶⁴ - 1.
        draw: usually the epoch; 0 to 2³² - 1.
        aspects: [B], width over height of each image in pixels; 1 where all are square.
    """
    area, aspect, left, top, flip = _uniform(seed, image_ids, draw).T
    scale = config.scale_min + area * (config.scale_max - config.scale_min)
    log_min, log_max = math.log(config.ratio_min), math.log(config.ratio_max)
    ratio = np.exp(log_min + aspect * (log_max - log_min))
    ratio = ratio / aspects  # now of fractions of the image's sides
    width = np.minimum(np.sqrt(scale * ratio), 1.0)
    height = np.minimum(np.sqrt(scale / ratio), 1.0)
    width = np.minimum(width, height * (config.ratio_max / aspects))
    height = np.minimum(height, width / (config.ratio_min / aspects))
    is_mirrored = (flip < 0.5) & config.horizontal_flip
    return Views(left * (1 - width), top * (1 - height), width, height, is_mirrored)


def apply_views(pixels: Tensor, views: Views, size: int) -> Tensor:
    """Each image's view, resized to a square by antialiased bilinear interpolation.

    Rows and columns are interpolated by one matrix each, computed in float64: the view of the whole
    image at its own size is exact, and a sample does not depend on the others of its batch.

    Args:
        pixels: [B, 3, H, W], uint8 or float.
        size: side of the result in pixels.

    Returns:
        [B, 3, size, size] float32, in the units of `pixels`.
    """
    height, width = pixels.shape[-2:]
    rows = _interpolation(views.top, views.height, height, size)
    columns = _interpolation(views.left, views.width, width, size)
    columns = np.where(views.flip[:, None, None], columns[:, ::-1], columns)
    rows_BSH = torch.from_numpy(rows).to(pixels.device, torch.float32)[:, None]
    columns_BWS = torch.from_numpy(columns).to(pixels.device, torch.float32).transpose(1, 2)[:, None]
    return rows_BSH @ pixels.float() @ columns_BWS


def view_images(images: Sequence[NDArray[np.uint8]], views: Views, size: int) -> Tensor:
    """`apply_views` for images of any sizes, those of one size in one go.

    Args:
        images: B arrays uint8 [3, H, W].
        size: side of the result in pixels.

    Returns:
        [B, 3, size, size] float32, in [0, 255].
    """
    places_of: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(images):
        places_of.setdefault(pixels.shape, []).append(place)
    shown = torch.empty(len(images), 3, size, size)
    for places in places_of.values():
        pixels_BCHW = torch.from_numpy(np.stack([images[place] for place in places]))
        shown[places] = apply_views(pixels_BCHW, views.of(places), size)
    return shown


def _interpolation(start: NDArray[np.float64], extent: NDArray[np.float64], n: int, size: int) -> NDArray[np.float64]:
    """Weights [B, size, n] that read `size` values from the part [start, start + extent] of `n` pixels."""
    step = extent[:, None, None] * n / size  # source pixels for each target pixel
    centre = start[:, None, None] * n + (np.arange(size)[:, None] + 0.5) * step
    # A triangle as wide as the step when shrinking (antialias), one pixel wide when enlarging.
    reach = np.maximum(step, 1.0)
    distance = np.abs(np.arange(n) + 0.5 - centre)
    weights = np.maximum(0.0, 1.0 - distance / reach)
    normalised: NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return normalised


def _uniform(seed: int, image_ids: Sequence[str], draw: int) -> NDArray[np.float64]:
    """[B, N_RANDOM_NUMBERS] in [0, 1): the image's stream, read from a position that the draw decides.

    Source: SplitMix64, Steele et al., OOPSLA 2014, figure 17; keyed by BLAKE2b of seed and image ID.
    """
    key = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, key=key).digest() for name in image_ids)
    streams = np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    counters = np.arange(N_RANDOM_NUMBERS, dtype=np.uint64) + np.uint64(draw * N_RANDOM_NUMBERS + 1)
    bits = streams[:, None] + counters * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    uniform: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform
