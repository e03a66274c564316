"""Decoded pixels of the images of a stream, kept from one epoch to the next as far as they fit into memory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from dla_cache.chosen import ChosenRows
from dla_cache.images import Pixels
from dla_cache.joined import JoinedStore
from dla_cache.store import LatentStore
from dla_cache.stored_images import image_contents

Decode = Callable[[bytes, str], Pixels]
"""From a file's bytes and its image ID to pixels, uint8 [3, H, W]."""


class PixelCache:
    """Images by their position in a stream; those that are asked for first are kept, as many as fit. For threads."""

    def __init__(
        self,
        store: LatentStore | JoinedStore,
        rows: ChosenRows,
        image_root: Path | None,
        decode: Decode | None,
        keep_decoded_bytes: int,
    ) -> None:
        """
        Args:
            rows: of the store, for each position.
        """
        self._store = store
        self._rows = rows
        self._image_root = image_root
        self._decode = decode
        self._kept: dict[int, Pixels] = {}
        self._bytes_left = keep_decoded_bytes
        self._lock = Lock()
        first = self._read(rows[[0]])[0]  # a wrong image root shows now, not at the first batch
        if decode is not None:
            decode(first, store.rows.ids_of(rows[[0]])[0])

    def take(self, positions: NDArray[np.int64]) -> tuple[tuple[Pixels, ...], tuple[bytes, ...]]:
        """Pixels of the images at `positions` of the stream, or without a `decode` their files; the other is empty."""
        if self._decode is None:
            return (), tuple(self._read(self._rows[positions]))
        unread = [position for position in positions.tolist() if position not in self._kept]
        read = dict(zip(unread, self._read(self._rows[unread]), strict=True))
        return tuple(self._pixels_of(position, read, self._decode) for position in positions.tolist()), ()

    def _pixels_of(self, position: int, read: Mapping[int, bytes], decode: Decode) -> Pixels:
        if position in self._kept:
            return self._kept[position]
        pixels = decode(read[position], self._store.rows.ids_of(self._rows[[position]])[0])
        pixels.flags.writeable = False
        with self._lock:
            # Where one epoch ends and the next begins, two threads may have decoded the same image.
            if position not in self._kept and pixels.nbytes <= self._bytes_left:
                self._bytes_left -= pixels.nbytes
                self._kept[position] = pixels
        return pixels

    def _read(self, rows: NDArray[np.int64]) -> Sequence[bytes]:
        return image_contents(self._store, self._image_root, rows)
