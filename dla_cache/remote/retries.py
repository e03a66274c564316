"""What fails for a moment is tried again, after waits that grow and differ between processes."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class PassingError(Exception):
    """A failure that may be gone in a moment; `what` says in plain words which."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an answer is waited for, and how often it is asked for."""

    timeout_s: float = 30
    """Of silence, until a request counts as failed."""
    tries: int = 8
    first_wait_s: float = 0.2
    """Upper bound of the first wait; it doubles from try to try."""
    longest_wait_s: float = 20

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after so many failures, uniform between none and a bound that doubles.

        Spread over the whole range, so that processes that failed together do not come back together.

        Source: AWS Architecture Blog, "Exponential Backoff And Jitter" (2015), "full jitter".
        """
        return random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2 ** (failures - 1)))


def try_again(request: Callable[[int], T], patience: Patience) -> T:
    """What `request` returns, which is told how often it has failed; after each PassingError but the last it is
    called again.

    Raises:
        PassingError: the last one.
    """
    for failures in range(patience.tries - 1):
        try:
            return request(failures)
        except PassingError:
            time.sleep(patience.wait_s(failures + 1))
    return request(patience.tries - 1)
