"""Parts of a row table: rows that follow each other, in blocks that are read when they are needed."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dla_cache.store.row_blocks import BLOCK_ROWS, RowBlock, blocks_of

PART_ROWS = 256 * BLOCK_ROWS
"""Rows of a part, at most; a whole number of blocks."""


@dataclass(slots=True)
class RowPart:
    """Rows with numbers that follow each other: what is known of them without reading them, and a way to read them."""

    start: int
    n_rows: int
    n_removed: int
    images_by_split: dict[str, int]
    """Without those that were removed."""
    list_splits: Callable[[], list[str | None]]
    """Gives the split of each block whose images are all of one and all there; None of others."""
    load: Callable[[int], RowBlock]
    entry: dict[str, Any] | None = None
    """What the index says of its file, if it comes from one; see `dla_cache.store.row_files`."""
    _blocks: dict[int, RowBlock] = field(default_factory=dict)
    _block_splits: list[str | None] | None = None

    @classmethod
    def of_blocks(cls, start: int, blocks: Sequence[RowBlock]) -> "RowPart":
        """A part in memory."""
        images_by_split: Counter[str] = Counter()
        for block in blocks:
            images_by_split.update(block.images_by_split)
        return cls(
            start=start,
            n_rows=sum(map(len, blocks)),
            n_removed=sum(int(block.removed.sum()) for block in blocks),
            images_by_split=dict(sorted(images_by_split.items())),
            list_splits=lambda: [block.common_split for block in blocks],
            load=blocks.__getitem__,
        )

    @property
    def stop(self) -> int:
        return self.start + self.n_rows

    @property
    def block_splits(self) -> list[str | None]:
        if self._block_splits is None:
            self._block_splits = self.list_splits()
        return self._block_splits

    def block(self, number: int) -> RowBlock:
        """A block, kept once it was read."""
        found = self._blocks.get(number)
        if found is None:
            found = self._blocks[number] = self.load(number)
        return found

    def blocks(self) -> Iterator[RowBlock]:
        """All of them in order; those that were not needed before are not kept."""
        for number in range(-(-self.n_rows // BLOCK_ROWS)):
            yield self._blocks.get(number) or self.load(number)


def is_same_part(one: RowPart, other: RowPart) -> bool:
    """Whether two parts of as many rows have the same."""
    if one.entry is not None and other.entry is not None:
        return bool(one.entry["sha256"] == other.entry["sha256"])
    return all(mine.batch.equals(theirs.batch) for mine, theirs in zip(one.blocks(), other.blocks(), strict=True))


Stretch = tuple[int, int] | NDArray[np.int64]
"""Start and stop of rows that follow each other, or rows one by one."""


def stretches_of(part: RowPart, splits: Sequence[str]) -> Iterator[Stretch]:
    """The rows of these splits in a part; a block is read only if it is mixed."""
    for number, split in enumerate(part.block_splits):
        start = part.start + number * BLOCK_ROWS
        if split is None:
            yield np.flatnonzero(part.block(number).are_of(splits)) + start
        elif split in splits:
            yield start, min(start + BLOCK_ROWS, part.stop)


def merged(stretches: Iterable[Stretch]) -> Iterator[NDArray[np.int64]]:
    """The rows of stretches as few arrays."""
    start = stop = 0
    for stretch in stretches:
        if isinstance(stretch, tuple) and stretch[0] == stop:
            stop = stretch[1]
            continue
        yield np.arange(start, stop)
        start, stop = stretch if isinstance(stretch, tuple) else (0, 0)
        if not isinstance(stretch, tuple):
            yield stretch
    yield np.arange(start, stop)


def parts_of(table: pa.Table) -> list[RowPart]:
    """The rows of a table, `row` rising, as parts in memory."""
    rows: Any = table["row"].to_numpy()
    parts = []
    gaps = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *gaps.tolist()], [*gaps.tolist(), len(rows)], strict=True):
        for begin in range(start, stop, PART_ROWS):
            blocks = blocks_of(table.slice(begin, min(PART_ROWS, stop - begin)))
            parts.append(RowPart.of_blocks(int(rows[begin]), blocks))
    return parts
