"""What several runs say together: means with their error, paired differences, and what they allow to be said.

Every score is a number in a grid of things that were drawn: teachers, seeds of students, test images. A mean over such
a grid is as uncertain as all of these together, so each of them is a random factor here.

Dimensions: T teachers, S seeds, I images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Values = NDArray[np.float64]

EXACT_SEEDS = 12
"""So many values have 4,096 sign patterns, which are all looked at; more are not worth the time of a cross-check."""

WHOLE = 100.0
"""What one image counts, in percent of itself."""

ROUNDING = 1e-13
"""A standard error below this share of the largest value is what adding floats leaves, and counts as none."""


@dataclass(frozen=True, slots=True)
class MeanEstimate:
    """A mean and how far it may be from that of drawing everything again."""

    mean: float
    standard_error: float
    """0 if all values are equal; infinite if nothing is known of the spread, as from one value."""
    freedom: float
    """Degrees of freedom of the standard error, by Satterthwaite's rule; 1 where it is infinite."""

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the spread."""
        return math.isfinite(self.standard_error)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Student's t interval. Without spread it is the mean alone; of an unknown one everything, from -∞ to ∞.

        Source: Student (1908): mean ± t SE.
        """
        if not self.is_known:
            return -math.inf, math.inf
        half = float(stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """Two-sided p of a true mean of 0. 1 if nothing is known of the spread; without spread 0, or 1 for a mean of 0.

        Source: Student (1908).
        """
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def p_above(self, bound: float) -> float:
        """One-sided p of a true mean of `bound` or less; small if it is above."""
        return 1.0 if not self.is_known else _tail(self.mean - bound, self.standard_error, self.freedom)

    def p_below(self, bound: float) -> float:
        """One-sided p of a true mean of `bound` or more; small if it is below."""
        return 1.0 if not self.is_known else _tail(bound - self.mean, self.standard_error, self.freedom)


UNKNOWN = (math.inf, 1.0)
"""Standard error and degrees of freedom where nothing is known of the spread."""


def _tail(distance: float, standard_error: float, freedom: float) -> float:
    """P(T ≥ distance / SE); without spread 0 for any distance that is there, else 1."""
    if standard_error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / standard_error, freedom))


def crossed_mean(values: Values) -> MeanEstimate:
    """The mean of a full grid whose axes were all drawn: one axis gives the plain t, two teachers by seeds.

    The mean of T by S values of teachers t and seeds s, μ + a_t + b_s + e_ts, has the variance
    (MS_T + MS_S - MS_E) / (T S) in its expected mean squares, and any number of crossed factors
    Σ_A ±MS_A / N over all sets A of factors, with + for odd ones and - for even ones. Such a sum may come out smaller
    than one that leaves a factor out as if it varied nothing, even below zero; so the largest of all these sums, of
    every choice of factors and of the residual alone, is taken. Its degrees of freedom are v² / Σ (MS_A² / f_A). Where
    the largest main effect by itself gives the wider interval, that is taken: three teachers that differ much have two
    degrees of freedom, and Satterthwaite's rule finds more. In `bench/study_statistics.py` intervals of 95 % cover 94
    to 97 %, and three true nulls have a word too many in 5 % of studies; in 9 % where three teachers differ more than
    seeds do.

    Args:
        values: of any shape; axes of length 1 are no factors: nothing is known of what they would vary.

    Source: Brennan, Generalizability Theory (2001), section 5.1 (mean squares of random crossed designs, and the
    error of a grand mean); Searle, Casella and McCulloch, Variance Components (1992), section 4.3; Satterthwaite
    (1946) for the degrees of freedom.
    """
    mean = math.fsum(values.ravel().tolist()) / values.size
    grid = values.squeeze()
    if grid.ndim == 0:
        return MeanEstimate(mean, *UNKNOWN)
    squares = mean_squares(grid)
    factors = tuple(range(grid.ndim))
    candidates = [
        [(*squares[effect], (-1) ** (len(effect) + 1)) for effect in squares if set(effect) <= set(chosen)]
        for size in range(1, grid.ndim + 1)
        for chosen in combinations(factors, size)
    ]
    candidates.append([(*squares[factors], 1)])
    sums = [math.fsum(sign * square for square, _, sign in terms) for terms in candidates]
    variance = max(sums)
    if variance <= grid.size * (ROUNDING * float(np.abs(values).max())) ** 2:
        return MeanEstimate(mean, 0.0, float(grid.size - 1))
    terms = candidates[sums.index(variance)]
    freedom = max(1.0, variance**2 / math.fsum(square**2 / freedom for square, freedom, _ in terms))
    largest, its_freedom = max(squares[(factor,)] for factor in factors)
    if _half_width(largest, its_freedom) > _half_width(variance, freedom):
        variance, freedom = largest, float(its_freedom)
    return MeanEstimate(mean, math.sqrt(variance / grid.size), freedom)


