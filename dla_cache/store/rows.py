"""The row table: which image has which row. Everything else in a store follows it."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dla_cache.errors import MissingLatentError, StoreError, name_some
from dla_cache.manifest import Label, Manifest, label_of_cell, label_type
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.shards import Shard


def schema_of(*, is_multi_label: bool) -> pa.Schema:
    """The columns of a row table."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("image_id", pa.string()),
            ("sha256", pa.string()),
            ("split", pa.string()),
            ("label", label_type(is_multi_label=is_multi_label)),
            ("uri", pa.string()),
            # A removed image keeps its row and its ID, and nothing else.
            ("removed", pa.bool_()),
        ]
    )


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One row: an image as the manifest of the build knew it."""

    row: int
    image_id: str
    sha256: str
    split: str
    label: Label | None
    uri: str
    removed: bool = False


class RowTable:
    """The images of a store in row order; row numbers are 0, 1, 2, …"""

    def __init__(self, images: Sequence[StoredImage], *, is_multi_label: bool = False) -> None:
        """
        Args:
            is_multi_label: whether labels are tuples of class indices.
        """
        self.images = tuple(images)
        self.is_multi_label = is_multi_label

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, row: int) -> StoredImage: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[StoredImage, ...]: ...
    def __getitem__(self, row: int | slice) -> StoredImage | tuple[StoredImage, ...]:
        return self.images[row]

    def __iter__(self) -> Iterator[StoredImage]:
        return iter(self.images)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RowTable) and self.images == other.images and self.is_multi_label == other.is_multi_label
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        return tuple(image.image_id for image in self.images)

    @cached_property
    def kept_ids(self) -> tuple[str, ...]:
        """The IDs in row order without those of removed images."""
        return tuple(image.image_id for image in self.images if not image.removed)

    @cached_property
    def removed_ids(self) -> frozenset[str]:
        return frozenset(image.image_id for image in self.images if image.removed)

    @cached_property
    def splits(self) -> frozenset[str]:
        return frozenset(image.split for image in self.images if not image.removed)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {image.image_id: image.row for image in self.images if not image.removed}

    def kept_ids_of(self, shard: Shard) -> tuple[str, ...]:
        """Those of a shard."""
        return tuple(image.image_id for image in self.images[shard.start : shard.stop] if not image.removed)

    def without(self, image_ids: Collection[str]) -> "RowTable":
        """The same rows, those of these images as of removed ones."""
        doomed = frozenset(image_ids)
        images = [
            replace(image, sha256="", uri="", label=None, removed=True) if image.image_id in doomed else image
            for image in self
        ]
        return RowTable(images, is_multi_label=self.is_multi_label)

    def row_of(self, image_id: str) -> int:
        """The row of an image.

        Raises:
            MissingLatentError: if the store does not know it.
        """
        try:
            return self._row_of[image_id]
        except KeyError:
            if image_id in self.image_ids:
                raise MissingLatentError(
                    f"image `{image_id}` was removed from the store",
                    hint="only its ID is kept; a `takedown.json` in the store says that images are being removed:"
                    " `dla cache takedown` again finishes it",
                ) from None
            raise MissingLatentError(
                f"the store has no image `{image_id}`",
                hint="its `rows.parquet` lists the IDs, and so does the manifest",
            ) from None

    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The rows of some splits in row order, [n]; of all splits when None. Removed images are left out.

        Raises:
            StoreError: if a split has no image.
        """
        absent = sorted(set(splits or ()) - self.splits)
        if absent:
            raise StoreError(
                f"the store has no image of split {name_some(absent)}",
                hint=f"its splits are {', '.join(f'`{split}`' for split in sorted(self.splits))}",
            )
        chosen = self.splits if splits is None else set(splits)
        return np.array([image.row for image in self if image.split in chosen and not image.removed], np.int64)

    def changed_images(self, rows: Sequence[int], contents: Sequence[bytes]) -> list[int]:
        """Those rows whose image, of these files in the order of `rows`, does not have the sha256 of the table."""
        return [
            row
            for row, content in zip(rows, contents, strict=True)
            if hashlib.sha256(content).hexdigest() != self[row].sha256
        ]

    def to_parquet(self) -> bytes:
        schema = schema_of(is_multi_label=self.is_multi_label)
        columns = {name: [getattr(image, name) for image in self.images] for name in schema.names}
        return to_parquet(pa.table(columns, schema=schema))

    @classmethod
    def from_parquet(cls, content: bytes) -> "RowTable":
        """The table in the bytes of a file.

        Raises:
            StoreError: if they are no row table.
        """
        try:
            table = from_parquet(content)
            is_multi_label = pa.types.is_list(table.schema.field("label").type)
            table = table.cast(schema_of(is_multi_label=is_multi_label))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise StoreError(f"`rows.parquet` is no row table: {error}", hint="restore it from a copy") from error
        images = [StoredImage(**row | {"label": label_of_cell(row["label"])}) for row in table.to_pylist()]
        rows = cls(images, is_multi_label=is_multi_label)
        if any(image.row != row for row, image in enumerate(rows)):
            raise StoreError("`rows.parquet` skips a row", hint="a newer dla may have written it: upgrade")
        return rows

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "RowTable":
        """Rows in the manifest's order."""
        return cls(
            [
                StoredImage(row, image.image_id, image.sha256, image.split, image.label, image.uri)
                for row, image in enumerate(manifest.rows())
            ],
            is_multi_label=manifest.is_multi_label,
        )
