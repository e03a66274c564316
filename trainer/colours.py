"""What augmentation does to the colours and the shape of a view that has its size: Pillow's operations on 8 bits.

Pillow is what the published recipes were run with, computes in integers, and sees one image at a time: a view is the
same to the bit whatever its batch.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from trainer.views import HIGHEST_MAGNITUDE, RAND_AUGMENT_OPERATIONS, Colours, RandAugments

FILL = (128, 128, 128)
"""What comes into sight when an image is moved: timm's grey."""

SOLARIZE_THRESHOLD = 128

Enhancer = Callable[[Image.Image], ImageEnhance._Enhance]


def recolour(image: Image.Image, colours: Colours, place: int) -> Image.Image:
    """The RGB image of a batch's `place` with its change of colour.

    Source: ColorJitter, RandomGrayscale and RandomSolarize of torchvision on Pillow's images.
    """
    factors = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
    for which in colours.order[place].tolist():
        image = JITTER[which](image, float(factors[which][place]))
    if colours.grayscale[place]:
        image = image.convert("L").convert("RGB")
    return ImageOps.solarize(image, SOLARIZE_THRESHOLD) if colours.solarize[place] else image


def rand_augment(image: Image.Image, drawn: RandAugments, place: int) -> Image.Image:
    """The RGB image of a batch's `place` after the operations that were drawn for it."""
    for number, magnitude, is_negated in zip(
        drawn.operation[place].tolist(), drawn.magnitude[place].tolist(), drawn.is_negated[place].tolist(), strict=True
    ):
        if number >= 0:
            image = operate(image, RAND_AUGMENT_OPERATIONS[number], magnitude, is_negated=is_negated)
    return image


def operate(image: Image.Image, operation: str, magnitude: float, *, is_negated: bool = False) -> Image.Image:
    """One of `RAND_AUGMENT_OPERATIONS` on an RGB image, of a magnitude from 0 to 10.

    Every operation but the first three grows with the magnitude, and all others but `posterize` change nothing at 0.
    `posterize` leaves 4 bits there and 1 at 10, where timm leaves none: a black image.

    Source: `_RAND_INCREASING_TRANSFORMS` and `LEVEL_TO_ARG` of timm's `auto_augment.py`.
    """
    level = magnitude / HIGHEST_MAGNITUDE
    return OPERATIONS[operation](image, level, -level if is_negated else level)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """The RGB image with every hue turned by so much of the circle, in 255 steps, as torchvision does it."""
    steps = int(turn * 255)
    if steps == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned: NDArray[np.uint8] = np.asarray(hue) + np.uint8(steps % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _by_factor(enhancer: Enhancer) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, factor: image if factor == 1 else enhancer(image).enhance(factor)


def _by_level(enhancer: Enhancer) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, level, signed: enhancer(image).enhance(max(0.1, 1 + 0.9 * signed))


def _transformed(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
    )


def _with_added(image: Image.Image, amount: int) -> Image.Image:
    """Dark values, below the threshold, made lighter."""
    table = [min(255, value + amount) if value < SOLARIZE_THRESHOLD else value for value in range(256)]
    return image.point(table * 3)


JITTER: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    _by_factor(ImageEnhance.Brightness),
    _by_factor(ImageEnhance.Contrast),
    _by_factor(ImageEnhance.Color),
    turn_hue,
)
"""By their numbers in `Colours.order`."""

OPERATIONS: dict[str, Callable[[Image.Image, float, float], Image.Image]] = {
    "autocontrast": lambda image, level, signed: ImageOps.autocontrast(image),
    "equalize": lambda image, level, signed: ImageOps.equalize(image),
    "invert": lambda image, level, signed: ImageOps.invert(image),
    "rotate": lambda image, level, signed: image.rotate(30 * signed, Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, level, signed: ImageOps.posterize(image, max(1, 4 - math.floor(4 * level))),
    "solarize": lambda image, level, signed: ImageOps.solarize(image, 256 - math.floor(256 * level)),
    "solarize_add": lambda image, level, signed: _with_added(image, math.floor(110 * level)),
    "colour": _by_level(ImageEnhance.Color),
    "contrast": _by_level(ImageEnhance.Contrast),
    "brightness": _by_level(ImageEnhance.Brightness),
    "sharpness": _by_level(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, signed: _transformed(image, 1, 0.3 * signed, 0, 0, 1, 0),
    "shear_y": lambda image, level, signed: _transformed(image, 1, 0, 0, 0.3 * signed, 1, 0),
    "translate_x": lambda image, level, signed: _transformed(image, 1, 0, 0.45 * signed * image.width, 0, 1, 0),
    "translate_y": lambda image, level, signed: _transformed(image, 1, 0, 0, 0, 1, 0.45 * signed * image.height),
}
"""Each takes the image, its level from 0 to 1, and the level with its sign."""
