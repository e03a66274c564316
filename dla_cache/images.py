"""From a file to pixels, and the one deterministic view that sources see and models are evaluated on."""

import hashlib
import io
import re
import struct
from pathlib import Path
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dla_cache.errors import ImageError
from dla_cache.tars import read_range

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a quarter GiB of RGB, where Pillow too suspects a bomb."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What Pillow may decode, by content: of others some start a program, as PostScript starts Ghostscript."""

REPLACE_HINT = "replace the file, or drop the image from the manifest"

PILLOW_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)
"""What Pillow's readers raise on damaged bytes."""

START_OF_SCAN = 0xDA
"""The JPEG marker behind which there is no more metadata."""


PLAIN_PPM = re.compile(rb"P6 ([1-9]\d{0,8}) ([1-9]\d{0,8}) 255\n")
"""The header of a binary PPM as our stores hold it: width, height, largest value."""


class ListedImage(Protocol):
    """What a manifest or a row table says about an image."""

    @property
    def image_id(self) -> str: ...
    @property
    def sha256(self) -> str: ...


def read_image_bytes(path: Path, row: ListedImage) -> bytes:
    """The file's bytes, which are those the manifest was made of.

    Args:
        path: of a file, or `shards/000.tar#1536+20480`: 20,480 bytes of one, from byte 1,536 on.

    Raises:
        ImageError: if the file is missing or has changed.
    """
    try:
        content = read_range(path.parent, path.name)
    except ImageError as error:
        fault = error.message.removeprefix(f"image `{path.name}` ")
        raise ImageError(f"image `{row.image_id}` at `{path}` {fault}", hint=error.hint) from error
    if hashlib.sha256(content).hexdigest() != row.sha256:
        raise ImageError(
            f"image `{row.image_id}` at `{path}` is not the file of the manifest: {len(content)} bytes, another sha256",
            hint="restore the file, or write the manifest again",
        )
    return content


def decode_image(content: bytes, image_id: str, *, min_side: int | None = None) -> Pixels:
    """The same as `decode_view`, in C order."""
    return np.ascontiguousarray(decode_view(content, image_id, min_side=min_side))


