"""Buffers: used again when nobody has them any more, and never before."""

import gc
import threading

import numpy as np
import torch

from dla_cache.store.buffers import KEPT_BUFFERS, KEPT_SIZES, SMALLEST_BYTES, BufferPool

SIZE = 2 * SMALLEST_BYTES


def place_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_buffer_is_not_handed_out_again_while_a_view_or_a_tensor_of_it_lives() -> None:
    pool = BufferPool()
    buffer = pool.take(SIZE)
    place = place_of(buffer)
    holders = [
        buffer,
        buffer.reshape(2, -1).view(np.float16)[1],
        torch.from_numpy(buffer.reshape(4, -1))[2].view(2, -1),
    ]
    del buffer
    while holders:
        gc.collect()
        assert place_of(pool.take(SIZE)) != place
        holders.pop(0)
    assert place in {place_of(one) for one in [pool.take(SIZE), pool.take(SIZE)]}


def test_what_is_written_through_one_is_not_seen_through_another() -> None:
    pool = BufferPool()
    held = [torch.from_numpy(pool.take(SIZE)).fill_(number) for number in range(2 * KEPT_BUFFERS)]
    assert [set(tensor.tolist()) for tensor in held] == [{number} for number in range(2 * KEPT_BUFFERS)]


def test_no_more_lie_ready_than_are_kept() -> None:
    pool = BufferPool()
    held = [pool.take(SIZE) for _ in range(3 * KEPT_BUFFERS)]
    del held
    assert {size: len(free) for size, free in pool._free.items()} == {SIZE: KEPT_BUFFERS}
    for number in range(5 * KEPT_SIZES):
        pool.take(SIZE + number)
    assert len(pool._free) <= KEPT_SIZES + 1


def test_small_and_empty_buffers_are_the_allocator_s() -> None:
    pool = BufferPool()
    assert [len(pool.take(size)) for size in (0, 1, SMALLEST_BYTES - 1)] == [0, 1, SMALLEST_BYTES - 1]
    assert pool._free == {}


def test_threads_never_share_a_buffer() -> None:
    pool, faults = BufferPool(), []

    def work(number: int) -> None:
        for _ in range(200):
            buffer = pool.take(SIZE)
            buffer[::4096] = number
            if set(buffer[::4096].tolist()) != {number}:
                faults.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
