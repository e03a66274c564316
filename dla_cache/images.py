"""From a file to pixels, and the one deterministic view that sources see."""

import hashlib
import io
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dla_cache.errors import ImageError

Pixels = NDArray[np.uint8]


class ListedImage(Protocol):
    """What a manifest or a row table says about an image."""

    @property
    def image_id(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def read_image_bytes(path: Path, row: ListedImage) -> bytes:
    """The file's bytes, which are those the manifest was made of.

    Raises:
        ImageError: if the file is missing or has changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"image `{row.image_id}` cannot be read from `{path}`: {error.strerror}",
            hint="restore the file, or drop the image from the manifest",
        ) from error
    if hashlib.sha256(content).hexdigest() != row.sha256:
        raise ImageError(
            f"image `{row.image_id}` at `{path}` is not the file of the manifest: {len(content)} bytes, another sha256",
            hint="restore the file, or write the manifest again",
        )
    return content


def decode_image(content: bytes, image_id: str) -> Pixels:
    """RGB pixels, uint8 [3, H, W]; grey, palette and transparent images are converted.

    JPEG goes through simplejpeg, which is twice as fast as Pillow but knows no CMYK.

    Raises:
        ImageError: if the bytes are truncated, corrupt, or no image.
    """
    try:
        if simplejpeg.is_jpeg(content) and simplejpeg.decode_jpeg_header(content)[2] in ("YCbCr", "Gray", "RGB"):
            pixels = simplejpeg.decode_jpeg(content, colorspace="RGB")
        else:
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"image `{image_id}` cannot be decoded: {error}",
            hint="replace the file, or drop the image from the manifest",
        ) from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def source_view(pixels: Pixels, size: int) -> Pixels:
    """The view a source sees, uint8 [3, size, size]: shorter side to `size`, centre crop.

    Deterministic, because a latent is cached once for an image; training views are the trainer's.
    Bicubic with antialiasing. An image that is already square and of that size stays as it is.

    Args:
        pixels: uint8 [3, H, W].
    """
    _, height, width = pixels.shape
    if height == width == size:
        return pixels
    shorter = min(height, width)
    scaled = (round(width * size / shorter), round(height * size / shorter))
    resized = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size].transpose(2, 0, 1))
