"""Pixels and raw latents of the same images, batch after batch, in an order that can be resumed.

Legend: B images of a batch, H and W pixels of an image, which may have a size of its own.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_cache.chosen import chosen_rows, label_array
from dla_cache.decoded import Decode, PixelCache
from dla_cache.errors import StoreError
from dla_cache.images import Pixels
from dla_cache.joined import JoinedStore
from dla_cache.order import BlockShuffle, ShuffleQuality, measure_shuffle, order_of
from dla_cache.store import LatentStore
from dla_cache.store.layout import IMAGES
from dla_cache.store.rows import StoredImage

B = TypeVar("B")

BATCHES_AHEAD = 4
"""Batches that wait, ready, while one is worked on; as many as there are threads if these are more."""

STATE_FORMAT = "dla-pairs-1"


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Some images with their latents; position i is the same image everywhere."""

    image_ids: tuple[str, ...]
    rows: NDArray[np.int64]
    """[B], rows of the store."""
    pixels: tuple[Pixels, ...]
    """B arrays uint8 [3, H, W], each of its own size and read-only: the stream may hand them out again. Empty
    without a `decode`."""
    images: tuple[bytes, ...]
    """B files if there is no `decode`, else empty. Without `images` both are."""
    latents: dict[str, Tensor]
    """Per modality raw latents [B, *shape] in the stored dtype."""
    present: dict[str, Tensor]
    """Per modality bool [B]: false where an image of joined stores has none, and zeros stand in its place."""
    labels: Tensor
    """int64 [B]; -1 where the image has no label. Of a multi-label store int64 [B, K], for each class 1 where the
    image has it and 0 where not; -1 all along where it is not labelled."""
    epoch: int
    number: int
    """Of the batch, counted over all epochs: `PairStream.state_after` goes on behind it."""

    def pin_memory(self) -> "PairBatch":
        """The same with its tensors in page-locked memory, as torch's `DataLoader` asks for with `pin_memory=True`."""
        return replace(
            self,
            latents={name: tensor.pin_memory() for name, tensor in self.latents.items()},
            present={name: tensor.pin_memory() for name, tensor in self.present.items()},
            labels=self.labels.pin_memory(),
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of every batch a process gets, of how many."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise StoreError(f"rank {self.rank} of {self.world_size} processes", hint="ranks are counted from 0")

    def of(self, n: int) -> tuple[int, int]:
        """Where its part of n images starts and stops; sizes differ by one at most."""
        return n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size


WHOLE = Share()


class PairStream:
    """Batches over some images of a store; a batch is a pure function of the seed and its number.

    So a run resumes exactly by asking for the batch it stopped before, whoever asks: a batch is cut into equal shares
    for the ranks, and workers take whole batches in turn, so that neither number changes which images make a batch.
    """

    def __init__(
        self,
        store: LatentStore | JoinedStore,
        image_root: Path | None,
        splits: Sequence[str] | None,
        batch_size: int,
        *,
        seed: int,
        decode: Decode | None,
        modalities: Sequence[str] | None = None,
        images: bool = True,
        where: Callable[[StoredImage], bool] | None = None,
        image_ids: Collection[str] | None = None,
        shuffle: bool | BlockShuffle = True,
        drop_last: bool = False,
        share: Share = WHOLE,
        keep_decoded_bytes: int = 2**30,
        threads: int = 1,
        pin_memory: bool = False,
        modalities_of: Callable[[int], Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            image_root: folder that the images' URIs start from: the manifest's. None for a store that holds the
                images themselves.
            splits: None for all.
            batch_size: images of a batch, those of all ranks together.
            decode: None hands out the files as they are.
            modalities: None for all of the store's, () for images alone.
            images: False for latents and labels alone: no image is read, and none need be at hand.
            where: only images of the splits of which it is true.
            image_ids: only these, all of which must be images of the splits.
            shuffle: a full permutation, blocks of neighbours, or none.
            share: the part of each batch that this rank gets.
            keep_decoded_bytes: pixels are kept in memory up to so many bytes, so that an image is
                decoded once and not once an epoch; those that do not fit are decoded each time.
            threads: so many make batches ahead, each a batch at a time. They change nothing in the batches.
            pin_memory: hands out tensors in page-locked memory, from which a GPU copies while it computes.
            modalities_of: which of the modalities the batches of an epoch have; None for all in every epoch.

        Raises:
            StoreError: if `batch_size`, `seed` or `threads` is too small, a split has no image, dropping the last
                batch leaves none, or a batch is too small for all ranks to have a part of it; if there is a `decode`
                without `images`; if memory cannot be pinned.
            MissingLatentError: if the store has no such modality or image, or no images and there is no `image_root`.
            IncompleteBuildError: if a modality is not whole.
        """
        self._arguments: dict[str, Any] = {
            "store": store,
            "image_root": image_root,
            "splits": splits,
            "batch_size": batch_size,
            "seed": seed,
            "decode": decode,
            "modalities": modalities,
            "images": images,
            "where": where,
            "image_ids": image_ids,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "share": share,
            "keep_decoded_bytes": keep_decoded_bytes,
            "threads": threads,
            "pin_memory": pin_memory,
            "modalities_of": modalities_of,
        }
        if batch_size < 1 or seed < 0 or threads < 1:
            raise StoreError(
                f"batches of {batch_size} images, seed {seed}, {threads} threads",
                hint="batches and threads from 1, seeds from 0 on",
            )
        if decode is not None and not images:
            raise StoreError("there is nothing to decode without images", hint="leave out `decode` or `images=False`")
        if pin_memory and not torch.cuda.is_available():
            raise StoreError(
                "memory cannot be pinned: torch finds no CUDA device",
                hint="leave out `pin_memory`; `dla doctor` shows the devices",
            )
        self.modalities = tuple(store.modalities if modalities is None else modalities)
        self._modalities_of = modalities_of
        store.require_complete([*self.modalities, *([IMAGES] if images and image_root is None else [])])
        self._store = store
        self._rows = chosen_rows(store, splits, where, image_ids)
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._share = share
        self._order = order_of(len(self._rows), shuffle, seed)
        self._order_lock = Lock()
        self._images = PixelCache(store, self._rows, image_root, decode, keep_decoded_bytes) if images else None
        self._threads = threads
        self.pins_memory = pin_memory
        self._n_batches = len(self._rows) // batch_size if drop_last else -(-len(self._rows) // batch_size)
        self._check_shares()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process that is not a fork opens the store anew: maps of files do not travel.
        return partial(PairStream, **self._arguments), ()

    def _check_shares(self) -> None:
        if not self._n_batches:
            raise StoreError(
                f"{len(self._rows)} images make no full batch of {self._batch_size}",
                hint="make batches smaller, or keep the last one",
            )
        smallest = self._batch_size if self._drop_last else len(self._rows) - (self._n_batches - 1) * self._batch_size
        if smallest < self._share.world_size:
            raise StoreError(
                f"{len(self._rows)} images in batches of {self._batch_size} leave {smallest} in the last batch of an"
                f" epoch, too few for {self._share.world_size} ranks",
                hint="drop the last batch, or choose another batch size: every rank needs a part of every batch",
            )

    def __len__(self) -> int:
        """Batches of an epoch, the same for every rank."""
        return self._n_batches

    @property
    def n_images(self) -> int:
        """Of all ranks."""
        return len(self._rows)

    def shuffle_quality(self, epoch: int = 0) -> ShuffleQuality:
        """How well the images of an epoch are mixed."""
        return measure_shuffle(self._order, self._rows.all() // self._store.shard_size, epoch)

    def batches(
        self, start_batch: int = 0, *, step: int = 1, stop: int | None = None
    ) -> Generator[PairBatch, None, None]:
        """The batches from number `start_batch` on, every `step`-th, counted over all epochs; endless without `stop`.

        Closing the generator ends its threads.
        """
        numbers = count(start_batch, step) if stop is None else range(start_batch, stop, step)
        return made_ahead(numbers, self.batch, self._threads)

    def epoch_once(self, epoch: int = 0) -> Generator[PairBatch, None, None]:
        """The batches of one epoch; in row order without shuffling."""
        return made_ahead(range(epoch * len(self), (epoch + 1) * len(self)), self.batch, self._threads)

    def batch(self, number: int) -> PairBatch:
        """This rank's part of the batch of a number, counted over all epochs.

        Raises:
            ImageError: if a file is missing, has changed, or is no image.
            CorruptShardError: if a latent is damaged.
        """
        epoch, within = divmod(number, len(self))
        start = within * self._batch_size
        first, last = self._share.of(min(self._batch_size, len(self._rows) - start))
        with self._order_lock:  # else each thread would make the permutation of a new epoch
            positions = self._order.positions(epoch, start + first, start + last)
        rows = self._rows[positions]
        pixels, images = self._images.take(positions) if self._images is not None else ((), ())
        names = self.modalities if self._modalities_of is None else self._modalities_of(epoch)
        batch = PairBatch(
            image_ids=self._store.rows.ids_of(rows),
            rows=rows,
            pixels=pixels,
            images=images,
            latents={name: torch.from_numpy(self._store.read(name, rows)) for name in names},
            present={name: torch.from_numpy(self._store.present(name, rows)) for name in names},
            labels=torch.from_numpy(label_array(self._store, rows)),
            epoch=epoch,
            number=number,
        )
        return batch.pin_memory() if self.pins_memory else batch

    def state_after(self, number: int | None) -> dict[str, Any]:
        """What `start_of` needs to go on behind the batch of a number, or from the beginning: plain values for JSON."""
        return {"format": STATE_FORMAT, "next_batch": 0 if number is None else number + 1, "order": self._identity}

    def start_of(self, state: Mapping[str, Any]) -> int:
        """The number of the batch that follows a state, of whatever rank, worker and number of them.

        Raises:
            StoreError: if the state is none, or of a stream of other images or another order.
        """
        number, order = state.get("next_batch"), state.get("order")
        is_whole = isinstance(number, int) and number >= 0 and isinstance(order, Mapping)
        if state.get("format") != STATE_FORMAT or not is_whole:
            raise StoreError("this is no state of a stream of pairs", hint="save what `state_after` gives")
        differing = [name for name, value in self._identity.items() if state["order"].get(name) != value]
        if differing:
            raise StoreError(
                f"the state is of a stream with other {', '.join(differing)}",
                hint="resume with the settings it was saved with; rank, world size and workers may differ",
            )
        return int(state["next_batch"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """What decides which images make a batch."""
        ids = hashlib.sha256("\n".join(self._store.rows.ids_of(self._rows.all())).encode())
        return {
            "images": ids.hexdigest(),
            "seed": self._seed,
            "batch_size": self._batch_size,
            "drop_last": self._drop_last,
            "shuffle": asdict(self._shuffle) if isinstance(self._shuffle, BlockShuffle) else self._shuffle,
        }


def made_ahead(numbers: Iterable[int], make: Callable[[int], B], threads: int) -> Generator[B, None, None]:
    """What `make` makes of each number, in their order, made ahead by threads that end with the generator.

    The caller has one batch, which it may hold on to while it asks for the next; so many wait or are being made as
    `BATCHES_AHEAD` or `threads` says, and one is handed over: two more than the larger of both, and never another.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pairs")
    ahead: deque[Future[B]] = deque()
    try:
        for number in numbers:
            ahead.append(pool.submit(make, number))
            if len(ahead) > max(BATCHES_AHEAD, threads):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
