"""What tuning tried of each arm, and whether its final runs have what it found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.study_table import StudyRun, StudyTable


@dataclass(frozen=True, slots=True)
class TunedArm:
    """What tuning tried of an arm and what its final runs have."""

    name: str
    n_trials: int
    n_runs: int
    tried: Mapping[str, tuple[object, ...]]
    """Setting → the values that were tried, numbers in rising order."""
    chosen: Mapping[str, object]
    validation: float
    """Percent, of the best trial."""
    at_edge: tuple[str, ...]
    """Settings whose chosen number is the smallest or largest that was tried."""
    is_best: bool
    """Whether the settings of the final runs are those of the best trial."""


def describe_tuning(table: StudyTable, name: str) -> TunedArm | None:
    """What was tried of an arm; None if it was not tuned, as a teacher that only taught those that were."""
    runs = table.tuning(name)
    if not runs or not table.spec.arms[name].tune:
        return None
    trials: dict[int, list[StudyRun]] = {}
    for run in runs:
        trials.setdefault(run.trial or 0, []).append(run)
    means = {trial: math.fsum(run.validation for run in of_trial) / len(of_trial) for trial, of_trial in trials.items()}
    best = max(sorted(means), key=lambda trial: means[trial])
    chosen = next(
        (run.settings for fraction in table.fractions for run in table.final(name, fraction).values()),
        trials[best][0].settings,
    )
    tried = {
        setting: _in_order([run.settings[setting] for run in runs if setting in run.settings]) for setting in chosen
    }
    at_edge = tuple(
        setting
        for setting, values in tried.items()
        if len(values) > 1 and all(_is_number(value) for value in values) and chosen[setting] in (values[0], values[-1])
    )
    is_best = any(of_trial[0].settings == chosen and means[trial] == means[best] for trial, of_trial in trials.items())
    return TunedArm(name, len(trials), len(runs), tried, chosen, 100 * means[best], at_edge, is_best)


def _in_order(values: Sequence[object]) -> tuple[object, ...]:
    distinct = [value for number, value in enumerate(values) if value not in values[:number]]
    return tuple(sorted(distinct, key=float)) if all(_is_number(one) for one in distinct) else tuple(distinct)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
