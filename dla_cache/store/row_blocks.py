"""Rows a thousand at a time, as Arrow record batches: what a row table is made of, on disk and in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dla_cache.manifest import Label, label_of_cell, label_type

BLOCK_ROWS = 1024
"""Rows of a block: little enough to look up a single image, many enough for few checksums. Part of the format."""


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


def schema_of(*, is_multi_label: bool) -> pa.Schema:
    """The columns of a row table."""
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("image_id", pa.string(), nullable=False),
            # A removed image keeps its row, its ID and its split, and nothing else.
            pa.field("sha256", pa.binary(32)),
            pa.field("split", pa.string(), nullable=False),
            pa.field("label", label_type(is_multi_label=is_multi_label)),
            pa.field("uri", pa.string()),
            pa.field("removed", pa.bool_(), nullable=False),
        ]
    )


class RowBlock:
    """Up to `BLOCK_ROWS` rows with numbers that follow each other, and quick ways to what a batch needs of them."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """
        Args:
            batch: of `schema_of`, each column from the beginning of its buffers.
        """
        self.batch = batch
        _, offsets, text = self.column("image_id").buffers()
        self._offsets = memoryview(offsets).cast("i")
        self._text = memoryview(text)

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def column(self, name: str) -> pa.Array:
        """One column."""
        return self.batch.column(name)

    def image_id(self, place: int) -> str:
        """Of one row: without Arrow's scalars, which take ten times as long."""
        return str(self._text[self._offsets[place] : self._offsets[place + 1]], "utf-8")

    @cached_property
    def labels(self) -> list[Label | None]:
        """Of all rows."""
        return [label_of_cell(cell) for cell in self.column("label").to_pylist()]

    @cached_property
    def removed(self) -> NDArray[np.bool_]:
        """Which images are gone."""
        return bools(self.column("removed"))

    def are_of(self, splits: Sequence[str]) -> NDArray[np.bool_]:
        """Which images are of these splits and not removed."""
        members = pc.is_in(self.column("split"), value_set=pa.array(splits, pa.string()))
        return bools(members) & ~self.removed

    @cached_property
    def images_by_split(self) -> dict[str, int]:
        """How many images that are not removed each split has."""
        kept = self.column("split").filter(pc.invert(self.column("removed")))
        return {str(found["values"]): int(found["counts"].as_py()) for found in pc.value_counts(kept)}

    @property
    def common_split(self) -> str | None:
        """The split that all images have, none of them being removed."""
        return next((split for split, n_images in self.images_by_split.items() if n_images == len(self)), None)

    def image(self, place: int) -> StoredImage:
        """One row."""
        return self.images([place])[0]

    def images(self, places: Sequence[int] | None = None) -> list[StoredImage]:
        """Some rows, or all."""
        chosen = self.batch if places is None else self.batch.take(pa.array(places, pa.int64()))
        cells = chosen.to_pylist()
        return [
            StoredImage(
                row=cell["row"],
                image_id=cell["image_id"],
                sha256=(cell["sha256"] or b"").hex(),
                split=cell["split"],
                label=label_of_cell(cell["label"]),
                uri=cell["uri"] or "",
                removed=cell["removed"],
            )
            for cell in cells
        ]

    def without(self, doomed: pa.Array) -> "RowBlock":
        """The same rows, those of these image IDs as of removed ones."""
        gone = pc.or_(self.column("removed"), pc.is_in(self.column("image_id"), value_set=doomed))
        columns = {name: self.column(name) for name in self.batch.schema.names}
        for name in ("sha256", "label", "uri"):
            columns[name] = pc.if_else(gone, pa.scalar(None, columns[name].type), columns[name])
        columns["removed"] = gone
        return RowBlock(fresh(pa.record_batch(list(columns.values()), schema=self.batch.schema)))


def bools(column: pa.Array) -> NDArray[np.bool_]:
    """A column of bools without nulls. Arrow's `to_numpy` would import pandas, where there is one, for 0.3 s."""
    bits = np.frombuffer(column.buffers()[1], np.uint8)
    return np.unpackbits(bits, bitorder="little")[column.offset :][: len(column)].astype(bool)


def fresh(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy with buffers of its own, which are the same bytes wherever equal rows came from."""
    return batch.take(pa.array(np.arange(batch.num_rows)))


def blocks_of(table: pa.Table) -> list[RowBlock]:
    """The rows of a table in blocks.

    Raises:
        pyarrow.ArrowException: if a column has nulls or values that a row table has not.
    """
    batches = table.combine_chunks().to_batches(max_chunksize=BLOCK_ROWS)
    return [RowBlock(fresh(batch)) for batch in batches]


def table_of(images: Sequence[StoredImage], *, is_multi_label: bool) -> pa.Table:
    """Rows as Arrow columns."""
    columns = {
        "row": [image.row for image in images],
        "image_id": [image.image_id for image in images],
        "sha256": [bytes.fromhex(image.sha256) or None for image in images],
        "split": [image.split for image in images],
        "label": [image.label for image in images],
        "uri": [image.uri or None for image in images],
        "removed": [image.removed for image in images],
    }
    return pa.table(columns, schema=schema_of(is_multi_label=is_multi_label))


def hex_to_binary(column: pa.ChunkedArray) -> pa.Array:
    """64 hexadecimal digits a row as 32 bytes a row."""
    digits = column.combine_chunks()
    content = bytes.fromhex("".join(digits.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(digits), [None, pa.py_buffer(content)])
