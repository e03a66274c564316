"""Batches made ahead, by a thread of their own, while a step computes."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

BATCHES_AHEAD = 2
"""Batches that wait, ready or in the making, while one is worked on: a slow one has a step's time to be caught up."""


def made_ahead(batches: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same batches in the same order; an error comes where its batch would. Closing it closes `batches`."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    waiting: deque[Future[T | object]] = deque()
    try:
        waiting.extend(pool.submit(next, batches, end) for _ in range(BATCHES_AHEAD))
        while (batch := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, batches, end))
            yield batch  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
        batches.close()
