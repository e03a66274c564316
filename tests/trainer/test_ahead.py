"""Batches that are made ahead."""

import threading
import time

import pytest

from trainer.ahead import made_ahead


def test_batches_come_in_their_order_and_end():
    assert list(made_ahead(iter_of(range(5)))) == [0, 1, 2, 3, 4]


def iter_of(values):
    yield from values


def test_a_batch_is_made_while_the_one_before_is_worked_on():
    def slow():
        while True:
            time.sleep(0.02)
            yield None

    stream = made_ahead(slow())
    next(stream)
    time.sleep(0.1)
    start = time.perf_counter()
    next(stream)
    assert time.perf_counter() - start < 0.015
    stream.close()


def test_an_error_comes_in_place_of_its_batch_and_ends_the_thread():
    def failing():
        yield 1
        raise KeyError("lost")

    before, stream = threading.active_count(), made_ahead(failing())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="lost"):
        next(stream)
    assert threading.active_count() == before


def test_closing_ends_the_thread_and_what_it_reads_from():
    closed = []

    def endless():
        try:
            while True:
                yield None
        finally:
            closed.append(True)

    before, stream = threading.active_count(), made_ahead(endless())
    next(stream)
    stream.close()
    assert closed == [True]
    assert threading.active_count() == before
