"""What the golden stores hold: a function of an image's ID, so that no test needs a copy of it. Nothing of dla."""

import struct

import numpy as np
from numpy.typing import NDArray

SIDE = 4
"""Pixels of a picture."""

CLASS_NAMES = ("Käfer", "owl", "鳥 🦉")
"""Also what canonical JSON must escape."""

CONTINUOUS = {
    "depth": ((2, 2, 2), ("channel", "height", "width")),
    "shape": ((3, 2), ("token", "channel")),
    "features-twice": ((2, 3, 2), ("draw", "token", "channel")),
}
CODES = {
    "audio": ((2, 3), ("codebook", "step"), 97),
    "normals": ((1, 2), ("codebook", "step"), 9_700),
    "motion": ((1, 2), ("codebook", "step"), 97_000),
}
"""Shape, axes, vocabulary: they lie on disk as uint8, int16 and int32."""


def image_id_of(number: int) -> str:
    """Of one image too long for a tar header."""
    return f"image-{number:04d}" + ("-" + "long" * 25 if number == 3 else "")


def number_of(image_id: str) -> int:
    return int(image_id.split("-")[1])


def split_of(number: int) -> str:
    return ("labelled", "transfer", "test")[number % 3]


def label_of(number: int) -> int | None:
    return None if split_of(number) == "transfer" else number % len(CLASS_NAMES)


def labels_of(number: int) -> tuple[int, ...] | None:
    """The same where an image may have several; of some images none applies."""
    return None if split_of(number) == "transfer" else tuple(c for c in range(len(CLASS_NAMES)) if number >> c & 1)


def numbers_of(modality: str, number: int) -> NDArray[np.generic]:
    """What a source puts out for an image: float32 or int64, before it is stored in fewer bits."""
    shape, *_, vocabulary = (*CONTINUOUS.get(modality, ()), 0) if modality in CONTINUOUS else CODES[modality]
    place = np.arange(np.prod(shape)).reshape(shape)
    value = (31 * number + 7 * place + 13 * len(modality)) % 97
    if vocabulary:
        return np.asarray(value * (vocabulary // 97), np.int64)
    return ((value - 48) / 16 + (place + 1) / 2**14).astype(np.float32)


def picture_of(number: int) -> bytes:
    """The image file: grey all over, as PPM if the number is even, else as BMP."""
    pixels = bytes([number % 256]) * (3 * SIDE * SIDE)
    if number % 2 == 0:
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels
