"""Numbers with their 95 % interval: over images for one run, over seeds for several."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.scores import Accuracy

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and what it would be again, as fractions of 1; `low` and `high` may lie outside [0, 1]."""

    value: float
    low: float
    high: float
    n: int
    over: Literal["images", "seeds"]
    """What was drawn `n` times: an interval over images says nothing of training again."""

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def over_images(value: float, n_images: int) -> Estimate:
    """A top-1 measured once, with Wilson's interval."""
    low, high = Accuracy(round(value * n_images), n_images).interval()
    return Estimate(value, low, high, n_images, "images")


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of two values or more, one a seed, with Student's interval: mean ± t s / √n."""
    mean = statistics.mean(values)
    half = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values), "seeds")


def student_t(freedom: int) -> float:
    """The t that |T| stays below with probability 0.95, for that many degrees of freedom.

    Found by halving the angle atan(t / √freedom), in which the probability has a closed form.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < CONFIDENCE else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom tan(angle)).

    Source: Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4.
    """
    is_odd = freedom % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
