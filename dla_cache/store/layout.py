"""How a store may lie on disk: what a layout decides, and what all layouts have in common. Pure.

A *series* is what has one payload for every row: the latents of a modality, or the bytes of the images. A unit of it
is a shard, in one or two files. A layout says where they lie, what their bytes are, and how a payload is found again;
rows, commits, hashes and checks know no layout.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from dla_cache.durable import read_file
from dla_cache.errors import StoreError
from dla_cache.spec import LatentFormat, Recipe, canonical_json

FORMAT = "v1"
"""Written down and frozen in docs/format.md; before it there were previews, numbered 1 and 2."""

IMAGES = "images"
"""The series of image bytes; no modality has this name."""

CRC_BYTES = 4


class OpenShard(Protocol):
    """The files of a shard, mapped, and what tells where each payload lies."""

    def gather(self, local: NDArray[np.int64]) -> tuple[Any, list[int]]:
        """The payloads of some rows of the shard, and which of them do not have their checksum.

        Payloads are copies: an array uint8 [b, payload_bytes] for latents, a list of b `bytes` for images.
        """

    def checksum(self, row: int) -> int:
        """The CRC32C that stands beside the payload of a row of the shard."""


class LatentShard(OpenShard, Protocol):
    """A shard whose payloads have one size."""

    def copy(self, row: int, target: memoryview) -> bool:
        """Copies the payload of a row of the shard to `target`, uint8 [payload_bytes]; whether it has its checksum.

        The copy is what is checked: what others do to the file in between does not get out unseen.
        """


class SeriesLayout(Protocol):
    """How the shards of one series lie on disk."""

    def files(self, shard: int) -> tuple[str, ...]:
        """Paths of a shard's files in the store's folder, the one with the payloads first."""

    def encode(self, image_ids: Sequence[str], payloads: Sequence[bytes | None]) -> tuple[bytes, ...]:
        """The bytes of these files: the same payloads under the same IDs give the same bytes.

        None stands for a removed image: it leaves zeros, or no member. All-zero payloads are written like
        any other: absent means not computed.

        Raises:
            StoreError: if an image ID cannot be written in this layout.
        """

    def open(self, contents: Sequence[Any], n_rows: int) -> OpenShard:
        """A shard of `n_rows` payloads, of the bytes of its files or read-only maps of them.

        Raises:
            ValueError: if sizes or index are not those of such a shard.
        """


class Layout(Protocol):
    """How a whole store lies on disk."""

    @property
    def name(self) -> str: ...
    @property
    def main_file(self) -> str:
        """The file that is written last: a folder that has it is a store of this layout."""

    def is_part(self, name: str) -> bool:
        """Whether a thing of that name may lie in a store's folder."""

    def latents(self, recipe: Recipe, shard_size: int) -> SeriesLayout: ...
    def images(self) -> SeriesLayout: ...
    def metadata_files(
        self, facts: Mapping[str, Any], recipes: Mapping[str, Recipe], n_rows: int
    ) -> dict[str, dict[str, Any]]:
        """The JSON of every metadata file by its path, in the order of writing; `facts` is what all layouts say."""

    def read_attributes(self, store: Path) -> dict[str, Any]:
        """What the main file says of the store, unchecked."""

    def recipe_files(self, attributes: Mapping[str, Any]) -> tuple[str, ...]:
        """The metadata files but the main file, of what that says of the store."""

    def read_recipes(self, store: Path, attributes: Mapping[str, Any]) -> dict[str, Recipe]:
        """The recipes by modality.

        Raises:
            StoreError: if one is not that of the attributes.
        """


class OtherSamplesError(ValueError):
    """The first or the last sample of a shard is not the one that was committed."""

    def __init__(self, rows: Sequence[int]) -> None:
        """
        Args:
            rows: of the shard, which one or both.
        """
        super().__init__("its checksum is not the one that was committed")
        self.rows = tuple(rows)


def open_shard(
    layout: SeriesLayout,
    contents: Sequence[Any],
    n_rows: int,
    size_bytes: int,
    edge_crc32c: tuple[int, int] | None = None,
) -> OpenShard:
    """The shard in these files, which have as many bytes together as were committed.

    Args:
        edge_crc32c: what its record says; None where other rows than these were committed.

    Raises:
        ValueError: if sizes, index or edges are not those of such a shard.
    """
    found = sum(len(content) for content in contents)
    if found != size_bytes:
        raise ValueError(f"it has {found} bytes, {size_bytes} were committed")
    opened = layout.open(contents, n_rows)
    if edge_crc32c is not None:
        found_edges = edges_of(opened, n_rows)
        rows = [row for row, one, other in zip((0, n_rows - 1), found_edges, edge_crc32c, strict=True) if one != other]
        if rows:
            raise OtherSamplesError(rows)
    return opened


def edges_of(shard: OpenShard, n_rows: int) -> tuple[int, int]:
    """The checksums of the first and the last payload."""
    return shard.checksum(0), shard.checksum(n_rows - 1)


def stored_dtype(latent: LatentFormat) -> np.dtype[Any]:
    """Of the numbers on disk, little endian: bfloat16, which NumPy does not know, lies there as its bits."""
    return np.dtype("uint16" if latent.dtype == "bfloat16" else latent.dtype).newbyteorder("<")


def payload_bytes(latent: LatentFormat) -> int:
    """Bytes of one sample."""
    return math.prod(latent.shape) * stored_dtype(latent).itemsize


def commits_folder(store: Path, series: str) -> Path:
    return store / "commits" / series


def gather_latents(
    shard: LatentShard, size_bytes: int, local: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], list[int]]:
    """`OpenShard.gather` of a shard whose payloads have `size_bytes` each."""
    payloads = np.empty((len(local), size_bytes), np.uint8)
    targets = enumerate(zip(local.tolist(), rows_of(payloads), strict=True))
    return payloads, [place for place, (row, target) in targets if not shard.copy(row, target)]


def rows_of(payloads: NDArray[np.uint8]) -> list[memoryview]:
    """Each row of contiguous [B, n] as a memoryview, much cheaper to make and to fill than a NumPy array."""
    whole, size = payloads.reshape(-1).data, payloads.shape[1]
    return [whole[start : start + size] for start in range(0, payloads.size, size)]


def with_crc32c(content: bytes) -> bytes:
    """Bytes and then their CRC32C, little endian."""
    return content + crc32c(content).to_bytes(CRC_BYTES, "little")


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with the sha256 of all of them."""
    return {**attributes, "sha256": hashlib.sha256(canonical_json(attributes).encode()).hexdigest()}


def read_json(path: Path) -> Any:
    """What a file of metadata says.

    Raises:
        ValueError: naming the file, if it is no JSON.
    """
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path.name}` is no JSON: {error}") from error


def not_as_written(store: Path, what: str) -> StoreError:
    """For metadata that does not have its hash."""
    return StoreError(
        f"the {what} of `{store}` is not the one that was written",
        hint="restore it from a copy, or build again in a new folder",
    )
