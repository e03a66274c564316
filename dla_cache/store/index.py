"""The index beside a shard's file: where each payload lies, and its checksum.

`dlaindex`, then for each row offset and size as uint64 and the payload's CRC32C as uint32, then the CRC32C of all
that; little endian, nothing between. With it a payload is found without reading what lies before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from dla_cache.store.layout import CRC_BYTES, with_crc32c

MAGIC = b"dlaindex"

ENTRY = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc32c", "<u4")])
ONE_ENTRY = Struct("<QQI")


def encode_index(offsets: Sequence[int], payloads: Sequence[bytes]) -> bytes:
    """The index of payloads that begin at these bytes of their file; of a removed image 0, and no bytes."""
    entries = np.zeros(len(payloads), ENTRY)
    entries["offset"] = offsets
    entries["size"] = [len(payload) for payload in payloads]
    entries["crc32c"] = [crc32c(payload) for payload in payloads]
    return with_crc32c(MAGIC + entries.tobytes())


def parse_index(content: Any, n_rows: int, file_bytes: int) -> NDArray[np.void]:
    """The entries [n_rows] of an index, each within a file of `file_bytes`.

    Raises:
        ValueError: if the index is damaged, of another number of rows, or leads out of the file.
    """
    content = bytes(content)
    expected = len(MAGIC) + n_rows * ENTRY.itemsize + CRC_BYTES
    if len(content) != expected:
        raise ValueError(f"its index has {len(content)} bytes, {n_rows} images make {expected}")
    if not content.startswith(MAGIC) or with_crc32c(content[:-CRC_BYTES]) != content:
        raise ValueError("its index is damaged")
    entries = np.frombuffer(content, ENTRY, count=n_rows, offset=len(MAGIC))
    # Sizes first: the difference below must not wrap round.
    if (entries["size"] > file_bytes).any() or (entries["offset"] > file_bytes - entries["size"]).any():
        raise ValueError("its index leads out of the file")
    return entries


def checksum_at(entries: bytes, row: int) -> int:
    """The CRC32C in the entry of a row of the shard."""
    return int(ONE_ENTRY.unpack_from(entries, row * ENTRY.itemsize)[2])


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """Payloads of any sizes in one file."""

    content: Any
    entries: bytes

    def payload(self, row: int) -> tuple[bytes, bool]:
        """The payload of a row of the shard, and whether it has its checksum."""
        offset, size, checksum = ONE_ENTRY.unpack_from(self.entries, row * ENTRY.itemsize)
        payload = self.content[offset : offset + size]
        return payload, crc32c(payload) == checksum

    def checksum(self, row: int) -> int:
        return checksum_at(self.entries, row)

    def gather(self, local: NDArray[np.int64]) -> tuple[list[bytes], list[int]]:
        found = [self.payload(row) for row in local.tolist()]
        return [payload for payload, _ in found], [place for place, (_, intact) in enumerate(found) if not intact]


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """Shards of one series as payloads without a gap, and the index beside."""

    folder: str

    def files(self, shard: int) -> tuple[str, ...]:
        return f"{self.folder}/{shard:06d}.blob", f"{self.folder}/{shard:06d}.index"

    def encode(self, image_ids: Sequence[str], payloads: Sequence[bytes | None]) -> tuple[bytes, ...]:
        contents = [payload or b"" for payload in payloads]
        starts = np.cumsum([0, *(len(content) for content in contents)])[:-1].tolist()
        offsets = [start if content else 0 for start, content in zip(starts, contents, strict=True)]
        return b"".join(contents), encode_index(offsets, contents)

    def open(self, contents: Sequence[Any], n_rows: int) -> IndexedShard:
        blob, index = contents
        return IndexedShard(blob, parse_index(index, n_rows, len(blob)).tobytes())
