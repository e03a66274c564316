"""Which rows make a shard, and which shards a worker owns: pure, knows no workers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows `start` to `stop` of the row table, the last excluded."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def plan_shards(n_rows: int, shard_size: int) -> list[Shard]:
    """All shards in row order; the last one may be short.

    A pure function of the two numbers, so workers, devices and nodes may differ between runs.
    """
    return [
        Shard(index, start, min(start + shard_size, n_rows)) for index, start in enumerate(range(0, n_rows, shard_size))
    ]


def shards_of_rank(shards: Sequence[Shard], rank: int, world_size: int) -> list[Shard]:
    """Every `world_size`-th shard from `rank` on: ranks get equal numbers, give or take one.

    Raises:
        ValueError: if `rank` does not lie in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in [0, {world_size})")
    return list(shards[rank::world_size])