def decode_view(content: bytes, image_id: str, *, min_side: int | None = None) -> Pixels:
    """RGB pixels, uint8 [3, H, W], upright: turned and mirrored as the EXIF orientation says.

    A view of what the decoder wrote, in whose memory the colours of a pixel lie side by side.

    Args:
        min_side: for who needs no more pixels than so many on the shorter side: a JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size, sides rounded up, the smallest of these that has as many. It is faster, and the picture is
            not to the pixel that of a full decode made smaller: sources and evaluation do without. Other formats, and
            images too small for a half, come whole.

    The content decides the format, not the file's name. What other modes and formats become:

    - 1-bit, grey, palette: their colours.
    - 16-bit grey: the high byte, which is also what Pillow makes of 16-bit colour.
    - Transparency: dropped, not composited, as by torchvision's and most others' `convert("RGB")`; the
      colours under it stay.
    - CMYK: Pillow's plain conversion, without a colour profile.
    - Animations and stacks: the first frame.
    - 32-bit and float samples: refused, for nothing says which value is white.

    JPEG goes through simplejpeg, which is twice as fast as Pillow but knows no CMYK. It gives Pillow's very pixels, as
    with `min_side` those of Pillow's `draft`, where both bring the same libjpeg-turbo; the tests measure it and allow
    2 grey levels. A binary PPM as our stores hold it is a view of its bytes, copied once.

    Raises:
        ImageError: if the bytes are empty, truncated, corrupt, or no image, have more than `MAX_PIXELS`
            pixels, or samples of unknown range.
    """
    if not content:
        raise ImageError(f"image `{image_id}` is empty: 0 bytes", hint=REPLACE_HINT)
    try:
        header = simplejpeg.decode_jpeg_header(content) if simplejpeg.is_jpeg(content) else None
        plain = PLAIN_PPM.match(content)
        if header is not None and header[2] in ("YCbCr", "Gray", "RGB"):
            height, width, *_ = header
            _check_size(width, height)
            pixels = simplejpeg.decode_jpeg(content, colorspace="RGB", **_scaled(height, width, min_side))
            exif = _exif_of_jpeg(content)
        elif plain is not None and len(content) == plain.end() + 3 * int(plain[1]) * int(plain[2]):
            width, height = int(plain[1]), int(plain[2])
            _check_size(width, height)
            pixels, exif = np.frombuffer(content, np.uint8, offset=plain.end()).reshape(height, width, 3), b""
        else:
            pixels, exif = _decode_other(content)
    except UnidentifiedImageError as error:  # its own message shows a buffer's address
        fault = "it is in no known image format, or cut off"
        raise ImageError(f"image `{image_id}` cannot be decoded: {fault}", hint=REPLACE_HINT) from error
    except (*PILLOW_FAULTS, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image `{image_id}` cannot be decoded: {error}", hint=REPLACE_HINT) from error
    return _upright(pixels, _orientation(exif))


def _scaled(height: int, width: int, min_side: int | None) -> dict[str, int]:
    """What makes simplejpeg decode at 1/2, 1/4 or 1/8: left to itself it takes 7/8 as well, slower than all of it."""
    sides = {factor: (-(-height // factor), -(-width // factor)) for factor in (8, 4, 2)}
    enough = [factor for factor in sides if min_side is not None and min(sides[factor]) >= min_side]
    if not enough:
        return {}
    least_height, least_width = sides[enough[0]]
    return {"min_height": least_height, "min_width": least_width, "min_factor": enough[0]}


def _decode_other(content: bytes) -> tuple[Pixels, bytes]:
    """Pixels [H, W, 3] and the EXIF block, which Pillow itself has heeded and left out in TIFF."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _check_size(*image.size)
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError(f"32-bit samples (mode `{image.mode}`) have no known range; save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            high_byte = (np.asarray(image) >> 8).astype(np.uint8)
            pixels = np.stack([high_byte] * 3, axis=-1)
        else:
            image.info.pop("transparency", None)  # else Pillow warns that RGB has none
            pixels = np.asarray(image.convert("RGB"))
        return pixels, image.info.get("exif", b"")  # after decoding: a PNG may have it behind its pixels


def _exif_of_jpeg(content: bytes) -> bytes:
    """The EXIF block of a JPEG whose header has been read; empty if it has none.

    Hops from segment to segment: Pillow takes as long to open a small file as simplejpeg to decode it.
    """
    place = 2
    while content[place] == 0xFF and content[place + 1] != START_OF_SCAN:
        size = int.from_bytes(content[place + 2 : place + 4], "big")
        if content.startswith(b"Exif\0\0", place + 4):
            return content[place + 4 : place + 2 + size]
        # Any number of 0xFF may stand before a marker.
        place += 1 if content[place + 1] == 0xFF else 2 + size
    return b""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}; save it smaller")


def _orientation(exif_block: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1, as stored, where EXIF is absent, unreadable or says something else."""
    if not exif_block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(exif_block)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except PILLOW_FAULTS:
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels [3, H, W] as they are to be seen, of stored ones [H, W, 3]."""
    upright = pixels.transpose(2, 0, 1)
    if orientation >= 5:
        upright = upright.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        upright = upright[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[:, ::-1]
    return upright


def centre_square(pixels: Pixels, size: int, out: Pixels | None = None) -> Pixels:
    """The view that sources see and models are evaluated on, [3, size, size]: shorter side to `size`, centre crop.

    Deterministic, because a latent is cached once for an image; training views are the trainer's. To the pixel what
    the image processor of an exported student gives. An image that is already square and of that size stays as it is.

    Args:
        pixels: uint8 [3, H, W].
        out: where to put it, else it gets memory of its own.

    Raises:
        ImageError: see `resize_shorter_side`.
    """
    resized = resize_shorter_side(pixels, size)
    _, height, width = resized.shape
    top, left = (height - size) // 2, (width - size) // 2
    square = resized[:, top : top + size, left : left + size]
    if out is None:
        return np.ascontiguousarray(square)
    out[...] = square
    return out


def shrink(pixels: Pixels, shorter_side: int) -> Pixels:
    """An image uint8 [3, H, W] at most so large, its aspect kept."""
    return pixels if min(pixels.shape[1:]) <= shorter_side else resize_shorter_side(pixels, shorter_side)


def resize_shorter_side(pixels: Pixels, size: int) -> Pixels:
    """An image uint8 [3, H, W] with its shorter side of `size` pixels, bicubic with antialiasing.

    The longer side is rounded down, as torchvision and transformers do it.

    Raises:
        ImageError: if that makes more than `MAX_PIXELS` pixels of a long, thin image.
    """
    _, height, width = pixels.shape
    shorter = min(height, width)
    if shorter == size:
        return pixels
    scaled = (int(size * width / shorter), int(size * height / shorter))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(
            f"an image of {width} x {height} pixels would have {scaled[0]} x {scaled[1]} when scaled for its view",
            hint="crop it, or drop it from the manifest: `width` and `height` tell which it is",
        )
    interleaved = pixels.transpose(1, 2, 0)
    if interleaved.flags.c_contiguous:
        image = Image.fromarray(interleaved)
    else:  # of planes: Pillow copies an array whose colours do not lie side by side byte by byte
        image = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    return np.asarray(image.resize(scaled, Image.Resampling.BICUBIC)).transpose(2, 0, 1)
