"""Which runs of a study are held against which: grids of teachers and seeds, in pairs.

Dimensions: T teachers, S seeds, I images (or groups of images), 1 where nothing is known by image.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dla_cache.errors import StudyError, name_some
from dla_cache.leaks import CONTROLS_OF_LABELS
from trainer.stats import Values
from trainer.study_spec import StudySpec
from trainer.study_table import StudyRun, StudyTable

LABEL_INFORMED = "label-informed"
"""An arm whose note has this word, or that learns from one that has, is marked wherever it is named."""

Cell = tuple[int | None, int]
"""Teacher seed and seed of a run."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The grid of an arm, or of the differences of two."""

    first: str
    second: str
    fraction: float | None
    teachers: tuple[int | None, ...]
    seeds: tuple[int, ...]
    values: Values
    """[T, S, I] in percent, I as the table's `by_unit` gives it."""


def full_grid(cells: Sequence[Cell]) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Teachers, and the seeds that are there for each of them."""
    teachers = sorted({teacher for teacher, _ in cells}, key=lambda teacher: -1 if teacher is None else teacher)
    there = set(cells)
    seeds = sorted({seed for _, seed in cells})
    return tuple(teachers), tuple(seed for seed in seeds if all((teacher, seed) in there for teacher in teachers))


def arm_grid(
    table: StudyTable, runs: Mapping[Cell, StudyRun]
) -> tuple[tuple[int | None, ...], tuple[int, ...], Values]:
    """Teachers, seeds and scores in percent of an arm; its first run alone where no seed is there for all teachers."""
    teachers, seeds = full_grid([*runs])
    if not seeds:
        (teacher, seed), *_ = runs
        teachers, seeds = (teacher,), (seed,)
    return teachers, seeds, np.stack([[scores(table, runs[t, s]) for s in seeds] for t in teachers])


def scores(table: StudyTable, run: StudyRun) -> Values:
    """A run's score in percent by image or group, [I]; [1] where that is not known."""
    hits = table.hits(run)
    assert run.test is not None
    return 100 * (np.array([run.test]) if hits is None else table.images.by_unit(hits))


def compare(table: StudyTable, first: str, second: str, fraction: float | None, *, partial: bool) -> Pair | None:
    """The differences of two arms where both have a run; None if `partial` and there is none.

    An arm that learns from no seeded teacher is paired by its seed with every teacher seed of the other.

    Raises:
        StudyError: if their runs are not the same ones and `partial` is not set.
    """
    runs = [table.final(first, fraction), table.final(second, fraction)]
    teachers = {teacher for cells in runs for teacher, _ in cells} - {None} or {None}
    sets = [
        {(t, seed) for teacher, seed in cells for t in ({teacher} if teacher is not None else teachers)}
        for cells in runs
    ]
    shares = [{run.label_fraction for run in cells.values()} for cells in runs]
    if not partial and (sets[0] != sets[1] or shares[0] != shares[1]):
        differing = sorted(sets[0] ^ sets[1], key=str)
        what = [f"teacher seed {teacher}, seed {seed}" if teacher is not None else f"seed {seed}" for teacher, seed in
                differing]  # fmt: skip
        told = [" or ".join(f"{share:g}" for share in sorted(one)) for one in shares]
        where = f"one alone has {name_some(what)}" if what else f"shares of the labels are {told[0]} and {told[1]}"
        raise StudyError(
            f"`{first}` and `{second}` are not a paired comparison: {where}",
            hint="run the same seeds of both, with `dla study run` again; `--partial` compares those that both have",
        )
    grid_teachers, seeds = full_grid(sorted(sets[0] & sets[1], key=str))
    if not seeds or shares[0] != shares[1]:
        return None

    def of(cells: Mapping[Cell, StudyRun], teacher: int | None, seed: int) -> Values:
        return scores(table, cells[(teacher, seed) if (teacher, seed) in cells else (None, seed)])

    values = [[of(runs[0], t, s) - of(runs[1], t, s) for s in seeds] for t in grid_teachers]
    return Pair(first, second, fraction, grid_teachers, seeds, np.array(values))


def reference_arm(spec: StudySpec) -> str | None:
    """The arm that stands in most planned comparisons, the first of several; None if none is planned."""
    counts = Counter(name for pair in spec.comparisons for name in pair)
    return counts.most_common(1)[0][0] if counts else None


def unplanned_pairs(spec: StudySpec, reference: str | None) -> list[tuple[str, str]]:
    """What is looked at beside the plan: arms of no comparison against the reference, and an arm against those that
    are like it, its controls."""
    students = [name for name, arm in spec.arms.items() if arm.role != "teacher"]
    compared = {name for pair in spec.comparisons for name in pair}
    pairs = [
        (spec.tuned_as(name), name)
        for name in students
        if spec.arms[name].like is not None and spec.arms[spec.tuned_as(name)].role != "teacher"
    ]
    pairs += [(name, reference) for name in students if reference is not None and name not in compared | {reference}]
    distinct = {frozenset(pair): pair for pair in reversed(pairs)}
    return [*reversed(distinct.values())]


def is_label_informed(spec: StudySpec, name: str) -> bool:
    """Whether an arm's latents saw labels: its note says so, its store is such a control, or it learns from such an
    arm."""
    store = spec.store_of(name)
    above = [one for one in (spec.learns_from(name), *spec.beside(name)) if one is not None]
    notes = [spec.arms[one].note or "" for one in spec.likeness(name)]
    return (
        any(LABEL_INFORMED in note for note in notes)
        or (store is not None and spec.stores[store].control in CONTROLS_OF_LABELS)
        or any(is_label_informed(spec, one) for one in above)
    )


def label_of(spec: StudySpec, name: str) -> str:
    """What the page calls an arm."""
    mark = f" ({LABEL_INFORMED})" if is_label_informed(spec, name) else ""
    return f"{spec.arms[name].label or name}{mark}"
