"""Shards: a partition of the rows, whoever works on them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.shards import plan_shards, shards_of_rank


@given(n_rows=st.integers(0, 300), shard_size=st.integers(1, 60), world_size=st.integers(1, 9))
def test_every_row_has_one_worker_whatever_the_number_of_workers(n_rows: int, shard_size: int, world_size: int) -> None:
    shards = plan_shards(n_rows, shard_size)
    work = [shard for rank in range(world_size) for shard in shards_of_rank(shards, rank, world_size)]
    assert sorted(row for shard in work for row in range(shard.start, shard.stop)) == list(range(n_rows))


@given(n_rows=st.integers(1, 300), shard_size=st.integers(1, 60))
def test_only_the_last_shard_is_short(n_rows: int, shard_size: int) -> None:
    *whole, last = plan_shards(n_rows, shard_size)
    assert all(len(shard) == shard_size for shard in whole)
    assert 0 < len(last) <= shard_size


@given(n_shards=st.integers(0, 60), world_size=st.integers(1, 9))
def test_ranks_get_equal_numbers_give_or_take_one(n_shards: int, world_size: int) -> None:
    shards = plan_shards(n_shards, 1)
    sizes = [len(shards_of_rank(shards, rank, world_size)) for rank in range(world_size)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        shards_of_rank(plan_shards(4, 1), rank, 2)
