"""The device's work, and what keeps it from waiting: images are read and decoded ahead, results are taken away.

    the caller                 threads that read       thread of the device     the caller again
    says which images make  →  read, check, decode  →  source.encode         →  checks, gathers, writes, commits
    the next batches           into a slot             copy to the host

All of it goes on at the same time. The caller's thread gives out batches and takes results, both in one order, so that
what is begun and what is committed does not depend on which thread was faster.

Memory is bounded, whatever the number of images: pixels lie in `SLOTS` slots that are used again and again, and no
more than `ahead` batches are given out and not taken back. See `dla_cache.memory`.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dla_cache.errors import ImageError
from dla_cache.images import Pixels

if TYPE_CHECKING:
    from dla_cache.batches import Batch
    from dla_cache.encoding import Encoder, PutOut

READ_THREADS = min(max(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 2), 16)
"""As many as there are cores: reading and decoding go on outside of Python's lock."""

SLOTS = 6
"""Batches whose pixels are in memory: one at the device, the others read or being read."""

TASK_IMAGES = 32
"""Images that a thread reads at a time: of 8, handing over and waiting for Python cost as much as a tenth of it all."""

SWITCH_S = 0.0005
"""How long a source that comes back from its device may wait for the Python of another thread; by default 5 ms, which
would be a second batch of a fast encoder."""

BUSY = 0.9
"""Share of the time from which on the device is what everything else waits for."""

Stage = Literal["device", "reading", "writing"]


@dataclass(slots=True)
class DeviceTimes:
    """What the device's thread spent its seconds on; it alone writes them."""

    busy_s: float = 0.0
    """In sources."""
    reading_s: float = 0.0
    """Waiting for images to be read and decoded."""
    writing_s: float = 0.0
    """Waiting for the next batch to be given out: who does that was writing."""
    other_s: float = 0.0
    """Handing over."""

    @property
    def busy(self) -> float | None:
        """The share of its time in which the device worked; None if it had nothing to do."""
        total = self.busy_s + self.reading_s + self.writing_s + self.other_s
        return self.busy_s / total if self.busy_s else None


def bottleneck_of(times: Iterable[DeviceTimes]) -> Stage | None:
    """What all the rest waited for, of one device or several; None if they had nothing to do."""
    worst = min((one for one in times if one.busy is not None), key=lambda one: one.busy or 0, default=None)
    if worst is None or worst.busy is None:
        return None
    if worst.busy >= BUSY:
        return "device"
    return "reading" if worst.reading_s >= worst.writing_s else "writing"


@dataclass(slots=True)
class Slot:
    """What sources see of one batch of B images, in buffers that the next batch gets again."""

    views: dict[int, Pixels]
    """uint8 [B, 3, S, S] by the side S; in the last batch of a series the last image is repeated up to B."""
    seeds: dict[str, list[list[int]]]
    """By modality, for each draw B seeds."""
    contents: list[bytes]
    """[B], what the store is to hold of each image."""
    bad: dict[int, str] = field(default_factory=dict)
    """Place in the batch → why the image cannot be read. Zeros stand in its place."""
    seconds: float = 0.0
    """Of reading and decoding, all threads together."""
    failure: BaseException | None = None
    left: int = 0
    """Images that are not read yet."""
    is_read: threading.Lock = field(default_factory=threading.Lock)
    """Held until all images are."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one batch in one of its series."""

    batch: "Batch"
    series: str
    bad: Mapping[int, str]
    """Images that could not be read."""
    put_out: "PutOut | None"
    """None of `images`, and where there was no good image."""
    contents: tuple[bytes, ...]
    """Of `images`, [n]."""
    seconds: float
    """Of the device; of `images`, of reading."""
    is_last: bool
    """Of its batch."""


Read = Callable[["Batch", Slot, int], None]
"""Puts what is wanted of the image at a place of a batch into its slot; ImageError if that cannot be had."""


def run_pipeline(
    batches: Iterator["Batch"],
    encoders: Mapping[str, "Encoder"],
    read: Read,
    times: DeviceTimes,
    *,
    batch_size: int,
    ahead: int,
) -> Generator[Result, None, None]:
    """The results of all batches, in their order and each in the order of its series.

    Args:
        batches: asked for the next one when there are fewer than `ahead` on their way.
        encoders: by modality.

    Raises:
        What `read` or a source raises, in the place of the batch; batches before have been handed out.
    """
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(min(switch_s, SWITCH_S))
    pipeline = _Pipeline(encoders, read, times, batch_size)
    try:
        on_their_way = 0
        while True:
            while on_their_way < ahead and (batch := next(batches, None)) is not None:
                pipeline.given.put(batch)
                on_their_way += 1
            if not on_their_way:
                return
            result = pipeline.results.get()
            if isinstance(result, BaseException):
                raise result
            on_their_way -= result.is_last
            yield result
    finally:
        pipeline.close()
        sys.setswitchinterval(switch_s)


