"""The three plain files that all of a study's report is made of: `spec.yaml`, `runs.csv`, `images.csv`.

Read and checked against each other, so that what follows is arithmetic.

Dimensions: T teachers, S seeds, I images, G groups of images.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Json, ValidationError, field_validator, model_validator

from dla_cache.errors import StudyError, name_some
from dla_cache.spec import StrictModel, read_yaml
from trainer.records import Metric
from trainer.study_spec import StudySpec

SPEC_NAME = "spec.yaml"
RUNS_NAME = "runs.csv"
IMAGES_NAME = "images.csv"

IMAGE_COLUMNS = ("image_id", "label", "group")

WRITE_AGAIN = "these files are written by `dla study run`; restore them, or run the study again: finished runs stay"

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StudyRun(StrictModel):
    """A line of `runs.csv`, its columns in the order of these fields; an empty cell is None."""

    run: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Content address: arms that ask for the same run share it."""
    arm: str
    stage: Literal["tuning", "final"]
    teacher_seed: Count | None
    seed: Count
    trial: Count | None
    label_fraction: Annotated[float, Field(gt=0, le=1)]
    settings: Json[dict[str, Any]]
    """What was tuned, by dotted name."""
    validation: Fraction
    test: Fraction | None
    """None for a run of tuning, which never reads the test split."""
    metric: Metric
    steps: Count
    train_seconds: Positive
    images_per_s: Positive
    upstream_seconds: Positive | None
    """Of all that this run learns from, each counted once; None if unknown."""
    parameters: Count
    gradient_shares: Json[dict[str, Positive]]
    """Term → its mean share of the summed gradient norms, a fraction."""
    inert: Json[tuple[str, ...]]
    """Terms that the guard calls nearly inert."""
    test_hits: Annotated[str, Field(pattern="^([0-9a-f]{2})*$")] | None
    """One bit a test image, the most significant first, in the order of `images.csv`; 1 = right."""

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _fits_its_stage(self) -> Self:
        if self.stage == "tuning":
            if self.test is not None or self.test_hits is not None:
                raise ValueError("a tuning run has a test score, and tuning must never read the test split")
            if self.trial is None:
                raise ValueError("a tuning run has no `trial`")
            return self
        if self.test is None:
            raise ValueError("a final run has no `test`")
        if self.trial is not None:
            raise ValueError("a final run has a `trial`")
        if (self.metric == "top-1") != (self.test_hits is not None):
            raise ValueError("`test_hits` belongs to final runs that are measured by top-1, and each of them has it")
        return self

    @property
    def place(self) -> tuple[str, str, int | None, int, int | None, float]:
        """What tells the runs of a study apart."""
        return self.arm, self.stage, self.teacher_seed, self.seed, self.trial, self.label_fraction

    @property
    def in_words(self) -> str:
        """Arm and seeds, for a message."""
        return name_run(self.arm, self.teacher_seed, self.seed, self.label_fraction, self.trial)


COLUMNS = tuple(StudyRun.model_fields)


