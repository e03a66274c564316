"""What may be said of a comparison, in words that its statistics allow and no others."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Evidence:
    """The statistics of one comparison, first minus second; differences in points, percent of the metric."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    """Bounds of the interval, infinite where runs say nothing of training again: one seed, or no spread at all."""
    p: float
    """Adjusted for the family of a planned comparison, of another as it is."""
    equivalence_p: float
    detectable: float
    """The smallest difference that such a study finds with 80 % probability; infinite if nothing is known."""
    margin: float
    confidence: float
    is_planned: bool
    n_teachers: int | None
    """None where neither arm learns from a teacher that was drawn."""
    condition: str = ""
    """What all of it is under, such as `with 10 % of the labels`."""
    n_seeds: int = 1

    @property
    def is_different(self) -> bool:
        """Whether the test finds a difference."""
        return self.p < 1 - self.confidence

    @property
    def is_equivalent(self) -> bool:
        """Whether both one-sided tests find the difference to be within the margin."""
        return self.equivalence_p < 1 - self.confidence


def verdict(evidence: Evidence) -> str:
    """One sentence, or two where there was one teacher only.

    `beats` stands there only of a planned comparison whose adjusted p is below 1 - confidence; `equivalent` and
    `less than the margin` only where the equivalence test holds at that level; `not settled` where neither does.
    """
    one = evidence
    condition = f" {one.condition}" if one.condition else ""
    interval = f"{one.confidence * 100:g} % interval {signed(one.low)} to {signed(one.high)}"
    if math.isinf(one.low):
        opening = "Not settled" if one.is_planned else "Exploratory"
        why = "with one seed" if one.n_seeds == 1 else "in every run"
        return (
            f"{opening}{condition}: {one.first} minus {one.second} is {signed(one.difference)} points {why},"
            " which says nothing of training again."
        )
    if not one.is_planned:
        return (
            f"Exploratory{condition}: {one.first} minus {one.second} is {signed(one.difference)} points ({interval},"
            f" {p_in_words(one.p)} unadjusted); it was not planned, so nothing is claimed.{_of_teachers(one)}"
        )
    if one.is_different:
        better, worse = (one.first, one.second) if one.difference > 0 else (one.second, one.first)
        low, high = (one.low, one.high) if one.difference > 0 else (-one.high, -one.low)
        but = f", but by less than the margin of {one.margin:g}" if one.is_equivalent else ""
        return (
            f"{better} beats {worse}{condition} by {points(abs(one.difference))}{but}"
            f" ({one.confidence * 100:g} % interval {points_between(low, high)}, adjusted {p_in_words(one.p)})."
            f"{_of_teachers(one)}"
        )
    if one.is_equivalent:
        margin = f"{one.margin:g} point{'s' * (one.margin != 1)}"
        return (
            f"{one.first} and {one.second} are equivalent within {margin}{condition}: their difference is"
            f" {signed(one.difference)} ({interval}, equivalence {p_in_words(one.equivalence_p)}).{_of_teachers(one)}"
        )
    return (
        f"Not settled{condition}: {one.first} minus {one.second} is {signed(one.difference)} points; differences from"
        f" {signed(one.low)} to {signed(one.high)} are compatible with the data (adjusted {p_in_words(one.p)}), and"
        f" this study could have detected {points(one.detectable)}.{_of_teachers(one)}"
    )


def _of_teachers(evidence: Evidence) -> str:
    return " All of it with one teacher: another may differ." if evidence.n_teachers == 1 else ""


def signed(difference: float) -> str:
    """A difference in points with its sign, and two digits where it would be a zero else."""
    digits = 1 if abs(difference) >= 0.95 or difference == 0 else 2
    return f"{difference:+.{digits}f}"


def points(difference: float) -> str:
    """An absolute difference in points."""
    digits = 1 if difference >= 0.95 or difference == 0 else 2
    return f"{difference:.{digits}f} points"


def points_between(low: float, high: float) -> str:
    """An interval of a difference that is above 0, in points."""
    return f"{signed(low).removeprefix('+')} to {signed(high).removeprefix('+')}"


def p_in_words(p: float) -> str:
    """`p = 0.012`, or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
