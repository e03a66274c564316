"""Numbers with their 95 % interval: over images for one run, over seeds for several."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

from cli.page_values import Estimate
from trainer.scores import Accuracy

CONFIDENCE = 0.95


def over_images(value: float, n_images: int) -> Estimate:
    """A top-1 measured once, with Wilson's interval."""
    low, high = Accuracy(round(value * n_images), n_images).interval()
    return Estimate(value, low, high, n_images, "images")


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of two values or more, one a seed, with Student's interval: mean ± t s / √n."""
    mean = statistics.mean(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values), "seeds")
