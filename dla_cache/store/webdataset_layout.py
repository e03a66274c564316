"""The WebDataset layout: a series of tars for each modality and one for the images, joined by image ID.

Members are `<image ID>.depth.npy` and `<image ID>.jpg`, so that stock readers find the ID as the key. The index
beside a tar makes any sample a random read; it is ours, and stock readers never ask for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from dla_cache.modality import is_modality
from dla_cache.spec import LatentFormat, Recipe
from dla_cache.store.index import ENTRY, ONE_ENTRY, IndexedShard, checksum_at, encode_index, parse_index
from dla_cache.store.layout import IMAGES, gather_latents, payload_bytes, read_json, sealed, stored_dtype
from dla_cache.store.tar_bytes import BLOCK_BYTES, encode_tar, image_suffix

NPY_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TarShard:
    """Members of one size in a tar, each at the beginning of a block."""

    content: memoryview
    entries: bytes
    header_bytes: int
    """Of a member, before the payload."""
    payload_bytes: int

    def copy(self, row: int, target: memoryview) -> bool:
        offset, _, checksum = ONE_ENTRY.unpack_from(self.entries, row * ENTRY.itemsize)
        start = offset + self.header_bytes
        target[:] = self.content[start : start + self.payload_bytes]
        return bool(crc32c(target, crc32c(self.content[offset:start])) == checksum)

    def checksum(self, row: int) -> int:
        return checksum_at(self.entries, row)

    def gather(self, local: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        return gather_latents(self, self.payload_bytes, local)


@dataclass(frozen=True, slots=True)
class LatentTars:
    """The shards of one modality: `.npy` files in tars."""

    modality: str
    npy_header: bytes
    payload_bytes: int

    def files(self, shard: int) -> tuple[str, ...]:
        return _tar_files(self.modality, shard)

    def encode(self, image_ids: Sequence[str], payloads: Sequence[bytes | None]) -> tuple[bytes, ...]:
        names = [f"{image_id}.{self.modality}.npy" for image_id in image_ids]
        return _encode(names, [None if payload is None else self.npy_header + payload for payload in payloads])

    def open(self, contents: Sequence[Any], n_rows: int) -> TarShard:
        tar, index = contents
        entries = parse_index(index, n_rows, len(tar))
        member = len(self.npy_header) + self.payload_bytes
        if not np.isin(entries["size"], (member, 0)).all() or (entries["offset"] % BLOCK_BYTES).any():
            raise ValueError("its index is not that of such samples")
        return TarShard(memoryview(tar), entries.tobytes(), len(self.npy_header), self.payload_bytes)


@dataclass(frozen=True, slots=True)
class ImageTars:
    """The images' own bytes: `.jpg`, `.png` and other files in tars."""

    def files(self, shard: int) -> tuple[str, ...]:
        return _tar_files(IMAGES, shard)

    def encode(self, image_ids: Sequence[str], payloads: Sequence[bytes | None]) -> tuple[bytes, ...]:
        pairs = zip(image_ids, payloads, strict=True)
        return _encode([f"{image_id}.{image_suffix(payload or b'')}" for image_id, payload in pairs], payloads)

    def open(self, contents: Sequence[Any], n_rows: int) -> IndexedShard:
        tar, index = contents
        return IndexedShard(tar, parse_index(index, n_rows, len(tar)).tobytes())


class WebDatasetLayout:
    """Tars, and `dla.json`, which says what the store is."""

    name = "webdataset"
    main_file = "dla.json"

    def is_part(self, name: str) -> bool:
        return name in ("dla.json", "rows", "commits", "claims", IMAGES) or is_modality(name)

    def latents(self, recipe: Recipe, shard_size: int) -> LatentTars:
        return LatentTars(recipe.modality.value, npy_header(recipe.format), payload_bytes(recipe.format))

    def images(self) -> ImageTars:
        return ImageTars()

    def metadata_files(
        self, facts: Mapping[str, Any], recipes: Mapping[str, Recipe], n_rows: int
    ) -> dict[str, dict[str, Any]]:
        dumped = {modality: recipe.model_dump(mode="json") for modality, recipe in recipes.items()}
        hashes = {modality: recipe.hash for modality, recipe in recipes.items()}
        return {self.main_file: sealed({**facts, "layout": self.name, "recipes": dumped, "recipe_hashes": hashes})}

    def read_attributes(self, store: Path) -> dict[str, Any]:
        attributes: dict[str, Any] = read_json(store / self.main_file)
        return attributes

    def recipe_files(self, attributes: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def read_recipes(self, store: Path, attributes: Mapping[str, Any]) -> dict[str, Recipe]:
        return {modality: Recipe.model_validate(recipe) for modality, recipe in attributes["recipes"].items()}


def npy_header(latent: LatentFormat) -> bytes:
    """What stands before the numbers of one sample in a `.npy` file.

    Not numpy's own: that of one version of numpy need not be that of another.

    Source: NumPy Enhancement Proposal 1, format version 1.0.
    """
    shape = ", ".join(str(size) for size in latent.shape) + ("," if len(latent.shape) == 1 else "")
    text = f"{{'descr': '{stored_dtype(latent).str}', 'fortran_order': False, 'shape': ({shape}), }}"
    size = -(-(10 + len(text) + 1) // NPY_ALIGNMENT) * NPY_ALIGNMENT
    return b"\x93NUMPY\x01\x00" + (size - 10).to_bytes(2, "little") + text.ljust(size - 11).encode() + b"\n"


def _tar_files(series: str, shard: int) -> tuple[str, ...]:
    return f"{series}/{series}-{shard:06d}.tar", f"{series}/{series}-{shard:06d}.index"


def _encode(names: Sequence[str], members: Sequence[bytes | None]) -> tuple[bytes, ...]:
    kept = [(name, member) for name, member in zip(names, members, strict=True) if member is not None]
    tar, starts = encode_tar([name for name, _ in kept], [member for _, member in kept])
    following = iter(starts)
    offsets = [0 if member is None else next(following) for member in members]
    return tar, encode_index(offsets, [member or b"" for member in members])
