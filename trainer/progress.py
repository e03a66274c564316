"""Where a run is, how fast it goes, and how long it waits for data."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    step: int
    steps: int
    loss: float
    """The last that was looked at: of this step, on a GPU of the one before it."""
    waited: float
    """Fraction of the time spent waiting for data, since the last evaluation."""
    steps_per_s: float
    """Since the last evaluation, in steps alone."""
    resumed_from: int


class TimedStream:
    """Micro-batches, and the time that was waited for them."""

    def __init__(self, stream: Generator[Any, None, None]) -> None:
        self._stream = stream
        self.seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        began = time.perf_counter()
        batch = next(self._stream)
        self.seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Ends what makes them."""
        self._stream.close()


class Pace:
    """How fast steps were, and how long they waited for data, since this was made."""

    def __init__(self, stream: TimedStream) -> None:
        self._stream = stream
        self._waited_before = stream.seconds
        self.steps = 0
        self.seconds = 0.0

    def count(self, seconds: float) -> None:
        """Adds a step."""
        self.steps += 1
        self.seconds += seconds

    @property
    def steps_per_s(self) -> float:
        """Steps a second; 0 before the first."""
        return self.steps / self.seconds if self.steps else 0.0

    @property
    def waited(self) -> float:
        """Fraction of the time; 0 before the first step."""
        return (self._stream.seconds - self._waited_before) / self.seconds if self.steps else 0.0

    def spent(self) -> dict[str, float]:
        """As the log tells it."""
        return {"seconds": self.seconds, "data_wait": self.waited, "steps_per_s": self.steps_per_s}