class _Pipeline:
    """The threads and what lies between them. `SimpleQueue` is C: its get costs the device less than `Queue`'s."""

    def __init__(self, encoders: Mapping[str, "Encoder"], read: Read, times: DeviceTimes, batch_size: int) -> None:
        self.given: SimpleQueue[Batch | None] = SimpleQueue()
        self.results: SimpleQueue[Result | BaseException] = SimpleQueue()
        self._encoders, self._read, self._times = encoders, read, times
        self._batch_size = batch_size
        self._free: SimpleQueue[Slot | None] = SimpleQueue()
        self._begun: SimpleQueue[tuple[Batch, Slot] | None] = SimpleQueue()
        self._is_over = False
        for _ in range(SLOTS):
            self._free.put(self._make_slot())
        self._tasks = self._make_tasks()
        self._taking, self._counting = threading.Lock(), threading.Lock()
        works = [*[self._read_images] * READ_THREADS, self._encode]
        # Daemons, so that a second signal need not wait for a source.
        self._threads = [threading.Thread(target=self._forward_failure, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends all threads. A call of a source that is under way is waited for."""
        self._is_over = True
        for queue in (self.given, self._free, self._begun):
            queue.put(None)
        for thread in self._threads:
            thread.join()

    def _forward_failure(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # it is raised where results are taken
            self.results.put(error)

    def _make_slot(self) -> Slot:
        size, encoders = self._batch_size, self._encoders
        sides = {encoder.recipe.source_view_size for encoder in encoders.values()}
        seeds = {name: [[0] * size for _ in range(one.recipe.format.n_draws)] for name, one in encoders.items()}
        return Slot({side: np.zeros((size, 3, side, side), np.uint8) for side in sides}, seeds, [b""] * size)

    def _make_tasks(self) -> Iterator[tuple["Batch", Slot, range]]:
        """Waits for a batch and for a slot, whichever comes later. Of what is begun all tasks are given out."""
        while (batch := self.given.get()) is not None and (slot := self._free.get()) is not None:
            n_images = len(batch.images)
            slot.bad.clear()
            slot.seconds, slot.failure, slot.left = 0.0, None, n_images
            if n_images:
                slot.is_read.acquire()
            self._begun.put((batch, slot))
            for start in range(0, n_images, TASK_IMAGES):
                yield batch, slot, range(start, min(start + TASK_IMAGES, n_images))

    def _read_images(self) -> None:
        while True:
            with self._taking:
                task = next(self._tasks, None)
            if task is None:
                return
            batch, slot, places = task
            started = time.perf_counter()
            try:
                for place in () if self._is_over else places:
                    self._read_image(batch, slot, place)
            except BaseException as error:  # it is raised in the place of this batch
                slot.failure = error
            with self._counting:
                slot.seconds += time.perf_counter() - started
                slot.left -= len(places)
                is_read = not slot.left
            if is_read:
                slot.is_read.release()

    def _read_image(self, batch: "Batch", slot: Slot, place: int) -> None:
        image_id = batch.image_ids[place]
        try:
            self._read(batch, slot, place)
        except ImageError as error:
            slot.bad[place] = error.message
            for view in slot.views.values():
                view[place] = 0
        for modality in slot.seeds.keys() & set(batch.series):
            for draw, seed in enumerate(self._encoders[modality].seeds_of(image_id)):
                slot.seeds[modality][draw][place] = seed

    def _encode(self) -> None:
        times, clock = self._times, time.perf_counter
        finished = clock()
        while (begun := self._begun.get()) is not None:
            batch, slot = begun
            given = clock()
            times.writing_s += given - finished
            with slot.is_read:  # which is free from when all images are
                read = clock()
            times.reading_s += read - given
            if self._is_over:
                return
            if slot.failure is not None:
                raise slot.failure
            busy_s = sum(self._results_of(batch, slot))
            self._free.put(slot)
            finished = clock()
            times.busy_s += busy_s
            times.other_s += finished - read - busy_s

    def _results_of(self, batch: "Batch", slot: Slot) -> Iterator[float]:
        """Puts out the results of a batch, and yields the seconds that the device needed for each."""
        n_images = len(batch.images)
        if 0 < n_images < self._batch_size:
            for values in (*slot.views.values(), *[of_draw for draws in slot.seeds.values() for of_draw in draws]):
                _repeat_last(values, n_images)
        bad, contents = dict(slot.bad), tuple(slot.contents[:n_images])
        for series in batch.series:
            is_last = series == batch.series[-1]
            encoder = self._encoders.get(series)
            if encoder is None:
                self.results.put(Result(batch, series, bad, None, contents, slot.seconds, is_last))
            elif len(bad) == n_images:
                self.results.put(Result(batch, series, bad, None, (), 0.0, is_last))
            else:
                view = slot.views[encoder.recipe.source_view_size]
                put_out = encoder.put_out(view, slot.seeds[series], batch.image_ids)
                self.results.put(Result(batch, series, bad, put_out, (), put_out.seconds, is_last))
                yield put_out.seconds


def _repeat_last(values: Any, n_images: int) -> None:
    for place in range(n_images, len(values)):
        values[place] = values[n_images - 1]
