"""What a page says of runs: read from their folders; those that differ in their seed alone are put together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cli.arms import settings_of
from cli.page_intervals import over_seeds
from cli.page_store import StoreFacts, check_trained_on, place_of, read_store
from cli.page_values import Estimate
from dla_cache.errors import CheckpointError, RecipeMismatchError, StoreError
from dla_cache.remote import is_remote
from trainer.checkpoint import MetricsFile
from trainer.config import RunConfig
from trainer.run_folder import DataFacts, HeldOut, RunResult, held_out, read_config, read_facts, read_result

METRICS_NAME = "metrics.jsonl"
NAMES_SHOWN = 3


class MetricsLine(BaseModel):
    """One evaluation of a run, as far as a page shows it; a value may be missing or NaN."""

    model_config = ConfigDict(frozen=True)

    step: int
    losses: dict[str, float | None] = {}
    metrics: dict[str, float | None] = {}


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run folder, read."""

    folder: Path
    """Resolved; for telling runs apart, never for showing whole."""
    config: RunConfig
    facts: DataFacts
    result: RunResult
    test: HeldOut
    metrics: tuple[MetricsLine, ...]
    store: StoreFacts | None
    """None where the store is not at hand; then nothing is known of how many images validation has."""

    @property
    def steps(self) -> int:
        """Steps trained, which `epochs` decides where it is set."""
        return round(self.result.images_per_s * self.result.train_seconds / self.config.images_per_step)

    @property
    def n_validation(self) -> int | None:
        """Images that validation counts, where the store is at hand."""
        return None if self.store is None else self.store.images_of(self.config.roles.validation) or None


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs that differ in their seed alone, one a seed."""

    label: str
    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    @property
    def seeds(self) -> str:
        """`0`, `0, 2` or `0 to 4`."""
        seeds = sorted(run.config.seed for run in self.runs)
        is_range = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
        return f"{seeds[0]} to {seeds[-1]}" if is_range else ", ".join(map(str, seeds))

    @property
    def test(self) -> Estimate:
        first = self.first.test
        return self._estimate([run.test.value for run in self.runs], (first.low, first.high))

    @property
    def validation(self) -> float:
        return self._mean(lambda result: result.validation_score)

    @property
    def branches(self) -> dict[str, Estimate]:
        """Test score of each part that every run of the group has; the first is the whole model."""
        names = [name for name in self.first.result.branches if all(name in run.result.branches for run in self.runs)]
        intervals = self.first.result.branch_intervals
        return {
            name: self._estimate([run.result.branches[name] for run in self.runs], intervals[name]) for name in names
        }

    @property
    def mean_seconds(self) -> float:
        return self._mean(lambda result: result.train_seconds)

    @property
    def mean_speed(self) -> float:
        """Images a second."""
        return self._mean(lambda result: result.images_per_s)

    def _mean(self, of: Callable[[RunResult], float]) -> float:
        return math.fsum(of(run.result) for run in self.runs) / len(self.runs)

    def _estimate(self, values: Sequence[float], of_first: tuple[float, float]) -> Estimate:
        """One value a run with its interval: over seeds where there are several, else the first's, over test images."""
        if len(values) > 1:
            return over_seeds(values)
        return Estimate(values[0], *of_first, self.first.test.n, "images")


