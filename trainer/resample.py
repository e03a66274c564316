"""Crop, resize and mirror in one: antialiased bilinear interpolation, the same to the bit in any batch, on any CPU.

A matrix product would be shorter, but is several times slower from 200 pixels on, and libraries sum it in an order of
their own. Here every value is a sum of products in one order, by operations that IEEE 754 fixes.
NumPy and not torch: it runs beside a training step, and torch would start as many threads for it as for the step.

Dimensions: B images, H and W their sides, S the side of the result, T taps: pixels that a value is read from.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.views import Views

Pixels = NDArray[np.uint8] | NDArray[np.float32]

PIXELS_AT_A_TIME = 2**16
"""Of all images that are worked on at once: more leave the processor's cache, fewer wait for Python."""


def crop_and_resize(pixels: Pixels, views: Views, size: int) -> NDArray[np.float32]:
    """The box of each view as a square, mirrored where the view is. The whole image at its own size is exact.

    Args:
        pixels: [B, 3, H, W].

    Returns:
        [B, 3, size, size], in the units of `pixels`.
    """
    n_images, n_channels, height, width = pixels.shape
    shown = np.empty((n_images, n_channels, size, size), np.float32)
    step = max(1, PIXELS_AT_A_TIME // (height * width))
    for start in range(0, n_images, step):
        chosen = slice(start, start + step)
        rows = find_taps(views.top[chosen], views.height[chosen], height, size)
        columns = find_taps(views.left[chosen], views.width[chosen], width, size).mirrored(views.flip[chosen])
        seen_BCHW = pixels[chosen, :, slice(*rows.span), slice(*columns.span)]
        n_seen, _, seen_height, seen_width = seen_BCHW.shape
        lines_BHCW = np.empty((n_seen, seen_height, n_channels, seen_width), np.float32)
        lines_BHCW[...] = seen_BCHW.transpose(0, 2, 1, 3)
        lines_BSCW = rows.read(lines_BHCW.reshape(n_seen, seen_height, -1))
        lines_BWSC = np.ascontiguousarray(lines_BSCW.reshape(n_seen, -1, seen_width).transpose(0, 2, 1))
        read_BSSC = columns.read(lines_BWSC).reshape(n_seen, size, size, n_channels)
        shown[chosen] = read_BSSC.transpose(0, 3, 2, 1)
    return shown


@dataclass(frozen=True, slots=True)
class Taps:
    """From which lines each of S results is read, and with what weights."""

    places: NDArray[np.int64]
    """[T, B, S], within the image."""
    weights: NDArray[np.float64]
    """[T, B, S], 0 for a tap that is not needed; their sum over T is 1."""

    @property
    def span(self) -> tuple[int, int]:
        """Where the lines that are read begin and end."""
        return int(self.places.min()), int(self.places.max()) + 1

    def mirrored(self, flip: NDArray[np.bool_]) -> "Taps":
        """The same in the other order for the images with a true `flip`, [B]."""
        turned = flip[:, None]
        return Taps(
            np.where(turned, self.places[..., ::-1], self.places),
            np.where(turned, self.weights[..., ::-1], self.weights),
        )

    def read(self, lines: NDArray[np.float32]) -> NDArray[np.float32]:
        """The S results [B, S, x] of lines [B, n, x] that begin with the first of `span`."""
        n_images, n_lines, n_values = lines.shape
        offsets = np.arange(n_images)[:, None] * n_lines - self.span[0]
        places = (self.places + offsets).reshape(len(self.places), -1)
        weights = self.weights.astype(np.float32).reshape(*places.shape, 1)
        flat = lines.reshape(-1, n_values)
        total: NDArray[np.float32] = flat[places[0]]
        total *= weights[0]
        read = np.empty_like(total)
        for place, weight in zip(places[1:], weights[1:], strict=True):
            # Product and sum apart: fused, they would round in another way on another processor.
            np.take(flat, place, axis=0, out=read, mode="clip")  # which alone needs no copy of `out`
            read *= weight
            total += read
        read_BSx: NDArray[np.float32] = total.reshape(n_images, -1, n_values)
        return read_BSx


def find_taps(start: NDArray[np.float64], extent: NDArray[np.float64], n_lines: int, size: int) -> Taps:
    """How to read `size` values from the part [start, start + extent] of `n_lines`, in fractions of them, both [B]."""
    step = extent[:, None] * n_lines / size  # source lines for each value
    centre = start[:, None] * n_lines + (np.arange(size) + 0.5) * step
    # A triangle as wide as the step when shrinking (antialias), one line wide when enlarging.
    reach = np.maximum(step, 1.0)
    n_taps = int(np.ceil(2 * reach.max()))
    places = np.floor(centre - reach + 0.5).astype(np.int64) + np.arange(n_taps)[:, None, None]
    weights = np.maximum(0.0, 1.0 - np.abs(places + 0.5 - centre) / reach)
    weights *= (places >= 0) & (places < n_lines)
    # The sum runs over the first axis, one tap after another: how many more have no weight does not change it.
    return Taps(np.clip(places, 0, n_lines - 1), weights / weights.sum(axis=0))
