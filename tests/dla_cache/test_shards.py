"""Shards: a partition of the rows, whoever works on them."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.shards import Shard, ShardPlan, shards_of_rank

LENGTHS = st.lists(st.integers(1, 150), max_size=4)
"""Rows of each stretch: those of a build, and of whatever was appended."""


def spans_of(lengths: list[int], shard_size: int) -> list[tuple[int, int]]:
    shards = accumulate((-(-length // shard_size) for length in lengths), initial=0)
    return [(shard * shard_size, shard * shard_size + length) for shard, length in zip(shards, lengths, strict=False)]


@given(lengths=LENGTHS, shard_size=st.integers(1, 60), world_size=st.integers(1, 9))
def test_every_row_has_one_worker_whatever_the_number_of_workers(
    lengths: list[int], shard_size: int, world_size: int
) -> None:
    spans = spans_of(lengths, shard_size)
    plan = ShardPlan(spans, shard_size)
    work = [shard for rank in range(world_size) for shard in shards_of_rank(plan, rank, world_size)]
    rows = [row for shard in work for row in range(shard.start, shard.stop)]
    assert sorted(rows) == [row for start, stop in spans for row in range(start, stop)]
    assert all(row // shard_size == shard.index for shard in work for row in range(shard.start, shard.stop))


@given(lengths=LENGTHS, shard_size=st.integers(1, 60))
def test_only_the_last_shard_of_a_stretch_is_short(lengths: list[int], shard_size: int) -> None:
    spans = spans_of(lengths, shard_size)
    stops = {stop for _, stop in spans}
    for number, shard in enumerate(ShardPlan(spans, shard_size)):
        assert (shard.index, shard.start) == (number, number * shard_size)
        assert len(shard) == shard_size or (0 < len(shard) < shard_size and shard.stop in stops)


@given(n_shards=st.integers(0, 60), world_size=st.integers(1, 9))
def test_ranks_get_equal_numbers_give_or_take_one(n_shards: int, world_size: int) -> None:
    plan = ShardPlan(spans_of([n_shards] if n_shards else [], 1), 1)
    sizes = [len(shards_of_rank(plan, rank, world_size)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_is_indexed_like_a_list() -> None:
    plan = ShardPlan([(0, 7), (9, 11)], 3)
    whole = [Shard(0, 0, 3), Shard(1, 3, 6), Shard(2, 6, 7), Shard(3, 9, 11)]
    assert [*plan] == plan[:] == whole
    assert (plan[-1], plan[1:3], len(plan)) == (whole[-1], whole[1:3], 4)
    for index in (4, -5):
        with pytest.raises(IndexError):
            _ = plan[index]


@pytest.mark.parametrize("spans", [[(0, 7), (8, 9)], [(0, 7), (12, 13)], [(3, 4)]])
def test_rows_that_begin_within_a_shard_or_leave_one_out_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="do not begin with shard"):
        ShardPlan(spans, 3)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        shards_of_rank(ShardPlan([(0, 4)], 1), rank, 2)
