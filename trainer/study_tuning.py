"""How the settings of an arm are chosen: trials on a grid, the best on validation, further where it lies at an edge.

Pure arithmetic on the scores of trials. What is tried next is a function of the spec and the scores so far, so that a
study that was interrupted goes on to the same choice.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from dla_cache.spec import canonical_json
from trainer.study_entries import Axis
from trainer.study_spec import Tuning

Settings = Mapping[str, Any]
"""Dotted name of a run's field → value."""

Score = Callable[[Settings], float | None]
"""Mean validation score of a trial; None until all its runs are done."""


@dataclass(frozen=True, slots=True)
class TuningState:
    """What was tried of an arm, and what came of it."""

    trials: tuple[Settings, ...]
    """In the order in which they were asked for."""
    scores: tuple[float | None, ...]
    """Mean validation score of each."""
    n_extensions: int
    """How many of the trials lie outside the grid."""
    chosen: Settings | None
    """None until there is nothing left to try."""
    at_edge: tuple[str, ...]
    """Numeric settings whose chosen value is the lowest or highest that was tried: the optimum may lie beyond."""


def tune(axes: Mapping[str, Axis], default: Settings, tuning: Tuning, score: Score) -> TuningState:
    """What is to be tried of an arm, given the scores so far; and what is chosen, once all trials have one.

    The best mean validation wins, of equal ones the first in the order of the trials. Where it lies at the edge of an
    axis that may be extended, the axis gets one value more beyond it and the best settings are tried with that, up to
    `tuning.extensions` times.

    Args:
        default: what the arm's run says of each setting without tuning.
    """
    trials = grid_trials(axes, default, tuning.trials)
    n_grid = len(trials)
    while True:
        scores = tuple(score(trial) for trial in trials)
        known = [value for value in scores if value is not None]
        if len(known) < len(trials):
            return TuningState(tuple(trials), scores, len(trials) - n_grid, None, ())
        best = trials[known.index(max(known))]
        further = next_trial(axes, trials, best) if len(trials) - n_grid < tuning.extensions else None
        if further is None:
            edges = tuple(name for name in axes if edge_of(axes[name], name, trials, best) is not None)
            return TuningState(tuple(trials), scores, len(trials) - n_grid, best, edges)
        trials.append(further)


def grid_trials(axes: Mapping[str, Axis], default: Settings, n_trials: int) -> list[Settings]:
    """The points of the grid that are tried, in its order: the last setting changes fastest.

    If the grid has more than `n_trials`, a subset drawn from a fixed seed, so that arms of one grid try the same; with
    the default among them, or where the grid has it not, the first value in its place.
    """
    points = [dict(zip(axes, values, strict=True)) for values in product(*(axis.values for axis in axes.values()))]
    if len(points) <= n_trials:
        return list(points)
    start = {
        name: default[name] if name in default and default[name] in axis.values else axis.values[0]
        for name, axis in axes.items()
    }
    first = points.index(start)
    others = np.array([place for place in range(len(points)) if place != first])
    drawn = np.random.default_rng(0).permutation(others)[: n_trials - 1].tolist()
    return [points[place] for place in sorted([first, *drawn])]


def next_trial(axes: Mapping[str, Axis], trials: list[Settings], best: Settings) -> Settings | None:
    """The best settings with one axis extended beyond the edge where they lie; None if there is none to extend."""
    for name, axis in axes.items():
        end = edge_of(axis, name, trials, best) if axis.extend else None
        if end is not None:
            value = value_beyond(axis, tried_values(name, trials), end)
            if value is not None:
                return {**best, name: value}
    return None


def edge_of(axis: Axis, name: str, trials: list[Settings], best: Settings) -> int | None:
    """At which end of a numeric axis the best settings lie: -1 the lowest value that was tried, 1 the highest."""
    values = tried_values(name, trials) if axis.is_numeric else []
    if len(values) < 2:
        return None
    return {values[0]: -1, values[-1]: 1}.get(best[name])


def tried_values(name: str, trials: list[Settings]) -> list[float]:
    """The values that were tried of a numeric setting, rising."""
    return sorted({trial[name] for trial in trials})


def value_beyond(axis: Axis, values: list[float], end: int) -> float | None:
    """One value beyond the end of an axis: by the ratio of the last two there, or by their difference where a value is
    not above 0; inside `low` and `high`. None if that is no new value.
    """
    last, before = (values[-1], values[-2]) if end == 1 else (values[0], values[1])
    value = last * (last / before) if values[0] > 0 else last + (last - before)
    value = min(math.inf if axis.high is None else axis.high, max(-math.inf if axis.low is None else axis.low, value))
    if all(isinstance(one, int) for one in axis.values) and value == int(value):
        value = int(value)
    return None if value in values else value


def values_beyond(axis: Axis, n_extensions: int) -> list[float]:
    """All that extending an axis could ever try, downwards first."""
    beyond: list[float] = []
    for end in (-1, 1) if axis.extend else ():
        values = list(axis.numbers)
        for _ in range(n_extensions):
            value = value_beyond(axis, values, end)
            if value is None:
                break
            beyond.append(value)
            values = sorted([*values, value])
    return beyond


def settings_text(settings: Settings) -> str:
    """The settings as one JSON line, by which trials are told apart."""
    return canonical_json(dict(settings))
