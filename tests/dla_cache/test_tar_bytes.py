"""Tars of our own making: stock tar readers find every name and every byte."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dla_cache.store.tar_bytes import encode_tar, image_suffix


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=5), sizes=st.data())
@settings(max_examples=30)
def test_a_stock_tar_reader_finds_names_of_any_length_and_contents_of_any_size(
    lengths: list[int], sizes: st.DataObject
) -> None:
    names = [f"{place}{'a' * length}.depth.npy" for place, length in enumerate(lengths)]
    contents = [b"\xab" * sizes.draw(st.integers(0, 1500)) for _ in names]
    content, offsets = encode_tar(names, contents)
    assert len(content) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        assert [member.name for member in tar.getmembers()] == names
        assert [tar.extractfile(name).read() for name in names] == contents
    assert [content[offset : offset + len(part)] for offset, part in zip(offsets, contents, strict=True)] == contents


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("BMP", "bmp"),
        ("PPM", "ppm"),
    ],
)
def test_the_content_of_an_image_decides_its_suffix(form: str, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format=form)
    assert image_suffix(buffer.getvalue()) == suffix
    assert image_suffix(b"what is this") == "img"
