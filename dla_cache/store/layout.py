"""How a store lies on disk: paths, Zarr v3 metadata, and the bytes of a shard. Pure.

A shard is one file: a record a sample (payload, then its CRC32C) at a fixed stride, then the index
that Zarr's sharding codec asks for. Any Zarr client reads it; a reader that knows the stride needs
no index to find a sample.

Legend: B samples of a batch, n samples of a shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from dla_cache.spec import Recipe

FORMAT = 2
"""Raised when a store of the old layout can no longer be read by the new code; 1 kept no hash of its row table."""

INTACT = 0x48674BC7
"""CRC32C of any bytes followed by their own CRC32C, little endian: a property of the polynomial."""

CRC_BYTES = 4
ABSENT = 2**64 - 1
"""Offset and size, in a Zarr shard index, of a chunk that is not there."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The byte layout of every shard of one array."""

    sample_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shard_size: int

    @classmethod
    def of(cls, recipe: Recipe, shard_size: int) -> "ShardLayout":
        return cls(recipe.format.shape, np.dtype(recipe.format.dtype).newbyteorder("<"), shard_size)

    @property
    def payload_bytes(self) -> int:
        """Bytes of one sample."""
        return int(np.prod(self.sample_shape)) * self.dtype.itemsize

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return self.payload_bytes + CRC_BYTES

    def index(self, n_rows: int) -> bytes:
        """The shard index of `n_rows` samples.

        Source: zarr-specs, "Sharding codec", version 1.0: per inner chunk offset and size as
        uint64, both 2**64 - 1 where there is none; its own CRC32C after it.
        """
        entries = np.full((self.shard_size, 2), ABSENT, "<u8")
        entries[:n_rows, 0] = np.arange(n_rows) * self.stride
        entries[:n_rows, 1] = self.stride
        return _with_crc(entries.tobytes())

    def encode(self, samples: NDArray[np.generic]) -> bytes:
        """The file of samples [n, *sample_shape] of the stored dtype.

        All-zero samples are written like any other: absent means not computed.
        """
        return b"".join(_with_crc(sample.tobytes()) for sample in samples) + self.index(len(samples))

    def records(self, content: Any, n_rows: int) -> NDArray[np.uint8]:
        """The records of a shard file as a read-only view, uint8 [n, stride].

        Args:
            content: the file's bytes, or a read-only map of them.

        Raises:
            ValueError: if the file has another size or index than `n_rows` samples make.
        """
        index = self.index(n_rows)
        end = n_rows * self.stride
        if len(content) != end + len(index):
            raise ValueError(f"it has {len(content)} bytes, {end + len(index)} were committed")
        if content[end:] != index:
            raise ValueError("its index is damaged")
        return np.frombuffer(content, np.uint8, count=end).reshape(n_rows, self.stride)

    def samples(
        self, records: NDArray[np.uint8], order: NDArray[np.int64] | slice = slice(None)
    ) -> NDArray[np.generic]:
        """The payloads of records [n, stride] in some order, a new array [B, *sample_shape]; checks nothing."""
        payload = np.ascontiguousarray(records[order, : self.payload_bytes])
        return payload.view(self.dtype).reshape(len(payload), *self.sample_shape)


def damaged_records(records: NDArray[np.uint8]) -> list[int]:
    """Positions of the records [B, stride] whose payload does not fit its CRC32C.

    One call a record over payload and checksum together: no slicing, no comparison in Python of
    bytes to bytes. Needs contiguous records; google_crc32c takes read-only arrays only.
    """
    frozen = records.view()
    frozen.flags.writeable = False
    checksums = np.fromiter(map(google_crc32c.value, frozen), np.uint32, count=len(records))
    return [int(position) for position in np.flatnonzero(checksums != INTACT)]


def _with_crc(content: bytes) -> bytes:
    return content + int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


def array_folder(store: Path, modality: str) -> Path:
    return store / "latents" / modality


def shard_path(store: Path, modality: str, shard: int, sample_shape: Sequence[int]) -> Path:
    """The shard's file: one flat folder, because nested chunk folders would cost several inodes a shard."""
    return array_folder(store, modality) / ".".join(["c", str(shard), *("0" for _ in sample_shape)])


def commits_folder(store: Path, modality: str) -> Path:
    return store / "commits" / modality


def group_metadata(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {"dla": attributes} if attributes else {}}


def array_metadata(recipe: Recipe, n_rows: int, shard_size: int) -> dict[str, Any]:
    """`zarr.json` of one modality: a plain Zarr v3 array [n_rows, *shape], its recipe as attribute.

    Source: zarr-specs, Zarr core 3.1 and "Sharding codec" 1.0.
    """
    latent = recipe.format
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, *latent.shape],
        "codecs": plain,
        "index_codecs": plain,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_rows, *latent.shape],
        "data_type": latent.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_size, *latent.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if latent.kind == "continuous" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["image", *latent.axes],
        "attributes": {"dla": {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe.hash}},
    }
