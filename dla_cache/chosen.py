"""Which images of a store a stream goes over, and what of them is known without their latents."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import MissingLatentError, StoreError, name_some
from dla_cache.joined import JoinedStore
from dla_cache.store import LatentStore
from dla_cache.store.rows import StoredImage


class ChosenRows:
    """The row of each position in a stream. Rows that follow each other cost no memory."""

    def __init__(self, rows: NDArray[np.int64]) -> None:
        """
        Args:
            rows: rising, at least one, [n].
        """
        self._n = len(rows)
        self._first = int(rows[0])
        self._rows = None if int(rows[-1]) - self._first == self._n - 1 else rows

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        """The rows at positions, [b]."""
        places = np.asarray(positions, np.int64)
        return places + self._first if self._rows is None else self._rows[places]

    def all(self) -> NDArray[np.int64]:
        """[n]"""
        return np.arange(self._first, self._first + self._n) if self._rows is None else self._rows


def chosen_rows(
    store: LatentStore | JoinedStore,
    splits: Sequence[str] | None,
    where: Callable[[StoredImage], bool] | None,
    image_ids: Collection[str] | None,
) -> ChosenRows:
    """The rows of a subset in row order; see `dla_cache.pairs.PairStream`.

    Raises:
        StoreError: if a split has no image, or no image is left.
        MissingLatentError: if an ID is not among the images of the splits.
    """
    rows = store.rows_of(splits)
    if image_ids is not None:
        wanted = np.array(sorted({store.rows.row_of(image_id) for image_id in image_ids}), np.int64)
        strays = np.setdiff1d(wanted, rows).tolist()
        if strays:
            raise MissingLatentError(
                f"{len(strays)} images are not of the splits asked for: {name_some(store.rows.ids_of(strays))}",
                hint="ask for their splits as well, or leave them out",
            )
        rows = wanted
    if where is not None:
        rows = np.array([image.row for image in store.rows.images_of(rows) if where(image)], np.int64)
    if not len(rows):
        raise StoreError("no image is left of the store", hint="look at `where` and `image_ids`")
    return ChosenRows(rows)


def label_array(store: LatentStore | JoinedStore, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels as numbers, [n], or [n, K] of a multi-label store; see `dla_cache.pairs.PairBatch.labels`."""
    if not store.rows.is_multi_label:
        return store.rows.label_numbers(rows)
    labels = store.rows.labels_of(rows)
    array = np.zeros((len(labels), len(store.class_names)), np.int64)
    for row, label in zip(array, labels, strict=True):
        if label is None:
            row[:] = -1
        else:
            row[np.asarray(label, np.intp)] = 1
    return array
