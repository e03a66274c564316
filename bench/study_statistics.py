"""Are the intervals and tests of a study as good as they say? Studies whose truth is known, drawn many times.

    python bench/study_statistics.py [--studies 200] [--images 1000]

Every study has two arms of 3 teachers by 10 seeds, an image-only one of 10 seeds, and the test images of its own; what
varies by teacher, by seed, by both and by image is drawn anew. Hits are drawn one by one, so their noise is that of
real answers. Printed are how often the 95 % intervals hold the truth, how often a family of three true nulls has a
word too many, and how often a true difference of 2 points is found, beside what the detectable effect says of it.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from trainer.bootstrap import bootstrap_means
from trainer.stats import crossed_mean, detection_power, equivalence_p, holm, minimum_detectable_effect, stats

TEACHERS, SEEDS = 3, 10


@dataclass(frozen=True)
class Regime:
    """Standard deviations in points: of an arm by teacher, by seed and by both, and of both arms by image."""

    name: str
    teacher: float
    seed: float
    both: float
    image: float


REGIMES = (
    Regime("seeds vary most", 0.3, 1.5, 0.7, 15.0),
    Regime("teachers and seeds alike", 1.0, 1.0, 0.5, 15.0),
    Regime("teachers vary most", 1.5, 0.5, 0.5, 15.0),
    Regime("nothing but images", 0.0, 0.3, 0.3, 25.0),
)


def difference(rng: np.random.Generator, regime: Regime, true_points: float, n_images: int) -> np.ndarray:
    """Paired differences of two arms in points, [T, S, I]."""
    accuracy = np.full((2, TEACHERS, SEEDS, n_images), 0.6)
    accuracy[0] += true_points / 100
    accuracy += rng.normal(scale=regime.teacher, size=(2, TEACHERS, 1, 1)) / 100 / np.sqrt(2)
    accuracy += rng.normal(scale=regime.seed, size=(2, 1, SEEDS, 1)) / 100 / np.sqrt(2)
    accuracy += rng.normal(scale=regime.both, size=(2, TEACHERS, SEEDS, 1)) / 100 / np.sqrt(2)
    # What one arm gets right more often than the other depends on the image; its mean over all images is 0.
    accuracy[0] += rng.choice([-1, 1], size=n_images) * regime.image / 100
    hits = rng.random(accuracy.shape) < accuracy
    return 100.0 * (hits[0].astype(np.float64) - hits[1])


def calibrate(regime: Regime, n_studies: int, n_images: int) -> str:
    """One line of figures."""
    rng = np.random.default_rng(0)
    covered, covered_by_bootstrap, wrong, equivalent, found, foretold = [], [], [], [], [], []
    for _ in range(n_studies):
        nulls = [difference(rng, regime, 0.0, n_images) for _ in range(3)]
        estimates = [crossed_mean(null) for null in nulls]
        low, high = estimates[0].interval(0.95)
        covered.append(low <= 0 <= high)
        (low, high), *_ = bootstrap_means(nulls[:1], confidence=0.95, resamples=1000)
        covered_by_bootstrap.append(low <= 0 <= high)
        wrong.append(min(holm([estimate.p for estimate in estimates])) < 0.05)
        real = crossed_mean(difference(rng, regime, 2.0, n_images))
        found.append(real.p < 0.05)
        equivalent.append(equivalence_p(real, 2.0) < 0.05)
        critical = float(stats.t.ppf(0.975, real.freedom))
        foretold.append(detection_power(2.0 / real.standard_error, real.freedom, critical))
    detectable = minimum_detectable_effect(real.standard_error, real.freedom, level=0.05)
    figures = [covered, covered_by_bootstrap, wrong, found, foretold, equivalent]
    return f"{regime.name:26}" + "".join(f"{100 * np.mean(one):12.1f}" for one in figures) + f"{detectable:12.1f}"


def main() -> None:
    """Prints a table; percent of studies, points in the last column."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--images", type=int, default=1000)
    given = parser.parse_args()
    heads = ("t covers", "bootstrap", "any of 3", "found 2", "foretold", "equal 2", "detectable")
    print(f"{'':26}" + "".join(f"{head:>12}" for head in heads))
    for regime in REGIMES:
        print(calibrate(regime, given.studies, given.images), flush=True)


if __name__ == "__main__":
    main()
