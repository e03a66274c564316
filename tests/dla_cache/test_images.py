"""Pixels: what can be decoded, what is refused, and the one view that sources see."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dla_cache.errors import ImageError
from dla_cache.images import decode_image, source_view


def encoded(image: Image.Image, format_name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "WEBP"])
def test_pixels_are_channels_first(format_name: str) -> None:
    data = encoded(Image.new("RGB", (5, 3), (10, 20, 30)), format_name)
    pixels = decode_image(data, "a")
    assert pixels.shape == (3, 3, 5)
    assert pixels.dtype == np.uint8
    # WebP is lossy here; one colour comes back within a grey level.
    np.testing.assert_allclose(pixels[:, 1, 1], (10, 20, 30), atol=2)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert decode_image(encoded(Image.new(mode, (4, 6)), "PNG"), "a").shape == (3, 6, 4)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_becomes_rgb(mode: str) -> None:
    assert decode_image(encoded(Image.new(mode, (16, 8)), "JPEG"), "a").shape == (3, 8, 16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image at all",
        encoded(Image.fromarray(noise(64, 64)), "PNG")[:-2000],
        simplejpeg.encode_jpeg(noise(64, 64))[:-2000],
        simplejpeg.encode_jpeg(noise(64, 64))[:10],
    ],
    ids=["empty", "text", "truncated PNG", "truncated JPEG", "a JPEG's head"],
)
def test_what_cannot_be_decoded_is_named(content: bytes) -> None:
    with pytest.raises(ImageError, match="`cat-1` cannot be decoded"):
        decode_image(content, "cat-1")


def test_a_square_image_of_the_right_size_is_its_own_view() -> None:
    pixels = noise(8, 8).transpose(2, 0, 1)
    assert source_view(pixels, 8) is pixels


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 40))
def test_the_view_is_square_and_of_the_asked_size(height: int, width: int, size: int) -> None:
    assert source_view(noise(height, width).transpose(2, 0, 1), size).shape == (3, size, size)


def test_the_view_is_the_centre() -> None:
    pixels = np.zeros((3, 4, 12), np.uint8)
    pixels[:, :, 4:8] = 255
    assert source_view(pixels, 4).min() == 255


def test_the_view_is_antialiased() -> None:
    stripes = np.zeros((3, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    # Averaged, fine stripes are grey; picked, they would be black or white.
    assert np.abs(source_view(stripes, 8).astype(int) - 127).max() < 10
