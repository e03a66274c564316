"""The curves of a page: validation and losses by step, with what is missing of them."""

import math
from collections.abc import Iterator, Mapping, Sequence

from cli.page_intervals import over_images, over_seeds
from cli.page_runs import METRICS_NAME, FinishedRun, MetricsLine, RunGroup, some_of
from cli.page_values import Curve, CurvePoint

SELECTION = "selection"
"""The validation metric by which a run keeps its weights."""
TOTAL = "total"
"""The sum of a run's loss terms."""


def validation_curve(group: RunGroup) -> Curve:
    """Validation score by step: one run with its interval over images, several as their mean over seeds."""
    tables = [{line.step: line.metrics.get(SELECTION) for line in run.metrics} for run in group.runs]
    absent = [run for run, table in zip(group.runs, tables, strict=True) if not table]
    if absent:
        return Curve(missing=(f"{group.label}: no evaluation in {METRICS_NAME}{_seeds(group, absent)}",))
    points: list[CurvePoint | None] = []
    gaps: dict[str, list[int]] = {}
    for step in sorted({step for table in tables for step in table}):
        values = [as_fraction(table.get(step)) for table in tables]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            points.append(_point(group, step, known))
            continue
        without = [run for run, value in zip(group.runs, values, strict=True) if value is None]
        gaps.setdefault(f"no validation {group.first.result.metric}{_seeds(group, without)}", []).append(step)
        points.append(None)
    return Curve(tuple(points), _name_gaps(group.label, gaps))


def _point(group: RunGroup, step: int, values: Sequence[float]) -> CurvePoint:
    n_images = group.first.n_validation
    if len(values) > 1:
        estimate = over_seeds(values)
    elif n_images is not None and group.first.result.metric == "top-1":  # no line says what a bootstrap would need
        estimate = over_images(values[0], n_images)
    else:
        return CurvePoint(step, values[0])
    return CurvePoint(step, estimate.value, estimate.low, estimate.high)


def _seeds(group: RunGroup, runs: Sequence[FinishedRun]) -> str:
    return f" (seed {', '.join(str(run.config.seed) for run in runs)})" if len(group.runs) > 1 else ""


def loss_curves(group: RunGroup) -> dict[str, Curve]:
    """Term → its loss by step, the mean of the seeds that have it; weighted, of one batch each.

    The total of a single term says nothing more, and is left out.
    """
    lines = [line for run in group.runs for line in run.metrics]
    terms = list(dict.fromkeys(term for line in lines for term in line.losses))
    terms = [term for term in terms if term != TOTAL or len(terms) > 2]
    return {term: _loss_curve(group.label, term, lines) for term in terms}


def _loss_curve(label: str, term: str, lines: Sequence[MetricsLine]) -> Curve:
    points: list[CurvePoint | None] = []
    gaps: list[int] = []
    for step, said in _by_step(term, lines):
        values = [value for value in said if value is not None and math.isfinite(value)]
        is_whole = len(values) == len(said)
        points.append(CurvePoint(step, math.fsum(values) / len(values)) if is_whole else None)
        gaps += [] if is_whole else [step]
    return Curve(tuple(points), _name_gaps(label, {f"no loss {term}": gaps} if gaps else {}))


def _by_step(term: str, lines: Sequence[MetricsLine]) -> Iterator[tuple[int, list[float | None]]]:
    """The values of a term at every step that has it; a term may have had nothing to say on a batch."""
    for step in sorted({line.step for line in lines if term in line.losses}):
        yield step, [line.losses[term] for line in lines if line.step == step and term in line.losses]


def as_fraction(value: float | None) -> float | None:
    """`value`, or None for one that is missing, NaN, or cannot be an accuracy."""
    return value if value is not None and 0 <= value <= 1 else None


def _name_gaps(label: str, gaps: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """What is missing at which steps, the first of them by number."""
    named = []
    for what, steps in gaps.items():
        named.append(f"{label}: {what} at step{'s' * (len(steps) > 1)} {some_of([str(step) for step in steps])}")
    return tuple(named)