@dataclass(frozen=True, slots=True)
class TestImages:
    """The test split in store order."""

    __test__ = False  # pytest would take the name for its own

    image_ids: tuple[str, ...]
    labels: tuple[str, ...]
    groups: NDArray[np.int64] | None
    """[I], which images belong together, from 0 on; None if each stands by itself."""

    def by_unit(self, hits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hits [..., I] as values [..., G] of what is drawn independently, with the same mean: images, or groups.

        A group's value is the sum of its hits times G / I.
        """
        if self.groups is None:
            return hits
        n_groups = int(self.groups.max()) + 1
        flat = hits.reshape(-1, hits.shape[-1])
        sums = [np.bincount(self.groups, weights=row, minlength=n_groups) for row in flat]
        scale = n_groups / len(self.image_ids)
        return np.array(sums, np.float64).reshape(*hits.shape[:-1], n_groups) * scale


@dataclass(frozen=True, slots=True)
class StudyTable:
    """A study's spec and what its runs measured, in agreement."""

    spec: StudySpec
    spec_yaml: str
    """As it was written."""
    runs: tuple[StudyRun, ...]
    images: TestImages

    @property
    def metric(self) -> Metric:
        """What all runs are measured by."""
        return self.runs[0].metric

    @property
    def fractions(self) -> tuple[float | None, ...]:
        """The shares of the labels that the study varies; one None if it varies none."""
        return self.spec.fractions_of()

    def final(self, arm: str, fraction: float | None) -> dict[tuple[int | None, int], StudyRun]:
        """An arm's final runs with a share of the labels by (teacher seed, seed); a teacher's by (None, seed)."""
        is_teacher = self.spec.arms[arm].role == "teacher"
        return {
            (None if is_teacher else run.teacher_seed, run.seed): run
            for run in self.runs
            if run.stage == "final" and run.arm == arm and fraction in (None, run.label_fraction)
        }

    def tuning(self, arm: str) -> list[StudyRun]:
        """An arm's tuning runs in their order."""
        return [run for run in self.runs if run.stage == "tuning" and run.arm == arm]

    def hits(self, run: StudyRun) -> NDArray[np.float64] | None:
        """Which test images a final run gets right, [I] of 0 and 1; None of several labels an image."""
        if run.test_hits is None:
            return None
        packed = np.frombuffer(bytes.fromhex(run.test_hits), np.uint8)
        return np.unpackbits(packed)[: len(self.images.image_ids)].astype(np.float64)

    def planned(self, arm: str) -> list[tuple[int | None, int]]:
        """The (teacher seed, seed) that the spec asks of an arm."""
        spec = self.spec
        has_teachers = spec.arms[arm].role != "teacher" and spec.teacher_of(arm) is not None
        teachers: Sequence[int | None] = spec.all_teacher_seeds if has_teachers else (None,)
        return [(teacher, seed) for teacher in teachers for seed in spec.final_seeds(arm)]

    def missing(self) -> list[str]:
        """The final runs that the spec asks for and that are not there, in words."""
        missing = []
        for arm in self.spec.arms:
            for fraction in self.fractions:
                there = self.final(arm, fraction)
                for teacher, seed in (cell for cell in self.planned(arm) if cell not in there):
                    missing.append(name_run(arm, teacher, seed, fraction))
        return missing


def name_run(arm: str, teacher_seed: int | None, seed: int, fraction: float | None, trial: int | None = None) -> str:
    """A run in words, for a message."""
    teacher = "" if teacher_seed is None else f", teacher seed {teacher_seed}"
    of_labels = "" if fraction is None or fraction == 1 else f", {100 * fraction:g} % of the labels"
    return f"{arm}{teacher}, seed {seed}{'' if trial is None else f', trial {trial}'}{of_labels}"


def read_study(folder: Path) -> StudyTable:
    """The study in a folder, from its three files.

    Raises:
        SpecError: if the spec cannot be read.
        StudyError: if another file is missing, damaged, or contradicts the others.
    """
    spec_path = folder / SPEC_NAME
    runs_path, images_path = folder / RUNS_NAME, folder / IMAGES_NAME
    spec = read_yaml(spec_path, StudySpec)
    spec_yaml = spec_path.read_text(encoding="utf-8")
    runs = read_runs(runs_path)
    if not any(run.stage == "final" for run in runs):
        raise StudyError(
            f"`{runs_path}` has no final run, so nothing was tested yet",
            hint="go on with `dla study run`; `dla study status` says how far it is",
        )
    images = read_test_images(images_path)
    check_runs(runs, spec, len(images.image_ids), runs_path)
    return StudyTable(spec, spec_yaml, runs, images)


def folder_of_study(place: Path) -> Path:
    """The folder of the three files: the place itself, or `study` in what `dla study run` wrote."""
    inner = place / "study"
    return inner if not (place / SPEC_NAME).exists() and (inner / SPEC_NAME).exists() else place


def read_lines(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The lines of a CSV file with exactly these columns.

    Raises:
        StudyError: if it cannot be read or has others.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = list(reader)
    except OSError as error:
        hint = f"name a folder with `{SPEC_NAME}`, `{RUNS_NAME}` and `{IMAGES_NAME}`, as `dla study run` writes them"
        raise StudyError(f"`{path}` cannot be read: {error.strerror}", hint=hint) from error
    except (csv.Error, UnicodeError) as error:
        raise StudyError(f"`{path}` is no table: {error}", hint=WRITE_AGAIN) from error
    found = tuple(reader.fieldnames or ())
    if found != tuple(columns):
        raise StudyError(f"`{path}` has the columns `{','.join(found)}`", hint=f"they are {','.join(columns)}")
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values():
            raise StudyError(f"`{path}` has another number of cells in line {number}", hint=WRITE_AGAIN)
    return lines


def read_test_images(path: Path) -> TestImages:
    """The test split that `images.csv` lists.

    Raises:
        StudyError: if it is damaged, lists none or one twice, or gives a group to some alone.
    """
    lines = read_lines(path, IMAGE_COLUMNS)
    image_ids = tuple(line["image_id"] for line in lines)
    if not image_ids:
        raise StudyError(f"`{path}` lists no image", hint=WRITE_AGAIN)
    if len(set(image_ids)) < len(image_ids):
        twice = [image_id for image_id in dict.fromkeys(image_ids) if image_ids.count(image_id) > 1]
        raise StudyError(f"`{path}` lists images twice: {name_some(twice)}", hint=WRITE_AGAIN)
    groups = [line["group"] for line in lines]
    ungrouped = [image_id for image_id, group in zip(image_ids, groups, strict=True) if not group]
    numbers = None
    if len(ungrouped) < len(image_ids):
        if ungrouped:
            raise StudyError(f"`{path}` gives no group to {name_some(ungrouped)}", hint="give one to each image")
        numbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return TestImages(image_ids, tuple(line["label"] for line in lines), numbers)


def read_runs(path: Path) -> tuple[StudyRun, ...]:
    """The runs that `runs.csv` lists, each checked by itself.

    Raises:
        StudyError: if it is damaged, naming the line.
    """
    runs = []
    for number, line in enumerate(read_lines(path, COLUMNS), start=2):
        try:
            runs.append(StudyRun.model_validate(line))
        except ValidationError as error:
            fault = error.errors()[0]
            where = f"`{fault['loc'][0]}`: " if fault["loc"] else ""
            told = fault["msg"].removeprefix("Value error, ")
            raise StudyError(f"`{path}` line {number}: {where}{told}", hint=WRITE_AGAIN) from error
    return tuple(runs)


def check_runs(runs: Sequence[StudyRun], spec: StudySpec, n_images: int, path: Path) -> None:
    """Passes runs that are those of the spec, each there once, and measured on these images.

    Raises:
        StudyError: naming the runs that are not.
    """

    def refuse(what: str, faulty: Sequence[StudyRun], hint: str) -> NoReturn:
        raise StudyError(f"`{path}` {what}: {name_some([run.in_words for run in faulty])}", hint=hint)

    strangers = [run for run in runs if run.arm not in spec.arms]
    if strangers:
        refuse("has runs of arms that the spec has not", strangers, f"the arms are {name_some([*spec.arms], 20)}")
    seen: Mapping[Any, StudyRun] = {run.place: run for run in runs}
    if len(seen) < len(runs):
        refuse("lists runs twice", [run for run in runs if seen[run.place] is not run], "keep one line of each")
    others = [run for run in runs if run.metric != runs[0].metric]
    if others:
        refuse(f"has runs by another metric than `{runs[0].metric}`", others, "compare runs of one metric")
    check_seeds(runs, spec, refuse)
    width = 2 * -(-n_images // 8)
    for run in (run for run in runs if run.test_hits is not None):
        assert run.test_hits is not None
        bits = int(run.test_hits or "0", 16)
        if len(run.test_hits) != width or bits & ((1 << (4 * width - n_images)) - 1):
            refuse(f"has `test_hits` of other than the {n_images} images of `{IMAGES_NAME}`", [run], WRITE_AGAIN)
        if abs(bits.bit_count() / n_images - (run.test or 0.0)) > 1e-6:
            refuse("has `test_hits` that do not make the `test` beside them", [run], WRITE_AGAIN)


def check_seeds(runs: Sequence[StudyRun], spec: StudySpec, refuse: Any) -> None:
    """Passes runs whose seeds and label fractions are those of the spec."""
    final = [run for run in runs if run.stage == "final"]
    fractions = {run.arm: run.label_fraction for run in final}
    for run in final:
        if run.label_fraction not in (spec.label_fractions or (fractions[run.arm],)):
            refuse("has final runs with shares of the labels that the spec has not", [run], WRITE_AGAIN)
        teaches = spec.arms[run.arm].role == "teacher"
        has_teachers = not teaches and spec.teacher_of(run.arm) is not None
        if run.seed not in spec.final_seeds(run.arm):
            refuse("has final runs of seeds that the spec has not", [run], WRITE_AGAIN)
        if has_teachers and run.teacher_seed not in spec.all_teacher_seeds:
            refuse("has final runs of teacher seeds that the spec has not", [run], WRITE_AGAIN)
        if not has_teachers and not teaches and run.teacher_seed is not None:
            refuse("has a teacher seed beside an arm that learns from none", [run], WRITE_AGAIN)