def read_runs(folders: Sequence[Path], store: Path | None) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in `folders`, and what could not be had beside them, each a sentence.

    Args:
        store: the store of all runs; None takes the one that each run names, where it can be had.

    Raises:
        CheckpointError: if a folder is no run, the run is not finished, or its records are damaged.
        StoreError, RecipeMismatchError: if `store` is none, or not the one the runs were trained on.
        RecipeMismatchError: if some have one class an image and others several.
    """
    given = None if store is None else read_store(store)
    opened: dict[str, StoreFacts | None] = {}
    runs = []
    without: dict[str, list[str]] = {}
    for folder in folders:
        config, facts, result = read_config(folder), read_facts(folder), checked_result(folder)
        theirs, why_not = given, ""
        if given is not None:
            check_trained_on(given, facts, str(folder))
        else:
            theirs, why_not = store_of(config.store, facts, opened)
        if why_not:
            without.setdefault(why_not, []).append(folder.resolve().name)
        test = held_out(result, str(folder))
        runs.append(FinishedRun(folder.resolve(), config, facts, result, test, read_metrics(folder), theirs))
    metrics = sorted({run.result.metric for run in runs})
    if len(metrics) > 1:
        raise RecipeMismatchError(
            f"some runs are measured by {' and others by '.join(metrics)}, which one table cannot compare",
            hint="report those of one class an image and those of several apart",
        )
    notes = [
        f"The store of {some_of(list(dict.fromkeys(names)))} {why}: it is left out." for why, names in without.items()
    ]
    return runs, notes


def some_of(names: Sequence[str]) -> str:
    """The first names and how many more there are, for a sentence on the page."""
    listed = ", ".join(names[:NAMES_SHOWN])
    return listed if len(names) <= NAMES_SHOWN else f"{listed} and {len(names) - NAMES_SHOWN} more"


def store_of(place: str, facts: DataFacts, opened: dict[str, StoreFacts | None]) -> tuple[StoreFacts | None, str]:
    """The store a run names, or None and why not. A page of runs whose store is gone is still a page.

    Args:
        opened: the stores that were read before, by place; None for one that cannot be. Grows.
    """
    if not (is_remote(place) or Path(place).exists()):
        return None, "is not where the run had it"
    place = place_of(place)
    if place not in opened:
        try:
            opened[place] = read_store(place)
        except StoreError:
            opened[place] = None
    store = opened[place]
    if store is None:
        return None, "cannot be read, `dla cache verify` says why"
    try:
        check_trained_on(store, facts, "the run")
    except RecipeMismatchError:
        return None, "holds other images or latents by now"
    return store, ""


def checked_result(folder: Path) -> RunResult:
    """The result of a run folder.

    Raises:
        CheckpointError: if the run is not finished, it has read no test split, or one of its numbers is none.
    """
    result = read_result(folder)
    if result.branches.keys() != result.branch_intervals.keys():
        raise CheckpointError(
            f"`branches` and `branch_intervals` in `{folder / 'result.json'}` differ", hint="train the run again"
        )
    test = held_out(result, str(folder))
    fractions = {"validation_score": result.validation_score}
    fractions |= {"test_score": test.value, "test_low": test.low, "test_high": test.high}
    fractions |= {f"branches.{name}": value for name, value in result.branches.items()}
    for name, interval in result.branch_intervals.items():
        fractions |= {f"branch_intervals.{name}.{end}": value for end, value in enumerate(interval)}
    sizes = {"test_images": float(result.test_images)}
    if (result.best_step, result.train_seconds, result.images_per_s) != (0, 0, 0):  # as of a run of no steps
        sizes |= {"train_seconds": result.train_seconds, "images_per_s": result.images_per_s}
    # A comparison with NaN is false, so it is among them.
    bad = {name: value for name, value in fractions.items() if not 0 <= value <= 1}
    bad |= {name: value for name, value in sizes.items() if not 0 < value < math.inf}
    for name, value in bad.items():
        raise CheckpointError(f"`{name}` is {value} in `{folder / 'result.json'}`", hint="train the run again")
    return result


def read_metrics(folder: Path) -> tuple[MetricsLine, ...]:
    """Every evaluation of a run folder in order of steps; none where the file is missing.

    Raises:
        CheckpointError: if a line is damaged.
    """
    path = folder / METRICS_NAME
    try:
        return tuple(sorted(map(MetricsLine.model_validate, MetricsFile(path)), key=lambda line: line.step))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CheckpointError(
            f"`{path}` is damaged: `{where}`: {fault['msg']}",
            hint="mend the line, or remove the file: then the page has no curve of this run",
        ) from error


def group_runs(runs: Sequence[FinishedRun]) -> list[RunGroup]:
    """The runs in their order, those that differ in their seed alone together; of one seed twice, each stands alone.

    Raises:
        CheckpointError: if a run names itself as what it learned from.
    """
    groups: list[tuple[object, list[FinishedRun]]] = []
    for run in runs:
        identity = run_identity(run.folder, ())
        for other, members in groups:
            if other == identity and run.config.seed not in [member.config.seed for member in members]:
                members.append(run)
                break
        else:
            groups.append((identity, [run]))
    labels = label_folders([[run.folder for run in members] for _, members in groups])
    return [RunGroup(label, tuple(members)) for label, (_, members) in zip(labels, groups, strict=True)]


def run_identity(folder: Path, learners: tuple[Path, ...]) -> object:
    """What two runs have in common that differ in their seed alone: settings, data, and the same of their teacher's."""
    if folder in learners:
        raise CheckpointError(f"`{folder}` learned from itself", hint="restore its `config.yaml` from a copy")
    config, facts = read_config(folder), read_facts(folder)
    settings = {name: value for name, value in settings_of(config).items() if name != "seed"}
    # Neither the teacher's weights, which its seed decides, nor latents of the store that the run had no use for.
    data = facts.model_dump(exclude={"teacher_sha256", "teachers_sha256", "recipes"})
    teachers: list[object] = []
    for place in (Path(model).resolve() for model in config.models_at_hand.values()):
        is_there = (place / "config.yaml").exists()
        teachers.append(run_identity(place, (*learners, folder)) if is_there else place)
    return settings, data, teachers


def label_folders(groups: Sequence[Sequence[Path]]) -> list[str]:
    """A short name for each group of folders: as many last parts of their paths as tell the groups apart.

    Where the folders of a group differ, a `*` stands: `messy-*`.
    """

    def label(folders: Sequence[Path], depth: int) -> str:
        parts = zip(*(folder.parts[-depth:] for folder in folders), strict=False)
        return "/".join(_common(names) for names in parts)

    deepest = max(len(folder.parts) for folders in groups for folder in folders) - 1
    for depth in range(1, deepest + 1):
        labels = [label(folders, depth) for folders in groups]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label(folders, 1)} ({number})" for number, folders in enumerate(groups, start=1)]


def _common(names: Sequence[str]) -> str:
    """What all names start with, and a `*` if they are not all the same."""
    if len(set(names)) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike) + "*"
