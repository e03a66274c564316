"""Orders of an epoch: each image once, the same answer to whoever asks, and as mixed as they say."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import StoreError
from dla_cache.order import KEYED_FROM, BlockShuffle, KeyedPermutation, measure_shuffle, order_of

SHUFFLES = st.one_of(st.booleans(), st.builds(BlockShuffle, block=st.integers(1, 9), window=st.integers(1, 5)))


@given(st.integers(1, 80), SHUFFLES, st.integers(0, 2**40), st.integers(0, 3), st.lists(st.integers(0, 80)))
def test_any_stretches_of_an_epoch_make_up_each_image_once(n, shuffle, seed, epoch, cuts):
    order = order_of(n, shuffle, seed)
    ends = [0, *sorted(cut for cut in cuts if cut < n), n]
    pieces = [order.positions(epoch, start, stop) for start, stop in itertools.pairwise(ends)]
    together = np.concatenate(pieces)
    assert sorted(together.tolist()) == list(range(n))
    assert together.tolist() == order_of(n, shuffle, seed).positions(epoch, 0, n).tolist()


@given(st.integers(30, 60), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**40))
def test_a_window_holds_whole_blocks_and_no_image_of_another(n, block, window, seed):
    positions = order_of(n, BlockShuffle(block, window), seed).positions(0, 0, n)
    place = 0
    while place < n:
        blocks = set()
        while place < n and len(blocks | {positions[place] // block}) <= window:
            blocks.add(positions[place] // block)
            place += 1
        held = [position for position in range(n) if position // block in blocks]
        assert sorted(positions[place - len(held) : place].tolist()) == held


def test_epochs_and_seeds_differ():
    for shuffle in (True, BlockShuffle(5, 3)):
        seen = {tuple(order_of(40, shuffle, seed).positions(epoch, 0, 40)) for seed in (0, 1) for epoch in (0, 1)}
        assert len(seen) == 4


@pytest.mark.parametrize("shuffle", [True, BlockShuffle(50, 10**6)])
def test_a_window_of_everything_is_as_mixed_as_a_permutation(shuffle):
    shards = np.arange(20_000) // 100
    quality = measure_shuffle(order_of(20_000, shuffle, 0), shards)
    assert quality.mean_distance == pytest.approx(quality.mean_distance_of_permutation, rel=0.02)
    assert quality.same_shard == pytest.approx(quality.same_shard_of_permutation, abs=0.001)


def test_quality_tells_rows_in_order_from_small_windows_from_large_ones():
    shards = np.arange(20_000) // 100
    in_order, small, large = (
        measure_shuffle(order_of(20_000, shuffle, 0), shards)
        for shuffle in (False, BlockShuffle(100, 2), BlockShuffle(100, 40))
    )
    assert in_order.same_shard > 0.98
    assert in_order.same_shard > small.same_shard > large.same_shard
    assert small.same_shard == pytest.approx(0.5, abs=0.02)
    assert large.same_shard == pytest.approx(1 / 40, abs=0.005)


def test_ten_million_images_are_shuffled_in_windows_at_once_and_in_little_memory():
    order = order_of(10_000_000, BlockShuffle(512, 16), 0)
    assert len(set(order.positions(0, 5_000_000, 5_000_256).tolist())) == 256


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_blocks_of_nothing_are_refused(sizes):
    with pytest.raises(StoreError, match="from 1 on"):
        BlockShuffle(*sizes)


@given(n=st.integers(1, 20_000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_a_keyed_permutation_has_each_image_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(KeyedPermutation(n, seed).positions(epoch, 0, n)), np.arange(n))


def test_a_keyed_permutation_is_as_mixed_as_a_drawn_one() -> None:
    n = 100_000
    order = KeyedPermutation(n, 7)
    found = measure_shuffle(order, np.arange(n) // 512)
    assert abs(found.mean_distance - found.mean_distance_of_permutation) < 0.005
    assert abs(found.same_shard - found.same_shard_of_permutation) < 0.001
    one, two = (order.positions(epoch, 0, n) for epoch in (0, 1))
    for first, second in ((np.arange(n), one), (one, two), (one[:-1], one[1:])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
    # Of any thousand places, the images lie all over the stream: a chi-squared test of 100 bins a thousand.
    counts = np.stack([np.bincount(part // 1000, minlength=100) for part in one.reshape(100, 1000)])
    assert 0.9 < ((counts - 10) ** 2 / 10).sum() / (99 * 99) < 1.1


def test_streams_of_millions_are_permuted_without_drawing_all_of_it() -> None:
    assert isinstance(order_of(KEYED_FROM, True, 0), KeyedPermutation)
    assert not isinstance(order_of(KEYED_FROM - 1, True, 0), KeyedPermutation)
    order = order_of(10**9, True, 0)
    assert np.array_equal(order.positions(3, 10**8, 10**8 + 9000)[5:300], order.positions(3, 10**8 + 5, 10**8 + 300))
