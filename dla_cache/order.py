"""The order of an epoch: which image stands at which place, as a function of the seed and the epoch.

Nothing here is a state: any stretch of any epoch can be asked for, by any rank, worker or resumed run, and all get the
same answer. Legend: n images of a stream, places 0 to n - 1 in an epoch, positions 0 to n - 1 in the stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import StoreError

MEASURED_PLACES = 100_000
"""Neighbours that the quality of a shuffle is measured on, at most."""

OF_BLOCKS, OF_WINDOWS, OF_KEYS = 1, 2, 3
"""They keep random numbers apart that have seed and epoch in common: to NumPy a 0 at the end is nothing."""

FEISTEL_ROUNDS = 6

KEYED_WINDOW = 8192

KEYED_FROM = 2**20
"""Images from which on a permutation is computed piece by piece: to draw one of ten million takes a second."""

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockShuffle:
    """Blocks of neighbours in random order, and images in random order within so many blocks at a time.

    A full permutation jumps about in the whole store; this one reads `block` images in a row from a disk or an object
    store, and holds no more than `block` times `window` of them in mind.
    """

    block: int = 512
    """Images in a row, one shard's worth where the shards are as large."""
    window: int = 16
    """Blocks that are mixed with each other."""

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 1:
            raise StoreError(f"blocks of {self.block} images and windows of {self.window} blocks", hint="from 1 on")


class EpochOrder(Protocol):
    """An order of n images for every epoch; each image once."""

    n: int

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        """The positions at places `start` to `stop` of an epoch, [stop - start]."""


class InOrder:
    """As the stream has them."""

    def __init__(self, n: int) -> None:
        self.n = n

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        return np.arange(start, stop)


class FullPermutation:
    """All images in random order; 8 bytes an image, for two epochs at a time."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._permutation: Callable[[int], Positions] = lru_cache(2)(
            lambda epoch: generator(seed, epoch).permutation(n)
        )

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        return self._permutation(epoch)[start:stop]


class KeyedPermutation:
    """All images in random order, positions computed some thousands at a time: no memory, and nothing to prepare.

    Source: Luby and Rackoff, "How to Construct Pseudorandom Permutations", 1988: a Feistel network; Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002: cycle walking, which makes of it a permutation of any n.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._half = np.uint64((max(n - 1, 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys: Callable[[int], NDArray[np.uint64]] = lru_cache(2)(
            lambda epoch: generator(seed, epoch, OF_KEYS).integers(2**64, size=FEISTEL_ROUNDS, dtype=np.uint64)
        )

        self._window: Callable[[int, int], Positions] = lru_cache(2)(self._window_of)

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        first, last = start // KEYED_WINDOW, -(-stop // KEYED_WINDOW)
        windows = [self._window(epoch, window) for window in range(first, last)]
        return np.concatenate([np.empty(0, np.int64), *windows])[start - first * KEYED_WINDOW :][: stop - start]

    def _window_of(self, epoch: int, window: int) -> Positions:
        start = window * KEYED_WINDOW
        found = self._shuffled(epoch, np.arange(start, min(start + KEYED_WINDOW, self.n), dtype=np.uint64))
        while len(beyond := np.flatnonzero(found >= self.n)):
            found[beyond] = self._shuffled(epoch, found[beyond])
        return found.astype(np.int64)

    def _shuffled(self, epoch: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A permutation of all numbers of twice `_half` bits."""
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys(epoch):
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half) | right


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits.

    Source: Appleby, MurmurHash3, `fmix64`.
    """
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * factor
    return numbers ^ (numbers >> np.uint64(33))


class BlockPermutation:
    """See `BlockShuffle`; 16 bytes a block, and the positions of two windows."""

    def __init__(self, n: int, seed: int, shuffle: BlockShuffle) -> None:
        self.n = n
        self._seed = seed
        self._shuffle = shuffle
        self._n_blocks = -(-n // shuffle.block)
        self._blocks = lru_cache(2)(self._blocks_of)
        self._window = lru_cache(2)(self._window_of)

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        if start >= stop:
            return np.empty(0, np.int64)
        _, ends = self._blocks(epoch)
        first, last = (int(np.searchsorted(ends, place, "right")) for place in (start, stop - 1))
        parts = [self._window(epoch, window) for window in range(first, last + 1)]
        before = int(ends[first - 1]) if first else 0
        return np.concatenate(parts)[start - before : stop - before]

    def _blocks_of(self, epoch: int) -> tuple[Positions, Positions]:
        """The blocks in the order of the epoch, and the place at which each window ends."""
        blocks = generator(self._seed, epoch, OF_BLOCKS).permutation(self._n_blocks)
        sizes = np.where(
            blocks == self._n_blocks - 1, self.n - (self._n_blocks - 1) * self._shuffle.block, self._shuffle.block
        )
        return blocks, np.add.reduceat(sizes, np.arange(0, self._n_blocks, self._shuffle.window)).cumsum()

    def _window_of(self, epoch: int, window: int) -> Positions:
        blocks, _ = self._blocks(epoch)
        size = self._shuffle.block
        chosen = blocks[window * self._shuffle.window : (window + 1) * self._shuffle.window]
        positions = np.concatenate([np.arange(block * size, min((block + 1) * size, self.n)) for block in chosen])
        return generator(self._seed, epoch, OF_WINDOWS, window).permutation(positions)


def generator(*numbers: int) -> np.random.Generator:
    """Random numbers that depend on these numbers and nothing else."""
    return np.random.Generator(np.random.PCG64(numbers))


def order_of(n: int, shuffle: bool | BlockShuffle, seed: int) -> EpochOrder:
    """The order that a stream of n images asks for: a full permutation for `True`, none for `False`."""
    if isinstance(shuffle, BlockShuffle):
        return BlockPermutation(n, seed, shuffle)
    if shuffle:
        return FullPermutation(n, seed) if n < KEYED_FROM else KeyedPermutation(n, seed)
    return InOrder(n)


@dataclass(frozen=True, slots=True)
class ShuffleQuality:
    """How far from each other the images stand that come after one another, and what a full permutation would give."""

    mean_distance: float
    """Mean difference of the positions of neighbours, as a fraction of n."""
    same_shard: float
    """Share of neighbours that lie in one shard."""
    mean_distance_of_permutation: float
    same_shard_of_permutation: float


def measure_shuffle(order: EpochOrder, shards: Positions, epoch: int = 0) -> ShuffleQuality:
    """The quality of an order, measured on the first `MEASURED_PLACES` places of an epoch.

    Args:
        shards: the shard of each position, [n].
    """
    n = order.n
    positions = order.positions(epoch, 0, min(n, MEASURED_PLACES))
    if len(positions) < 2:
        return ShuffleQuality(0.0, 1.0, 0.0, 1.0)
    of_shard = np.bincount(shards).astype(np.float64)
    return ShuffleQuality(
        mean_distance=float(np.abs(np.diff(positions)).mean() / n),
        same_shard=float((np.diff(shards[positions]) == 0).mean()),
        # Of two different positions drawn at random: E|i - j| = (n + 1) / 3.
        mean_distance_of_permutation=(n + 1) / (3 * n),
        same_shard_of_permutation=float((of_shard * (of_shard - 1)).sum() / (n * (n - 1))),
    )
