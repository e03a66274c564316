"""Replayable augmentations: a view is the full record of its parameters.

A view is a pure function of (seed, image ID, draw). No generator is advanced, so neither the batch,
the worker nor the order matters, and a target stored for a view can be met with that very view later.
`trainer.augment` makes the pixels of it.

Dimensions: B images, N operations of RandAugment.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dla_cache.spec import StrictModel
from trainer.counters import as_normal, uniform_numbers

VIEWS_VERSION = 1
"""Part of the recipe of targets that are stored for views: raised when the same settings would give other views."""

N_RANDOM_NUMBERS = 5
"""Random numbers a crop is made of: area, aspect, left, top, flip."""

RAND_AUGMENT_OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "colour",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""Those that RandAugment chooses from, by number: the order is part of every record."""

HIGHEST_MAGNITUDE = 10.0

Probability = Annotated[float, Field(ge=0, le=1)]
D = TypeVar("D")


class ColourConfig(StrictModel):
    """Changes of colour, in the order jitter, grey, solarised.

    Source: ColorJitter of torchvision; grey and solarised views as in DINO, arXiv:2104.14294, and DeiT III,
    arXiv:2204.07118.
    """

    brightness: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """A factor from 1 - x, at least 0, to 1 + x."""
    contrast: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """As `brightness`."""
    saturation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """As `brightness`."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """A turn from -x to x, of 1 round the circle of hues."""
    probability: Probability = 1.0
    """Of the jitter, these four in an order of their own for each view; DINO's 0.8."""
    grayscale: Probability = 0.0
    """Of a view without colour."""
    solarize: Probability = 0.0
    """Of a view whose values from 128 on are inverted."""


class RandAugmentConfig(StrictModel):
    """Some operations drawn from 15, with replacement, all of one strength; the defaults are DeiT's.

    Source: arXiv:1909.13719, with the strengths of timm's `rand-m9-n2-mstd0.5-inc1`, as DeiT (arXiv:2012.12877) has it.
    """

    operations: Annotated[int, Field(ge=1, le=16)] = 2
    """Operations that are drawn for a view."""
    magnitude: Annotated[float, Field(ge=0, le=HIGHEST_MAGNITUDE)] = 9.0
    """Mean strength, 0 to 10."""
    magnitude_std: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Its standard deviation; what leaves 0 to 10 is cut to it."""
    probability: Probability = 0.5
    """Of each drawn operation to take place."""


class ErasingConfig(StrictModel):
    """A rectangle of the normalised view is erased; the defaults are DeiT's.

    Source: arXiv:1708.04896, as timm's `RandomErasing` has it, with sides cut to the view in place of another try.
    """

    probability: Probability = 0.25
    """Of a view to lose a rectangle."""
    area_min: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Smallest area, as a fraction of the view."""
    area_max: Annotated[float, Field(gt=0, le=1)] = 1 / 3
    ratio_min: Annotated[float, Field(gt=0)] = 0.3
    """Smallest aspect: width over height."""
    ratio_max: Annotated[float, Field(gt=0)] = 1 / 0.3
    fill: Literal["noise", "constant"] = "noise"
    """`noise`: normally distributed numbers, one for each value; `constant`: 0, the colour `pixel_mean`."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.area_min > self.area_max or self.ratio_min > self.ratio_max:
            raise ValueError("`area_min` and `ratio_min` may not exceed their maxima")
        return self


class ViewConfig(StrictModel):
    """Distribution of views: a random resized crop of the whole original, a flip, colours, an erased part.

    Without a crop, as by default, a view begins with the centre square that evaluation sees.
    """

    scale_min: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest area of the crop, as a fraction of the image."""
    scale_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    ratio_min: Annotated[float, Field(gt=0)] = 1.0
    """Smallest aspect of the crop: width over height in pixels, whatever the image's own."""
    ratio_max: Annotated[float, Field(gt=0)] = 1.0
    horizontal_flip: bool = False
    """Whether every second view, on average, is mirrored. Latents with a width are mirrored with it, others stay
    those of the whole image, and some are refused: see `trainer.latent_views`."""
    colour: ColourConfig | None = None
    """Changes of brightness, contrast, saturation and hue; none when absent."""
    rand_augment: RandAugmentConfig | None = None
    """RandAugment, after `colour`; none when absent."""
    erasing: ErasingConfig | None = None
    """Random erasing, last of all; none when absent."""
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
        changes = (self.colour, self.rand_augment, self.erasing)
        return self.is_cropped or self.horizontal_flip or any(change is not None for change in changes)

    @property
    def is_cropped(self) -> bool:
        """Whether views are crops."""
        return not self.scale_min == self.scale_max == self.ratio_min == self.ratio_max == 1


@dataclass(frozen=True, slots=True)
class Colours:
    """What becomes of the colours of each view."""

    brightness: NDArray[np.float64]
    """[B], factor; 1 changes nothing, as for the next two."""
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    """[B], turn; 0 changes nothing."""
    order: NDArray[np.int8]
    """[B, 4], which of the four comes first, second, …: 0 is brightness, 3 hue."""
    grayscale: NDArray[np.bool_]
    solarize: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RandAugments:
    """The operations on each view, one after another."""

    operation: NDArray[np.int8]
    """[B, N], place in `RAND_AUGMENT_OPERATIONS`; -1 for none."""
    magnitude: NDArray[np.float64]
    """[B, N], 0 to 10."""
    is_negated: NDArray[np.bool_]
    """[B, N]: whether an operation with two directions goes in the other one."""


