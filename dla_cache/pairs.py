"""Pixels and raw latents of the same images, batch after batch, in an order that can be resumed.

Legend: B images of a batch, H and W pixels of an image, which may have a size of its own.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_cache.errors import StoreError
from dla_cache.images import Pixels, read_image_bytes
from dla_cache.manifest import path_of
from dla_cache.store import LatentStore
from dla_cache.store.layout import IMAGES

BATCHES_AHEAD = 4
"""Batches that wait, ready, while one is worked on."""

Decode = Callable[[bytes, str], Pixels]
"""From a file's bytes and its image ID to pixels, uint8 [3, H, W]."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Some images with their latents; position i is the same image everywhere."""

    image_ids: tuple[str, ...]
    rows: NDArray[np.int64]
    """[B], rows of the store."""
    pixels: tuple[Pixels, ...]
    """B arrays uint8 [3, H, W], each of its own size and read-only: the stream may hand them out again."""
    latents: dict[str, Tensor]
    """Per modality raw latents [B, *shape] in the stored dtype."""
    labels: Tensor
    """int64 [B]; -1 where the image has no label."""
    epoch: int


class PairStream:
    """Batches over the images of some splits; a batch is a pure function of the seed and its number.

    So a run resumes exactly by asking for the batch it stopped before, and nothing needs saving.
    """

    def __init__(
        self,
        store: LatentStore,
        image_root: Path | None,
        splits: Sequence[str],
        batch_size: int,
        *,
        seed: int,
        decode: Decode,
        modalities: Sequence[str] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        keep_decoded_bytes: int = 2**30,
    ) -> None:
        """
        Args:
            image_root: folder that the images' URIs start from: the manifest's. None for a store that holds the
                images themselves.
            modalities: None for all of the store's, () for images alone.
            keep_decoded_bytes: pixels are kept in memory up to so many bytes, so that an image is
                decoded once and not once an epoch; those that do not fit are decoded each time.

        Raises:
            StoreError: if a split has no image, or dropping the last batch leaves none.
            MissingLatentError: if the store has no such modality, or no images and there is no `image_root`.
            IncompleteBuildError: if a modality is not whole.
        """
        self.modalities = tuple(store.modalities if modalities is None else modalities)
        store.require_complete([*self.modalities, *([IMAGES] if image_root is None else [])])
        self._store = store
        self._rows = store.rows_of(splits)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._order_of = lru_cache(2)(self._order)
        images = [store.rows[row] for row in self._rows]
        self._labels = np.array([-1 if image.label is None else image.label for image in images])
        self._pixels = _PixelCache(store, self._rows, image_root, decode, keep_decoded_bytes)
        self._n_batches = len(self._rows) // batch_size if drop_last else -(-len(self._rows) // batch_size)
        if not self._n_batches:
            raise StoreError(
                f"{len(self._rows)} images make no full batch of {batch_size}",
                hint="make batches smaller, or keep the last one",
            )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._n_batches

    @property
    def n_images(self) -> int:
        return len(self._rows)

    def batches(self, start_batch: int = 0) -> Generator[PairBatch, None, None]:
        """Endless batches from number `start_batch` on, counted over all epochs.

        Closing the generator ends its thread.
        """
        return _ahead(count(start_batch), self.batch)

    def epoch_once(self, epoch: int = 0) -> Generator[PairBatch, None, None]:
        """The batches of one epoch; in row order without shuffling."""
        return _ahead(range(epoch * len(self), (epoch + 1) * len(self)), self.batch)

    def batch(self, number: int) -> PairBatch:
        """The batch of a number, counted over all epochs.

        Raises:
            ImageError: if a file is missing, has changed, or is no image.
            CorruptShardError: if a latent is damaged.
        """
        epoch, within = divmod(number, len(self))
        positions = self._order_of(epoch)[within * self._batch_size : (within + 1) * self._batch_size]
        rows = self._rows[positions]
        return PairBatch(
            image_ids=tuple(self._store.rows.image_ids[row] for row in rows),
            rows=rows,
            pixels=self._pixels.take(positions),
            latents={name: torch.from_numpy(self._store.read(name, rows)) for name in self.modalities},
            labels=torch.from_numpy(self._labels[positions]),
            epoch=epoch,
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._rows))
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._rows))


class _PixelCache:
    """Decoded pixels of the images of a stream; those that are asked for first are kept, as many as fit."""

    def __init__(
        self,
        store: LatentStore,
        rows: NDArray[np.int64],
        image_root: Path | None,
        decode: Decode,
        keep_decoded_bytes: int,
    ) -> None:
        self._store = store
        self._rows = rows
        self._image_root = image_root
        self._decode = decode
        self._kept: dict[int, Pixels] = {}
        self._bytes_left = keep_decoded_bytes
        self._decoded(0, self._read(rows[:1])[0])  # a wrong image root shows now, not at the first batch

    def take(self, positions: NDArray[np.int64]) -> tuple[Pixels, ...]:
        """Pixels of the images at `positions` of the stream."""
        unread = [position for position in positions.tolist() if position not in self._kept]
        read = dict(zip(unread, self._read(self._rows[unread]), strict=True))
        return tuple(self._pixels_of(position, read) for position in positions.tolist())

    def _pixels_of(self, position: int, read: Mapping[int, bytes]) -> Pixels:
        if position in self._kept:
            return self._kept[position]
        pixels = self._decoded(position, read[position])
        pixels.flags.writeable = False
        if pixels.nbytes <= self._bytes_left:
            self._bytes_left -= pixels.nbytes
            self._kept[position] = pixels
        return pixels

    def _decoded(self, position: int, content: bytes) -> Pixels:
        return self._decode(content, self._store.rows.image_ids[self._rows[position]])

    def _read(self, rows: NDArray[np.int64]) -> Sequence[bytes]:
        if self._image_root is None:
            return self._store.read_images(rows)
        images = [self._store.rows[row] for row in rows.tolist()]
        return [read_image_bytes(path_of(self._image_root, image.uri), image) for image in images]


def _ahead(numbers: Iterable[int], make: Callable[[int], PairBatch]) -> Generator[PairBatch, None, None]:
    """What `make` makes of each number, made ahead by one thread that ends with the generator."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="pairs")
    ahead: deque[Future[PairBatch]] = deque()
    try:
        for number in numbers:
            ahead.append(pool.submit(make, number))
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
