"""Pixels: what can be decoded, what is refused, and the one view that sources see."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dla_cache.errors import ImageError
from dla_cache.images import MAX_PIXELS, centre_square, decode_image

ORIENTATION = 0x0112  # the EXIF tag


def encoded(image: Image.Image, format_name: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **settings)
    return buffer.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_16_bit(values: np.ndarray) -> bytes:
    """A PNG of uint16 values, grey [H, W] or RGB [H, W, 3], which Pillow cannot write."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in chunks)


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


JPEGS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "grey": {"mode": "L"},
    "progressive": {"progressive": True},
    "quality 40": {"quality": 40},
    "turned": {"exif": exif_of(6)},
    "mirrored": {"exif": exif_of(5)},
}

DECODERS_DIFFER_BY = 2
"""Grey levels: 0 where Pillow and simplejpeg bring the same libjpeg-turbo, and versions of it round differently."""


def jpeg(height: int, width: int, *, mode: str = "RGB", **settings: object) -> bytes:
    """Coloured blobs and a little noise, as a picture has them."""
    blobs = Image.fromarray(noise(-(-height // 16), -(-width // 16))).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.asarray(blobs) + np.random.default_rng(1).normal(0, 5, (height, width, 3))
    image = Image.fromarray(grain.clip(0, 255).astype(np.uint8)).convert(mode)
    return encoded(image, "JPEG", **{"quality": 90, **settings})


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_of_any_kind_and_scale_has_the_pixels_that_pillow_gives(kind: str, factor: int) -> None:
    content = jpeg(75, 101, **JPEGS[kind])
    with Image.open(io.BytesIO(content)) as image:
        assert factor == 1 or image.draft(None, (101 // factor, 75 // factor))
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    assert sorted(expected.shape[1:]) == [-(-75 // factor), -(-101 // factor)]
    found = decode_image(content, "a", min_side=-(-75 // factor))
    np.testing.assert_allclose(found.astype(int), expected, atol=DECODERS_DIFFER_BY)


@given(height=st.integers(1, 70), width=st.integers(1, 70), min_side=st.integers(1, 80))
def test_a_scaled_decode_has_enough_pixels_and_half_would_not_be(height: int, width: int, min_side: int) -> None:
    content = simplejpeg.encode_jpeg(noise(height, width))
    shape = decode_image(content, "a", min_side=min_side).shape
    factor = next(factor for factor in (8, 4, 2, 1) if shape == (3, -(-height // factor), -(-width // factor)))
    assert min(shape[1:]) >= min(min_side, height, width)
    assert factor == 8 or -(-min(height, width) // (2 * factor)) < min_side


def test_a_scaled_decode_is_nearly_the_full_one_made_smaller() -> None:
    content = jpeg(200, 300)
    half = np.asarray(Image.fromarray(decode_image(content, "a").transpose(1, 2, 0)).reduce(2)).transpose(2, 0, 1)
    distance = np.abs(decode_image(content, "a", min_side=100).astype(int) - half)
    assert distance.mean() < 3
    assert np.array_equal(decode_image(content, "a", min_side=101), decode_image(content, "a"))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "PPM"])
def test_other_formats_are_decoded_whole_whatever_is_asked_for(format_name: str) -> None:
    content = encoded(Image.fromarray(noise(32, 48)), format_name)
    assert decode_image(content, "a", min_side=4).shape == (3, 32, 48)


@pytest.mark.parametrize("header", [b"P6 5 3 255\n", b"P6\n5 3\n255\n", b"P6 # made\n5 3 255 "])
def test_a_ppm_has_its_pixels_however_its_header_is_written(header: bytes) -> None:
    pixels = noise(3, 5)
    assert np.array_equal(decode_image(header + pixels.tobytes(), "a"), pixels.transpose(2, 0, 1))


def test_a_ppm_is_a_copy_that_may_be_written_to_and_one_cut_off_or_too_large_is_refused() -> None:
    content = b"P6 5 3 255\n" + noise(3, 5).tobytes()
    decode_image(content, "a")[:] = 0
    assert np.array_equal(decode_image(content + b"more", "a"), decode_image(content, "a"))  # another image may follow
    for faulty, fault in (
        (content[:-1], "truncated|cannot be decoded"),
        (b"P6 60000 60000 255\n", "cannot be decoded"),
        (b"P6 0 3 255\n", "cannot be decoded"),
    ):
        with pytest.raises(ImageError, match=fault):
            decode_image(faulty, "a")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(format_name: str, orientation: int) -> None:
    blocks = Image.fromarray(noise(2, 3)).resize((48, 32), Image.Resampling.NEAREST)
    content = encoded(blocks, format_name, exif=exif_of(orientation), quality=95)
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert expected.shape == ((3, 32, 48) if orientation < 5 else (3, 48, 32))
    # Pillow and simplejpeg may bring a libjpeg each; a wrong turn differs by far more than a grey level or two.
    np.testing.assert_allclose(decode_image(content, "a").astype(int), expected, atol=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [exif_of(0), exif_of(9), b"Exif\0\0nonsense", exif_of(6).tobytes()[:-8], b"Exif\0\0II*\0\xff\xff\xff\x7f"],
    ids=["zero", "nine", "nonsense", "cut off", "elsewhere"],
)
def test_an_exif_that_names_no_orientation_leaves_the_image_as_stored(format_name: str, exif: object) -> None:
    image = Image.fromarray(noise(4, 6))
    content = encoded(image, format_name, exif=exif)
    assert np.array_equal(decode_image(content, "a"), decode_image(encoded(image, format_name), "a"))


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte_as_16_bit_colour_does(format_name: str) -> None:
    values = np.array([[0, 255, 256, 511], [4660, 32768, 65279, 65535]], np.uint16)
    colour = png_16_bit(np.repeat(values[:, :, None], 3, axis=2))
    assert decode_image(colour, "a")[0].tolist() == [[0, 0, 1, 1], [18, 128, 254, 255]]
    grey = png_16_bit(values) if format_name == "PNG" else encoded(Image.fromarray(values), format_name)
    assert np.array_equal(decode_image(grey, "a"), decode_image(colour, "a"))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_samples_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=rf"`{mode}`.*no known range"):
        decode_image(encoded(Image.new(mode, (2, 2)), "TIFF"), "cat-1")


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(np.array([[False, True]]))
    assert decode_image(encoded(image, "PNG"), "a").tolist() == [[[0, 255]]] * 3


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    "content",
    [
        encoded(palette_image(), "PNG"),
        encoded(palette_image(), "PNG", transparency=0),
        encoded(palette_image(), "PNG", transparency=b"\x00\x80"),
        encoded(palette_image(), "GIF", transparency=1),
        encoded(Image.merge("RGBA", [*palette_image().convert("RGB").split(), Image.new("L", (2, 1))]), "PNG"),
    ],
    ids=["opaque", "a clear colour", "an alpha table", "GIF", "RGBA"],
)
def test_the_colours_under_transparency_stay(content: bytes) -> None:
    assert decode_image(content, "a")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_grey_with_alpha_is_its_grey() -> None:
    assert decode_image(encoded(Image.new("LA", (1, 1), (77, 0)), "PNG"), "a").ravel().tolist() == [77, 77, 77]


def test_an_adobe_cmyk_jpeg_is_not_inverted() -> None:
    content = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in content  # so its samples are stored inverted
    np.testing.assert_allclose(decode_image(content, "a")[:, 8, 8], (255, 0, 0), atol=3)


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format_name: str) -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    content = encoded(red, format_name, save_all=True, append_images=[blue])
    np.testing.assert_allclose(decode_image(content, "a")[:, 1, 1], (255, 0, 0), atol=3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 14_000, 60_000])
def test_an_image_too_large_to_decode_is_refused_by_its_header(side: int) -> None:
    png = png_16_bit(np.zeros((1, 1), np.uint16))
    header = struct.pack(">II", side, side) + png[24:29]
    jpeg = bytearray(simplejpeg.encode_jpeg(noise(8, 8)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    for content in (png[:8] + png_chunk(b"IHDR", header) + png[33:], bytes(jpeg)):
        with pytest.raises(ImageError, match=r"`cat-1`.*pixels"):
            decode_image(content, "cat-1")
    assert side * side > MAX_PIXELS


def test_postscript_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was looked for")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", refuse)
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", refuse)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(eps, "a")


def test_an_empty_file_is_called_so() -> None:
    with pytest.raises(ImageError, match="`cat-1` is empty"):
        decode_image(b"", "cat-1")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # a TIFF's directory
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_a_truncated_file_is_refused_and_named(format_name: str) -> None:
    whole = encoded(Image.fromarray(noise(16, 16)), format_name)
    for length in (10, len(whole) // 2, len(whole) * 3 // 4):
        with pytest.raises(ImageError, match="`cat-1` cannot be decoded") as refused:
            decode_image(whole[:length], "cat-1")
        assert "BytesIO" not in str(refused.value)


def test_what_is_no_image_is_called_so() -> None:
    with pytest.raises(ImageError, match="it is in no known image format"):
        decode_image(b"not an image at all", "cat-1")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_damaged_bytes_give_pixels_or_an_image_error(format_name: str) -> None:
    whole = encoded(Image.fromarray(noise(16, 16)), format_name, exif=exif_of(6))
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200), 3):
            damaged[place] = random.integers(0, 256)
        with contextlib.suppress(ImageError):
            assert decode_image(bytes(damaged), "a").dtype == np.uint8


def test_a_square_image_of_the_right_size_is_its_own_view() -> None:
    pixels = noise(8, 8).transpose(2, 0, 1)
    assert np.array_equal(centre_square(pixels, 8), pixels)


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 40))
def test_the_view_is_square_and_of_the_asked_size(height: int, width: int, size: int) -> None:
    assert centre_square(noise(height, width).transpose(2, 0, 1), size).shape == (3, size, size)


def test_the_view_is_the_centre() -> None:
    pixels = np.zeros((3, 4, 12), np.uint8)
    pixels[:, :, 4:8] = 255
    assert centre_square(pixels, 4).min() == 255


def test_the_view_is_antialiased() -> None:
    stripes = np.zeros((3, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    # Averaged, fine stripes are grey; picked, they would be black or white.
    assert np.abs(centre_square(stripes, 8).astype(int) - 127).max() < 10


def test_an_image_too_long_and_thin_to_scale_is_refused() -> None:
    with pytest.raises(ImageError, match="40000 x 1 pixels would have 8960000 x 224"):
        centre_square(np.zeros((3, 1, 40_000), np.uint8), 224)
