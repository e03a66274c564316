"""What a study found: every arm's mean and every comparison with its verdict; a pure function of its table.

All scores and differences are in percent of the metric, which are points.

Dimensions: T teachers, S seeds, I images (or groups of images), 1 where nothing is known by image.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.bootstrap import bootstrap_means
from trainer.stats import (
    MeanEstimate,
    Values,
    equivalence_p,
    holm,
    mean_over_training,
    minimum_detectable_effect,
    sign_flip_p,
)
from trainer.study_pairs import Cell, Pair, arm_grid, compare, label_of, reference_arm, unplanned_pairs
from trainer.study_spec import StudySpec
from trainer.study_table import StudyRun, StudyTable
from trainer.study_tuned import TunedArm, describe_tuning
from trainer.verdict import Evidence, verdict

POWER = 0.8


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What an arm scored with one share of the labels."""

    name: str
    label: str
    """Of the page, with the mark of an arm whose latents saw labels."""
    fraction: float | None
    is_teacher: bool
    is_exploratory: bool
    teachers: tuple[int | None, ...]
    seeds: tuple[int, ...]
    """Those that are there for every teacher: the grid that the mean is over."""
    runs: Mapping[Cell, StudyRun]
    """All there are, in or out of the grid."""
    score: MeanEstimate
    """Percent; over teachers, seeds and images."""
    low: float
    high: float
    bootstrap: tuple[float, float]
    on_these_images: tuple[float, float]
    """The t interval over teachers and seeds alone."""

    def mean_of(self, field: str) -> float | None:
        """The mean of a number over the runs; None if one of them does not know it."""
        values = [getattr(run, field) for run in self.runs.values()]
        return None if None in values else math.fsum(values) / len(values)

    @property
    def gradient_shares(self) -> dict[str, float]:
        """Term → its mean share over the runs that logged it."""
        terms = dict.fromkeys(term for run in self.runs.values() for term in run.gradient_shares)
        shares = {
            term: [run.gradient_shares[term] for run in self.runs.values() if term in run.gradient_shares]
            for term in terms
        }
        return {term: math.fsum(values) / len(values) for term, values in shares.items()}

    @property
    def inert(self) -> dict[str, int]:
        """Term → in how many runs the guard calls it nearly inert."""
        return dict(Counter(term for run in self.runs.values() for term in run.inert))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms, run by run."""

    first: str
    second: str
    fraction: float | None
    teachers: tuple[int | None, ...]
    seeds: tuple[int, ...]
    by_run: Values
    """[T, S], first minus second in points."""
    estimate: MeanEstimate
    bootstrap: tuple[float, float]
    on_these_images: tuple[float, float]
    p: float
    sign_flip: float | None
    evidence: Evidence

    @property
    def is_planned(self) -> bool:
        return self.evidence.is_planned

    @property
    def verdict(self) -> str:
        return verdict(self.evidence)


@dataclass(frozen=True, slots=True)
class StudyResults:
    """All that the page says in numbers."""

    table: StudyTable
    arms: tuple[ArmResult, ...]
    """In the order of the spec, for each share of the labels in turn."""
    comparisons: tuple[Comparison, ...]
    """Planned ones first."""
    tuning: tuple[TunedArm, ...]
    missing: tuple[str, ...]
    """Final runs that the spec asks for and that are not there."""
    reference: str | None
    """The arm that arms of no planned comparison are held against."""


def analyse(table: StudyTable, *, partial: bool = False) -> StudyResults:
    """The results of a study.

    Args:
        partial: compares two arms on the runs that both have, where the seeds of one are not those of the other.

    Raises:
        StudyError: if a planned comparison is not of the same (teacher seed, seed), or of other shares of the labels.
    """
    spec = table.spec
    named = {name: label_of(spec, name) for name in spec.arms}
    grids = {
        (name, fraction): table.final(name, fraction)
        for fraction in table.fractions
        for name in spec.arms
        if table.final(name, fraction)
    }
    reference = reference_arm(spec)
    family = [
        pair
        for fraction in table.fractions
        for first, second in spec.comparisons
        if (pair := compare(table, first, second, fraction, partial=partial)) is not None
    ]
    planned = {frozenset(pair) for pair in spec.comparisons}
    others = [
        pair
        for fraction in table.fractions
        for first, second in unplanned_pairs(spec, reference)
        if frozenset((first, second)) not in planned
        and (pair := compare(table, first, second, fraction, partial=True)) is not None
    ]
    arrays = [Pair(name, "", fraction, *arm_grid(table, runs)) for (name, fraction), runs in grids.items()]
    everything = [*arrays, *family, *others]
    intervals = bootstrap_means([pair.values for pair in everything], confidence=spec.confidence)
    by_array = dict(zip([id(pair) for pair in everything], intervals, strict=True))
    # What is planned and not there yet counts all the same: else who looks early would be corrected for less.
    n_family = len(table.fractions) * len(spec.comparisons)
    absent = [1.0] * (n_family - len(family))
    adjusted = holm([mean_over_training(pair.values).p for pair in family] + absent)[: len(family)]
    arms = tuple(
        describe_arm(spec, pair, grids[pair.first, pair.fraction], named[pair.first], by_array[id(pair)])
        for pair in arrays
    )
    comparisons = [
        describe_comparison(spec, pair, named, by_array[id(pair)], p, n_family)
        for pair, p in zip(family, adjusted, strict=True)
    ] + [describe_comparison(spec, pair, named, by_array[id(pair)], None, 1) for pair in others]
    tuning = tuple(row for name in spec.arms if (row := describe_tuning(table, name)) is not None)
    return StudyResults(table, arms, tuple(comparisons), tuning, tuple(table.missing()), reference)


def describe_arm(
    spec: StudySpec, pair: Pair, runs: Mapping[Cell, StudyRun], label: str, bootstrap: tuple[float, float]
) -> ArmResult:
    """The row of an arm."""
    score = mean_over_training(pair.values)
    arm = spec.arms[pair.first]
    return ArmResult(
        pair.first,
        label,
        pair.fraction,
        arm.role == "teacher",
        arm.exploratory,
        pair.teachers,
        pair.seeds,
        runs,
        score,
        *in_percent(score.interval(spec.confidence)),
        bootstrap,
        in_percent(mean_over_training(pair.values.mean(axis=2)).interval(spec.confidence)),
    )


def in_percent(interval: tuple[float, float]) -> tuple[float, float]:
    """An interval of a score as far as a score goes, 0 to 100; of one that is unknown nothing is cut off."""
    low, high = interval
    return interval if math.isinf(low) else (max(0.0, low), min(100.0, high))


def describe_comparison(
    spec: StudySpec,
    pair: Pair,
    named: Mapping[str, str],
    bootstrap: tuple[float, float],
    adjusted: float | None,
    n_family: int,
) -> Comparison:
    """A comparison and what may be said of it.

    Args:
        adjusted: p of a planned comparison among `n_family`; None of another.
    """
    estimate = mean_over_training(pair.values)
    by_run = pair.values.mean(axis=2)
    low, high = estimate.interval(spec.confidence)
    level = (1 - spec.confidence) / n_family
    detectable = minimum_detectable_effect(estimate.standard_error, estimate.freedom, level=level, power=POWER)
    evidence = Evidence(
        named[pair.first],
        named[pair.second],
        estimate.mean,
        low,
        high,
        estimate.p if adjusted is None else adjusted,
        equivalence_p(estimate, spec.equivalence_margin),
        detectable,
        spec.equivalence_margin,
        spec.confidence,
        adjusted is not None,
        None if pair.teachers == (None,) else len(pair.teachers),
        "" if pair.fraction is None else f"with {100 * pair.fraction:g} % of the labels",
        len(pair.seeds),
    )
    return Comparison(
        pair.first,
        pair.second,
        pair.fraction,
        pair.teachers,
        pair.seeds,
        by_run,
        estimate,
        bootstrap,
        mean_over_training(by_run).interval(spec.confidence),
        estimate.p,
        sign_flip_p(by_run.mean(axis=0)),
        evidence,
    )
