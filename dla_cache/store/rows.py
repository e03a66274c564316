"""The row table: which image has which row. Everything else in a store follows it."""

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dla_cache.errors import MissingLatentError, StoreError, name_some
from dla_cache.manifest import Label, Manifest
from dla_cache.shards import Shard
from dla_cache.store.row_blocks import (
    BLOCK_ROWS,
    RowBlock,
    StoredImage,
    hex_to_binary,
    schema_of,
    table_of,
)
from dla_cache.store.row_parts import RowPart, is_same_part, merged, parts_of, stretches_of

__all__ = ["RowTable", "StoredImage"]

ROWS_AT_HAND = 2**16

Rows = Sequence[int] | NDArray[np.int64]
"""Row numbers."""


class RowTable:
    """The images of a store in row order. Row numbers rise; where images were appended some may be skipped.

    Rows are read when they are asked for, a block at a time: a table of ten million images opens in no time.
    """

    def __init__(self, images: Iterable[StoredImage] = (), *, is_multi_label: bool = False) -> None:
        """
        Args:
            images: by rising row numbers.
            is_multi_label: whether labels are tuples of class indices.
        """
        self._take(parts_of(table_of(list(images), is_multi_label=is_multi_label)), is_multi_label)

    def _take(self, parts: Sequence[RowPart], is_multi_label: bool) -> None:
        self.parts = tuple(parts)
        self.is_multi_label = is_multi_label
        self._starts = [part.start for part in self.parts]
        self._n_rows = sum(part.n_rows for part in self.parts)
        self.end = self.parts[-1].stop if self.parts else 0
        """One more than the last row's number."""

    @classmethod
    def of_parts(cls, parts: Sequence[RowPart], *, is_multi_label: bool) -> "RowTable":
        """A table of parts by rising rows, which are read when they are needed."""
        table = cls.__new__(cls)
        table._take(parts, is_multi_label)
        return table

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> "RowTable":
        """Rows in the manifest's order."""
        n_rows, listed = len(manifest), manifest.table
        columns = {
            "row": pa.array(np.arange(n_rows)),
            "sha256": hex_to_binary(listed["sha256"]),
            "removed": pa.array(np.zeros(n_rows, bool)),
        }
        schema = schema_of(is_multi_label=manifest.is_multi_label)
        table = pa.table([columns[name] if name in columns else listed[name] for name in schema.names], schema=schema)
        return cls.of_parts(parts_of(table), is_multi_label=manifest.is_multi_label)

    def __len__(self) -> int:
        """Rows, those of removed images too."""
        return self._n_rows

    @overload
    def __getitem__(self, row: int) -> StoredImage: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[StoredImage, ...]: ...
    def __getitem__(self, row: int | slice) -> StoredImage | tuple[StoredImage, ...]:
        if isinstance(row, slice):
            wanted = range(*row.indices(self.end))
            return tuple(self[number] for number in wanted if self._part_at(number) is not None)
        block, place = self._place_of(row)
        return block.image(place)

    def __iter__(self) -> Iterator[StoredImage]:
        return chain.from_iterable(block.images() for block in self._blocks())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowTable):
            return NotImplemented
        if (len(self), self.end, self.is_multi_label) != (len(other), other.end, other.is_multi_label):
            return False
        if [(part.start, part.n_rows) for part in self.parts] != [(part.start, part.n_rows) for part in other.parts]:
            return all(one == two for one, two in zip(self, other, strict=True))
        return all(map(is_same_part, self.parts, other.parts))

    __hash__ = None  # type: ignore[assignment]

    def _blocks(self) -> Iterator[RowBlock]:
        return chain.from_iterable(part.blocks() for part in self.parts)

    def _part_at(self, row: int) -> RowPart | None:
        part = self.parts[bisect_right(self._starts, row) - 1] if self.parts else None
        return part if part is not None and part.start <= row < part.stop else None

    def _place_of(self, row: int) -> tuple[RowBlock, int]:
        part = self._part_at(row)
        if part is None:
            raise IndexError(f"there is no row {row}")
        number, place = divmod(row - part.start, BLOCK_ROWS)
        return part.block(number), place

    def _places_of(self, rows: Rows) -> Iterable[tuple[RowBlock, int]]:
        if len(self.parts) != 1:
            return map(self._place_of, rows)
        (part,) = self.parts
        local = np.asarray(rows, np.int64) - part.start
        if len(local) and not 0 <= local.min() <= local.max() < part.n_rows:
            raise IndexError(f"there are no rows from {local.min() + part.start} to {local.max() + part.start}")
        numbers, places = np.divmod(local, BLOCK_ROWS)
        return zip(map(part.block, numbers.tolist()), places.tolist(), strict=True)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where rows follow each other without a gap: start and stop of each stretch."""
        spans: list[tuple[int, int]] = []
        for part in self.parts:
            if spans and spans[-1][1] == part.start:
                spans[-1] = (spans[-1][0], part.stop)
            else:
                spans.append((part.start, part.stop))
        return spans

    def known(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which numbers are rows of the table, those of removed images too."""
        known = np.zeros(len(rows), bool)
        for start, stop in self.spans:
            known |= (rows >= start) & (rows < stop)
        return known

    @property
    def image_ids(self) -> "ImageIds":
        """Every image's ID by its row, those of removed images too."""
        return ImageIds(self)

    @cached_property
    def _at_hand(self) -> tuple[list[str], list[Label | None]] | None:
        """The IDs and labels of all rows, if these are so few that they had better be lists."""
        if len(self) > ROWS_AT_HAND or self.spans != [(0, len(self))]:
            return None
        return list(self.image_ids), list(chain.from_iterable(block.labels for block in self._blocks()))

    def ids_of(self, rows: Rows) -> tuple[str, ...]:
        """The IDs of some rows, in their order."""
        if self._at_hand is not None:
            return tuple([self._at_hand[0][row] for row in _as_list(rows)])
        return tuple([block.image_id(place) for block, place in self._places_of(rows)])

    def labels_of(self, rows: Rows) -> list[Label | None]:
        """The labels of some rows, in their order."""
        if self._at_hand is not None:
            return [self._at_hand[1][row] for row in _as_list(rows)]
        return [block.labels[place] for block, place in self._places_of(rows)]

    def images_of(self, rows: Rows) -> list[StoredImage]:
        """Some rows, in their order: much faster than one by one where they are neighbours."""
        found: list[StoredImage] = []
        for _, run in groupby(self._places_of(rows), key=lambda at: id(at[0])):
            places = list(run)
            found += places[0][0].images([place for _, place in places])
        return found

    def label_numbers(self, rows: Rows) -> NDArray[np.int64]:
        """The labels of some rows as numbers, [n], -1 where there is none; of tables of one label an image."""
        if self._numbers_at_hand is not None:
            return self._numbers_at_hand[rows]
        return _numbers_of(self.labels_of(rows))

    @cached_property
    def _numbers_at_hand(self) -> NDArray[np.int64] | None:
        return None if self._at_hand is None else _numbers_of(self._at_hand[1])

    def splits_of(self, rows: Rows) -> list[str]:
        """The splits of some rows, in their order."""
        found: list[str] = []
        for _, run in groupby(self._places_of(rows), key=lambda at: id(at[0])):
            places = list(run)
            column = places[0][0].column("split")
            found += column.take(pa.array([place for _, place in places])).to_pylist()
        return found

    @property
    def n_kept(self) -> int:
        """Images that were not removed."""
        return len(self) - sum(part.n_removed for part in self.parts)

    def kept(self) -> Iterator[StoredImage]:
        """The images that were not removed, in row order."""
        return (image for image in self if not image.removed)

    @property
    def kept_ids(self) -> tuple[str, ...]:
        """The IDs in row order without those of removed images."""
        return tuple(self.iter_kept_ids())

    def iter_kept_ids(self) -> Iterator[str]:
        """The same, one after another."""
        for block in self._blocks():
            ids = block.column("image_id").to_pylist()
            yield from (image_id for image_id, gone in zip(ids, block.removed.tolist(), strict=True) if not gone)

    @cached_property
    def removed_rows(self) -> frozenset[int]:
        found = []
        for part in self.parts:
            if part.n_removed:
                gone = np.concatenate([block.removed for block in part.blocks()])
                found += (np.flatnonzero(gone) + part.start).tolist()
        return frozenset(found)

    @cached_property
    def removed_ids(self) -> frozenset[str]:
        return frozenset(self.ids_of(sorted(self.removed_rows)))

    @cached_property
    def splits(self) -> frozenset[str]:
        return frozenset(split for part in self.parts for split in part.images_by_split)

    def n_of(self, split: str) -> int:
        """How many images a split has."""
        return sum(part.images_by_split.get(split, 0) for part in self.parts)

    @cached_property
    def row_by_id(self) -> dict[str, int]:
        """The row of every image that was not removed, in row order."""
        gone = self.removed_rows
        rows = chain.from_iterable(range(part.start, part.stop) for part in self.parts)
        return {image_id: row for image_id, row in zip(self.image_ids, rows, strict=True) if row not in gone}

    def kept_rows_of(self, shard: Shard) -> NDArray[np.int64]:
        """The rows of a shard whose images were not removed, [n]."""
        rows = np.arange(shard.start, shard.stop)
        gone = [row for row in self.removed_rows if shard.start <= row < shard.stop] if self.removed_rows else []
        return np.setdiff1d(rows, np.array(gone, np.int64), assume_unique=True) if gone else rows

    def kept_ids_of(self, shard: Shard) -> tuple[str, ...]:
        """Their IDs."""
        return self.ids_of(self.kept_rows_of(shard).tolist())

    def without(self, image_ids: Collection[str]) -> "RowTable":
        """The same rows, those of these images as of removed ones; parts without any of them stay what they are."""
        doomed = pa.array(sorted(image_ids), pa.string())
        parts = []
        for part in self.parts:
            blocks = [block.without(doomed) for block in part.blocks()]
            is_same = sum(int(block.removed.sum()) for block in blocks) == part.n_removed
            parts.append(part if is_same else RowPart.of_blocks(part.start, blocks))
        return RowTable.of_parts(parts, is_multi_label=self.is_multi_label)

    def row_of(self, image_id: str) -> int:
        """The row of an image.

        Raises:
            MissingLatentError: if the store does not know it.
        """
        try:
            return self.row_by_id[image_id]
        except KeyError:
            if image_id in self.removed_ids:
                raise MissingLatentError(
                    f"image `{image_id}` was removed from the store",
                    hint="only its ID is kept; a `takedown.json` in the store says that images are being removed:"
                    " `dla cache takedown` again finishes it",
                ) from None
            raise MissingLatentError(
                f"the store has no image `{image_id}`",
                hint="its row table lists the IDs, and so does the manifest",
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
        chosen = sorted(self.splits if splits is None else set(splits))
        stretches = chain.from_iterable(stretches_of(part, chosen) for part in self.parts)
        return np.concatenate([np.empty(0, np.int64), *merged(stretches)])

    def changed_images(self, rows: Sequence[int], contents: Sequence[bytes]) -> list[int]:
        """Those rows whose image, of these files in the order of `rows`, does not have the sha256 of the table."""
        return [
            row
            for row, content in zip(rows, contents, strict=True)
            if hashlib.sha256(content).hexdigest() != self[row].sha256
        ]


def _numbers_of(labels: Sequence[Label | None]) -> NDArray[np.int64]:
    return np.array([-1 if label is None else label for label in labels], np.int64)


def _as_list(rows: Rows) -> Sequence[int]:
    return rows.tolist() if isinstance(rows, np.ndarray) else rows


class ImageIds(Sequence[str]):
    """The IDs of a table as a sequence by row numbers."""

    def __init__(self, table: RowTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            return tuple(self)[row]
        block, place = self._table._place_of(row)
        return block.image_id(place)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(block.column("image_id").to_pylist() for block in self._table._blocks())

    def __contains__(self, image_id: object) -> bool:
        return any(image_id == known for known in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Iterable) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]
