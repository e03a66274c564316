"""Which rows make a shard, and which shards a worker owns: pure, knows no workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows `start` to `stop` of the row table, the last excluded."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class ShardPlan(Sequence[Shard]):
    """All shards in row order: row r lies in shard r ÷ `shard_size`. The last of every stretch of rows may be short.

    A pure function of these numbers, so workers, devices and nodes may differ between runs; made when asked for, so
    that a plan of a million shards costs nothing.
    """

    def __init__(self, spans: Sequence[tuple[int, int]], shard_size: int) -> None:
        """
        Args:
            spans: start and stop of each stretch of rows; the next one begins with the next shard.

        Raises:
            ValueError: if a stretch begins elsewhere.
        """
        self._stops = {}
        self._size = shard_size
        self._n = 0
        for start, stop in spans:
            if start != self._n * shard_size:
                raise ValueError(f"rows from {start} on do not begin with shard {self._n} of {shard_size} rows")
            self._n = -(-stop // shard_size)
            self._stops[self._n - 1] = stop

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._n))]
        number = range(self._n)[index]
        start = number * self._size
        return Shard(number, start, self._stops.get(number, start + self._size))


def shards_of_rank(shards: Sequence[Shard], rank: int, world_size: int) -> list[Shard]:
    """Every `world_size`-th shard from `rank` on: ranks get equal numbers, give or take one.

    Raises:
        ValueError: if `rank` does not lie in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in [0, {world_size})")
    return list(shards[rank::world_size])
