"""The pixels of a view: crop and resize, flip, colours, RandAugment; and once they are normalised, erasing.

Dimensions: B images, H and W their sides in pixels, S the side of a view.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainer.colours import rand_augment, recolour
from trainer.counters import normal_numbers
from trainer.resample import crop_and_resize
from trainer.views import Erasings, Views


def view_images(images: Sequence[NDArray[np.uint8]], views: Views, size: int) -> Tensor:
    """The views of images of any sizes, those of one size in one go, all but what is erased of them.

    Args:
        images: B arrays uint8 [3, H, W].
        size: side of the result in pixels.

    Returns:
        [B, 3, size, size] float32, in [0, 255]; whole numbers where colours or RandAugment are on.
    """
    places_of: dict[tuple[int, ...], list[int]] = {}
    for place, pixels in enumerate(images):
        places_of.setdefault(pixels.shape, []).append(place)
    shown = np.empty((len(images), 3, size, size), np.float32)
    for places in places_of.values():
        shown[places] = crop_and_resize(np.stack([images[place] for place in places]), views.of(places), size)
    return torch.from_numpy(_changed(shown, views))


def apply_views(pixels: Tensor, views: Views, size: int) -> Tensor:
    """Each image's view, resized to a square and recoloured.

    Args:
        pixels: [B, 3, H, W], uint8 or float; in [0, 255] where colours or RandAugment are on.
        size: side of the result in pixels.

    Returns:
        [B, 3, size, size] float32, in the units of `pixels`.
    """
    return torch.from_numpy(_changed(crop_and_resize(pixels.numpy(), views, size), views))


def erase(pixels: Tensor, erasings: Erasings | None) -> Tensor:
    """Normalised pixels [B, 3, S, S] with each view's rectangle filled; without erasings as they are."""
    if erasings is None:
        return pixels
    erased, size = pixels.clone(), pixels.shape[-1]
    for place in np.flatnonzero(erasings.width).tolist():
        left, width = _in_pixels(erasings.left[place], erasings.width[place], size)
        top, height = _in_pixels(erasings.top[place], erasings.height[place], size)
        box = erased[place, :, top : top + height, left : left + width]
        stream = int(erasings.noise[place])
        fill = normal_numbers(stream, box.numel()).reshape(box.shape) if stream else np.zeros(box.shape)
        box.copy_(torch.from_numpy(fill))
    return erased


def _in_pixels(start: float, extent: float, size: int) -> tuple[int, int]:
    """Where a part of a view begins, and how many pixels it has: one at least, and none beyond the view."""
    n_pixels = min(size, max(1, round(extent * size)))
    return min(size - n_pixels, round(start * size)), n_pixels


def _changed(shown: NDArray[np.float32], views: Views) -> NDArray[np.float32]:
    """Views [B, 3, S, S] with their colours and operations, computed on 8 bits."""
    if views.colours is None and views.rand_augments is None:
        return shown
    rounded_BSSC = np.clip(np.rint(shown), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    changed = np.empty_like(shown)
    for place, rounded in enumerate(rounded_BSSC):
        image = Image.fromarray(np.ascontiguousarray(rounded))
        if views.colours is not None:
            image = recolour(image, views.colours, place)
        if views.rand_augments is not None:
            image = rand_augment(image, views.rand_augments, place)
        changed[place] = np.asarray(image).transpose(2, 0, 1)
    return changed
