"""The Zarr layout: each modality a plain Zarr v3 array, one file a shard, that any Zarr client reads.

A shard of latents is one file: a record a sample (payload, then its CRC32C) at a fixed stride, then the index
that Zarr's sharding codec asks for. A reader that knows the stride needs no index to find a sample. Image bytes,
which are no array, lie in blobs with an index beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from fastcrc.crc32 import iscsi as crc32c
from numpy.typing import NDArray

from dla_cache.spec import Modality, Recipe
from dla_cache.store.index import BlobLayout
from dla_cache.store.layout import (
    CRC_BYTES,
    IMAGES,
    gather_latents,
    not_as_written,
    payload_bytes,
    read_json,
    sealed,
    stored_dtype,
    with_crc32c,
)

MEANING = {
    **dict.fromkeys(("float16", "float32"), "as they are"),
    **dict.fromkeys(("uint8", "int16", "int32"), "codes"),
    "bfloat16": "each is the upper 16 bits of a float32, its lower 16 bits are 0",
    "int8": "float32(number) * scale + offset of its channel, see recipe.format.quantisation",
}
"""What the numbers of an array stand for, by the dtype that the recipe says: an attribute for who knows no recipe."""

ABSENT = 2**64 - 1
"""Offset and size, in a Zarr shard index, of a chunk that is not there."""

CHECKSUM = Struct("<I")


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Records of one size in a file, each a payload and its CRC32C."""

    content: memoryview
    payload_bytes: int

    def copy(self, row: int, target: memoryview) -> bool:
        start = row * (self.payload_bytes + CRC_BYTES)
        end = start + self.payload_bytes
        target[:] = self.content[start:end]
        return bool(crc32c(target) == CHECKSUM.unpack_from(self.content, end)[0])

    def checksum(self, row: int) -> int:
        end = row * (self.payload_bytes + CRC_BYTES) + self.payload_bytes
        return int(CHECKSUM.unpack_from(self.content, end)[0])

    def gather(self, local: NDArray[np.int64]) -> tuple[NDArray[np.uint8], list[int]]:
        return gather_latents(self, self.payload_bytes, local)


@dataclass(frozen=True, slots=True)
class ZarrShards:
    """The shards of one modality's array."""

    modality: str
    n_axes: int
    payload_bytes: int
    shard_size: int

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return self.payload_bytes + CRC_BYTES

    def files(self, shard: int) -> tuple[str, ...]:
        """One flat folder, because nested chunk folders would cost several inodes a shard."""
        chunk = ".".join(["c", str(shard), *["0"] * self.n_axes])
        return (f"latents/{self.modality}/{chunk}",)

    def index(self, n_rows: int) -> bytes:
        """The shard index of `n_rows` samples.

        Source: zarr-specs, "Sharding codec", version 1.0: per inner chunk offset and size as
        uint64, both 2**64 - 1 where there is none; its own CRC32C after it.
        """
        return _shard_index(self.shard_size, self.stride, n_rows)

    def encode(self, image_ids: Sequence[str], payloads: Sequence[bytes | None]) -> tuple[bytes, ...]:
        blank = bytes(self.payload_bytes)  # a removed image's: the stride stays
        records = [with_crc32c(blank if payload is None else payload) for payload in payloads]
        return (b"".join(records) + self.index(len(payloads)),)

    def open(self, contents: Sequence[Any], n_rows: int) -> StridedShard:
        (content,) = contents
        index = self.index(n_rows)
        end = n_rows * self.stride
        if len(content) != end + len(index):
            raise ValueError(f"it has {len(content)} bytes, {n_rows} samples make {end + len(index)}")
        if content[end:] != index:
            raise ValueError("its index is damaged")
        return StridedShard(memoryview(content), self.payload_bytes)


@lru_cache(16)  # of few kinds, and every shard is held to one when it is opened
def _shard_index(shard_size: int, stride: int, n_rows: int) -> bytes:
    entries = np.full((shard_size, 2), ABSENT, "<u8")
    entries[:n_rows, 0] = np.arange(n_rows) * stride
    entries[:n_rows, 1] = stride
    return with_crc32c(entries.tobytes())


class ZarrLayout:
    """A Zarr v3 group; its attributes say what the store is."""

    name = "zarr"
    main_file = "zarr.json"

    def is_part(self, name: str) -> bool:
        return name in ("zarr.json", "rows", "latents", "images", "commits", "claims")

    def latents(self, recipe: Recipe, shard_size: int) -> ZarrShards:
        latent = recipe.format
        return ZarrShards(recipe.modality.value, len(latent.shape), payload_bytes(latent), shard_size)

    def images(self) -> BlobLayout:
        return BlobLayout(IMAGES)

    def metadata_files(
        self, facts: Mapping[str, Any], recipes: Mapping[str, Recipe], n_rows: int
    ) -> dict[str, dict[str, Any]]:
        arrays = {
            f"latents/{modality}/zarr.json": _array_metadata(recipe, n_rows, facts["shard_size"])
            for modality, recipe in recipes.items()
        }
        attributes = sealed({**facts, "recipes": {modality: recipe.hash for modality, recipe in recipes.items()}})
        return {**arrays, "latents/zarr.json": _group_metadata({}), "zarr.json": _group_metadata({"dla": attributes})}

    def read_attributes(self, store: Path) -> dict[str, Any]:
        attributes: dict[str, Any] = read_json(store / "zarr.json")["attributes"]["dla"]
        return attributes

    def recipe_files(self, attributes: Mapping[str, Any]) -> tuple[str, ...]:
        of_arrays = [f"latents/{Modality(modality).value}/zarr.json" for modality in attributes["recipes"]]
        return ("latents/zarr.json", *of_arrays)

    def read_recipes(self, store: Path, attributes: Mapping[str, Any]) -> dict[str, Recipe]:
        # A recipe stands in its array's attributes and nowhere else, so that two copies cannot disagree.
        recipes = {}
        for modality, recipe_hash in attributes["recipes"].items():
            name = f"latents/{modality}/zarr.json"
            array = read_json(store / name)
            try:
                recipes[modality] = Recipe.model_validate(array["attributes"]["dla"]["recipe"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"`{name}` holds no recipe: {error}") from error
            if recipes[modality].hash != recipe_hash:
                raise not_as_written(store, f"recipe of `{modality}`")
        return recipes


def _group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _array_metadata(recipe: Recipe, n_rows: int, shard_size: int) -> dict[str, Any]:
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
    told = {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe.hash, "numbers": MEANING[latent.dtype]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_rows, *latent.shape],
        "data_type": stored_dtype(latent).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_size, *latent.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if stored_dtype(latent).kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["image", *latent.axes],
        "attributes": {"dla": told},
    }
