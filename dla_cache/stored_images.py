"""Images as a store holds them, the bytes of their files or smaller pictures made of them; and reading either."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from dla_cache.errors import ImageError
from dla_cache.images import Pixels, decode_image, read_image_bytes, shrink
from dla_cache.manifest import path_of
from dla_cache.spec import ORIGINAL_IMAGES, CacheSpec, ImageRecipe
from dla_cache.store.rows import RowTable

SUBSAMPLING = "420"
"""Of JPEG: colours at half the resolution, as cameras and most data sets have them."""


class HoldsImages(Protocol):
    """What a store and joined stores have in common, as far as images go."""

    @property
    def rows(self) -> RowTable: ...
    def read_images(self, rows: NDArray[np.int64]) -> list[bytes]: ...


def image_recipe(spec: CacheSpec) -> ImageRecipe | None:
    """How a store of this spec holds its images, made with the libraries that are installed here; None if it does not.

    Libraries belong to it since another version may make other bytes; the same versions make the same.
    """
    if spec.images == "none":
        return None
    if spec.images == "original":
        return ORIGINAL_IMAGES
    return ImageRecipe(
        encoding=spec.images,
        size=spec.image_size,
        quality=spec.image_quality if spec.images == "jpeg" else None,
        made_by=f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}",
    )


def encode_image(content: bytes, image_id: str, recipe: ImageRecipe, pixels: Pixels | None = None) -> bytes:
    """What a store holds of an image, of the bytes of its file.

    A made picture is upright 8-bit RGB as `decode_image` gives it, and so small that its shorter side has
    `recipe.size` pixels; smaller ones are not enlarged. `raw` is a binary PPM: any reader opens it, and what follows
    its one line of text are the pixels.

    Args:
        pixels: what `decode_image` makes of the bytes, from who has it already.

    Raises:
        ImageError: if the image cannot be decoded, or is too long for a JPEG.
    """
    if recipe.encoding == "original":
        return content
    assert recipe.size is not None
    pixels = shrink(decode_image(content, image_id) if pixels is None else pixels, recipe.size)
    interleaved = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    height, width, _ = interleaved.shape
    if recipe.encoding == "raw":
        return b"P6 %d %d 255\n" % (width, height) + interleaved.tobytes()
    assert recipe.quality is not None
    try:
        return bytes(simplejpeg.encode_jpeg(interleaved, recipe.quality, "RGB", SUBSAMPLING))
    except ValueError as error:
        raise ImageError(
            f"image `{image_id}` of {width} x {height} pixels cannot be stored as JPEG: {error}",
            hint="store images as `raw` or `original`, crop it, or drop it from the manifest",
        ) from error


def image_contents(store: HoldsImages, image_root: Path | None, rows: Sequence[int] | NDArray[np.int64]) -> list[bytes]:
    """The bytes of images, in the order of `rows`: of their files in a folder, or as the store holds them.

    Args:
        image_root: folder that the images' URIs start from; None takes them out of the store.

    Raises:
        ImageError: if a file is missing or has changed.
        MissingLatentError: if the store does not hold them.
        CorruptShardError: if what the store holds is damaged.
    """
    if image_root is None:
        return store.read_images(np.asarray(rows, np.int64))
    images = store.rows.images_of(rows)
    return [read_image_bytes(path_of(image_root, image.uri), image) for image in images]