@dataclass(frozen=True, slots=True)
class Erasings:
    """The rectangle that is erased from each view, in fractions of the view's sides; of no width where none is."""

    left: NDArray[np.float64]
    top: NDArray[np.float64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    noise: NDArray[np.uint64]
    """[B], the stream that the noise is read from; 0 for a constant."""


@dataclass(frozen=True, slots=True)
class Views:
    """One view for each image of a batch; the box in fractions of the image's sides."""

    left: NDArray[np.float64]
    top: NDArray[np.float64]
    width: NDArray[np.float64]
    height: NDArray[np.float64]
    flip: NDArray[np.bool_]
    """Whether the crop is mirrored left to right; the box is that of the unmirrored image."""
    colours: Colours | None = None
    rand_augments: RandAugments | None = None
    erasings: Erasings | None = None

    def of(self, places: Sequence[int]) -> Self:
        """The views of some of the images, in the order of `places`."""
        return _chosen(self, places)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Every drawn parameter [B, …] by its name, as `left` and `colours.hue`: equal arrays are equal views."""
        return _arrays(self)


def _chosen(record: D, places: Sequence[int]) -> D:
    values = [(field.name, getattr(record, field.name)) for field in fields(record)]  # type: ignore[arg-type]
    chosen = {
        name: value if value is None else _chosen(value, places) if is_dataclass(value) else value[places]
        for name, value in values
    }
    return type(record)(**chosen)


def _arrays(record: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for field in fields(record):
        name, value = f"{prefix}{field.name}", getattr(record, field.name)
        if is_dataclass(value):
            found |= _arrays(value, f"{name}.")
        elif value is not None:
            found[name] = value
    return found


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
    area, aspect, left, top, flip = uniform_numbers(seed, image_ids, draw, N_RANDOM_NUMBERS).T
    scale = config.scale_min + area * (config.scale_max - config.scale_min)
    ratio = _log_uniform(aspect, config.ratio_min, config.ratio_max) / aspects  # now of fractions of the image's sides
    width = np.minimum(np.sqrt(scale * ratio), 1.0)
    height = np.minimum(np.sqrt(scale / ratio), 1.0)
    width = np.minimum(width, height * (config.ratio_max / aspects))
    height = np.minimum(height, width / (config.ratio_min / aspects))
    return Views(
        left * (1 - width),
        top * (1 - height),
        width,
        height,
        (flip < 0.5) & config.horizontal_flip,
        _draw_colours(seed, image_ids, draw, config.colour) if config.colour is not None else None,
        _draw_rand_augments(seed, image_ids, draw, config.rand_augment) if config.rand_augment is not None else None,
        _draw_erasings(seed, image_ids, draw, config.erasing) if config.erasing is not None else None,
    )


def _log_uniform(number: NDArray[np.float64], smallest: float, largest: float) -> NDArray[np.float64]:
    low, high = math.log(smallest), math.log(largest)
    spread: NDArray[np.float64] = np.exp(low + number * (high - low))
    return spread


def _draw_colours(seed: int, image_ids: Sequence[str], draw: int, config: ColourConfig) -> Colours:
    numbers = uniform_numbers(seed, image_ids, draw, 11, purpose="colour")
    is_jittered = numbers[:, 0] < config.probability

    def factor(column: int, width: float) -> NDArray[np.float64]:
        low, high = max(0.0, 1 - width), 1 + width
        return np.where(is_jittered, low + numbers[:, column] * (high - low), 1.0)

    return Colours(
        factor(1, config.brightness),
        factor(2, config.contrast),
        factor(3, config.saturation),
        np.where(is_jittered, (2 * numbers[:, 4] - 1) * config.hue, 0.0),
        np.argsort(numbers[:, 5:9], axis=1, kind="stable").astype(np.int8),
        numbers[:, 9] < config.grayscale,
        numbers[:, 10] < config.solarize,
    )


def _draw_rand_augments(seed: int, image_ids: Sequence[str], draw: int, config: RandAugmentConfig) -> RandAugments:
    numbers = uniform_numbers(seed, image_ids, draw, 5 * config.operations, purpose="rand_augment")
    which, happens, first, second, sign = np.moveaxis(numbers.reshape(len(image_ids), config.operations, 5), 2, 0)
    magnitude = config.magnitude + config.magnitude_std * as_normal(first, second)
    return RandAugments(
        np.where(happens < config.probability, np.floor(which * len(RAND_AUGMENT_OPERATIONS)), -1).astype(np.int8),
        np.clip(magnitude, 0.0, HIGHEST_MAGNITUDE),
        sign < 0.5,
    )


def _draw_erasings(seed: int, image_ids: Sequence[str], draw: int, config: ErasingConfig) -> Erasings:
    happens, area, aspect, left, top, noise = uniform_numbers(seed, image_ids, draw, 6, purpose="erasing").T
    scale = config.area_min + area * (config.area_max - config.area_min)
    ratio = _log_uniform(aspect, config.ratio_min, config.ratio_max)
    is_erased = happens < config.probability
    width = np.where(is_erased, np.minimum(np.sqrt(scale * ratio), 1.0), 0.0)
    height = np.where(is_erased, np.minimum(np.sqrt(scale / ratio), 1.0), 0.0)
    stream = (noise * 2.0**53).astype(np.uint64) if config.fill == "noise" else np.zeros(len(image_ids), np.uint64)
    return Erasings(left * (1 - width), top * (1 - height), width, height, stream)