def _half_width(variance: float, freedom: float) -> float:
    """Of a 95 % interval, up to a factor."""
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)


def mean_squares(grid: Values) -> dict[tuple[int, ...], tuple[float, int]]:
    """The mean square of every effect of a full grid and its degrees of freedom, by the axes of the effect.

    Source: Brennan (2001), section 3.3.
    """
    means = {
        kept: grid.mean(axis=tuple(axis for axis in range(grid.ndim) if axis not in kept), keepdims=True)
        for size in range(grid.ndim + 1)
        for kept in combinations(range(grid.ndim), size)
    }
    squares = {}
    for kept in means:
        if not kept:
            continue
        effect = np.zeros(())
        for below in means:
            if set(below) <= set(kept):
                effect = effect + (-1) ** (len(kept) - len(below)) * means[below]
        copies = grid.size // effect.size
        freedom = math.prod(grid.shape[axis] - 1 for axis in kept)
        squares[kept] = (copies * float(np.square(effect).sum()) / freedom, freedom)
    return squares


def mean_over_training(values: Values) -> MeanEstimate:
    """The mean of scores [T, S] or [T, S, I] in percent, as far as training again goes: of one seed nothing is known of
    that.

    One teacher is no factor: what is said then holds for students of this teacher. Where images are known, the error
    is no smaller than if one of I + 2 had another answer: two arms that are right on all of 30 images have not been
    shown to be equal. Where they are not, runs without any spread say nothing of it.

    Source: the floor is the error of a difference of paired proportions without a discordant pair, each cell of the
    table counting one half more: Agresti and Min (2005), "Simple improved confidence intervals for comparing matched
    proportions", section 3.
    """
    if values.shape[1] == 1:
        return MeanEstimate(float(values.mean()), *UNKNOWN)
    estimate = crossed_mean(values)
    if values.ndim < 3:
        return estimate
    if values.shape[2] == 1:
        # Runs that agree to the last digit, with nothing known by image, give no error to go by.
        return estimate if estimate.standard_error > 0 else MeanEstimate(estimate.mean, *UNKNOWN)
    floor = WHOLE / (values.shape[2] + 2)
    return replace(estimate, standard_error=max(floor, estimate.standard_error))


def equivalence_p(estimate: MeanEstimate, margin: float) -> float:
    """p of the true mean being `margin` or more away from 0: the larger of two one-sided tests.

    Args:
        margin: above 0, in the unit of the mean.

    Source: Schuirmann (1987), the two one-sided tests procedure.
    """
    return max(estimate.p_above(-margin), estimate.p_below(margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being one of so many, in their order; nothing for none.

    Source: Holm (1979): the i-th smallest of m times (m - i + 1), never below the one before, at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def minimum_detectable_effect(standard_error: float, freedom: float, *, level: float, power: float = 0.8) -> float:
    """The true mean that a two-sided t test finds with probability `power`, in the unit of the standard error.

    0 without spread, infinite where nothing is known of it.

    Args:
        level: at which p the test finds something, such as 0.05.

    Source: Cohen, Statistical Power Analysis (1988), section 2.2: power as a tail of the noncentral t.
    """
    if standard_error == 0 or not math.isfinite(standard_error):
        return standard_error
    critical = float(stats.t.ppf(1 - level / 2, freedom))

    def surplus(effect: float) -> float:
        return detection_power(effect, freedom, critical) - power

    high = critical + 1.0
    while surplus(high) < 0:
        high *= 2
    return standard_error * float(optimize.brentq(surplus, 0.0, high))


def detection_power(effect: float, freedom: float, critical: float) -> float:
    """P(|T| > critical) of a noncentral t, with the effect in standard errors."""
    above = stats.nct.sf(critical, freedom, effect)
    below = stats.nct.sf(critical, freedom, -effect)
    return float(np.nan_to_num(above) + np.nan_to_num(below))  # SciPy has NaN for a far tail that is nothing


def sign_flip_p(values: Sequence[float] | Values) -> float | None:
    """Two-sided p of a symmetric distribution around 0: the share of all sign patterns with as large a mean.

    It asks for no shape of the distribution, and cannot be below 2 / 2^S: of five values 0.0625. 1 if all are 0.

    Args:
        values: [S], the mean difference of each seed.

    Returns:
        None for more than `EXACT_SEEDS` values.

    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    found = np.asarray(values, np.float64)
    if len(found) > EXACT_SEEDS:
        return None
    signs = 1 - 2 * (np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1)
    sums = np.abs(signs @ found)
    return float((sums >= abs(found.sum()) - 1e-9 * np.abs(found).sum()).mean())
