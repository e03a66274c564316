"""Memory for batches, used again once nothing refers to it.

A batch of latents is larger than what an allocator keeps: it would come from the kernel each time, which fills every
page of it with zeros before the first byte is written. That takes as long as reading the latents.
"""

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST_BYTES = 2**16
"""Smaller buffers come from the allocator, which is good at them."""

KEPT_BUFFERS = 8
"""That lie ready, of one size: as many batches as are usually made ahead, and some."""

KEPT_SIZES = 8


class BufferPool:
    """Buffers by their size; for threads."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer [size] of any content. It comes back when the array, its views, and tensors of them are gone."""
        if size < SMALLEST_BYTES:
            return np.empty(size, np.uint8)
        if len(self._free) > KEPT_SIZES and size not in self._free:
            self._free = {}
        free = self._free.setdefault(size, [])
        try:
            owner = free.pop()
        except IndexError:
            owner = np.empty(size, np.uint8).data
        # Of an array that does not own its memory, views refer to the array itself: it goes after all of them.
        buffer = np.frombuffer(owner, np.uint8)
        weakref.finalize(buffer, _give_back, free, owner).atexit = False
        return buffer


def _give_back(free: list[Any], owner: Any) -> None:
    if len(free) < KEPT_BUFFERS:
        free.append(owner)
