"""What a study found, as the plain files that its report is made of.

`runs.csv` has a line a run, `images.csv` the test split in the order in which answers are counted, `selection.json` how
settings were chosen. They are written anew from the run folders whenever a study ends, whichever way.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dla_cache.errors import CheckpointError, SpecError, name_some
from dla_cache.spec import canonical_json
from dla_cache.store import LatentStore
from trainer.answers import Answers, read_answers
from trainer.checkpoint import write_atomically
from trainer.records import read_record
from trainer.run_folder import RunResult
from trainer.study import StudyFolder, TargetsRecord, targets_record
from trainer.study_plan import PlannedRun, StudyState, latents_of

SPEC_NAME, RUNS_NAME, IMAGES_NAME, SELECTION_NAME = "spec.yaml", "runs.csv", "images.csv", "selection.json"

RUN_COLUMNS = (
    "run",
    "arm",
    "stage",
    "teacher_seed",
    "seed",
    "trial",
    "label_fraction",
    "settings",
    "validation",
    "test",
    "metric",
    "steps",
    "train_seconds",
    "images_per_s",
    "upstream_seconds",
    "parameters",
    "gradient_shares",
    "inert",
    "test_hits",
)
IMAGE_COLUMNS = ("image_id", "label", "group")


def build_seconds(store: LatentStore) -> dict[str, float]:
    """Modality → seconds that building its latents took, as the commit records say."""
    return {name: sum(record.seconds for record in store.committed(name).values()) for name in store.modalities}


def write_study(
    folder: StudyFolder, spec_text: str, built: Mapping[str | None, Mapping[str, float]], groups: Path | None
) -> Path:
    """Writes the files of all runs that are done, and gives their folder.

    Args:
        spec_text: of `spec.yaml`, as it was given.
        built: store, by the name that arms give it → modality → seconds that building its latents took.
        groups: table of image_id and group.

    Raises:
        CheckpointError: if a run's records are damaged, or two runs were tested on different images.
        SpecError: if the table of groups is none, or has not all images.
        StoreError: if the folder cannot be written.
    """
    place, state = folder.plan.out / "study", folder.state()
    done = [(run, result) for run in in_order_of_arms(folder, state) if (result := folder.result(run.key)) is not None]
    answers = {run.key: read_answers(folder.plan.folder_of(run.key)) for run, _ in done if run.stage == "final"}
    lines = [run_line(folder, run, result, answers.get(run.key), built) for run, result in done]
    images = next(iter(answers.values()), None)
    for run, _ in done:
        if images is not None and run.key in answers and answers[run.key].image_ids != images.image_ids:
            raise CheckpointError(
                f"run `{run.name}` was tested on other images than the runs before it",
                hint="give all arms the same `roles.test`, and stores of the same images",
            )
    tested = image_lines(images, groups)
    write_atomically(place / SPEC_NAME, spec_text.encode())
    write_atomically(place / RUNS_NAME, table(RUN_COLUMNS, lines))
    write_atomically(place / IMAGES_NAME, table(IMAGE_COLUMNS, tested))
    write_atomically(place / SELECTION_NAME, json.dumps(selection(folder, state), indent=1).encode())
    return place


def in_order_of_arms(folder: StudyFolder, state: StudyState) -> list[PlannedRun]:
    """The runs as the spec has their arms, tuning first; the order in which they were done says nothing."""
    place = {name: number for number, name in enumerate(folder.plan.spec.arms)}
    return sorted(state.runs, key=lambda run: (place[run.arm], run.stage == "final"))


def run_line(
    folder: StudyFolder,
    run: PlannedRun,
    result: RunResult,
    answers: Answers | None,
    built: Mapping[str | None, Mapping[str, float]],
) -> list[Any]:
    """A run's cells of `runs.csv`."""
    has_hits = answers is not None and result.metric == "top-1"
    return [
        run.key,
        run.arm,
        run.stage,
        run.teacher_seed,
        run.seed,
        run.trial,
        run.config.label_fraction,
        canonical_json(dict(run.settings)),
        result.validation_score,
        result.test_score,
        result.metric,
        round(result.images_per_s * result.train_seconds / run.config.images_per_step),
        round(result.train_seconds, 3),
        round(result.images_per_s, 3),
        upstream_seconds(folder, run, built),
        result.parameters,
        canonical_json(result.gradient_shares),
        canonical_json(list(result.inert)),
        hits_text(answers.hits()) if has_hits and answers is not None else None,
    ]


def hits_text(hits: Sequence[bool]) -> str:
    """One bit an image, the most significant first, as hex digits of whole bytes."""
    return np.packbits(np.array(hits, bool)).tobytes().hex()


def upstream_seconds(
    folder: StudyFolder, run: PlannedRun, built: Mapping[str | None, Mapping[str, float]]
) -> float | None:
    """Seconds of all that a run learns from: latents, teachers, their targets; each once. None if some is unknown."""
    seconds: dict[str, float] = {}
    left = [run]
    while left:
        one = left.pop()
        store = folder.plan.spec.store_of(one.arm)
        seen = latents_of(one, is_taught_by_targets=one.targets is not None)
        for modality in built[store] if seen is None else seen:
            if modality not in built[store]:
                return None
            seconds[f"latents of {store}, {modality}"] = built[store][modality]
        if one is not run:
            result = folder.result(one.key)
            if result is None:
                return None
            seconds[one.key] = result.train_seconds
        if one.targets is not None:
            seconds[one.targets.key] = read_record(
                targets_record(Path(one.targets.config.output)), TargetsRecord
            ).seconds
        left += one.all_upstream
    return round(sum(seconds.values()), 3)


def image_lines(images: Answers | None, groups: Path | None) -> list[list[str]]:
    """The cells of `images.csv`: none before a final run is done."""
    if images is None:
        return []
    group_of = {} if groups is None else read_groups(groups, images.image_ids)
    pairs = zip(images.image_ids, images.labels, strict=True)
    return [[image_id, label, group_of.get(image_id, "")] for image_id, label in pairs]


def read_groups(path: Path, image_ids: Collection[str]) -> dict[str, str]:
    """Image ID → group.

    Raises:
        SpecError: if the file is no table of image_id and group, or has none of one of these images.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        group_of = {line["image_id"]: line["group"] for line in lines}
    except (OSError, UnicodeError, csv.Error, KeyError) as error:
        raise SpecError(
            f"`{path}` is no table of image_id and group: {error}", hint="a CSV file with these two columns"
        ) from error
    lacking = [image_id for image_id in image_ids if image_id not in group_of]
    if lacking:
        raise SpecError(
            f"`{path}` has no group of {len(lacking)} test images: {name_some(lacking)}", hint="name one for each"
        )
    return group_of


def selection(folder: StudyFolder, state: StudyState) -> dict[str, Any]:
    """How the settings of each arm were chosen, in plain values."""
    spec = folder.plan.spec
    return {
        name: {
            "like": spec.tuned_as(name) if spec.tuned_as(name) != name else None,
            "seeds": list(spec.tuning.all_seeds),
            "trials": [
                {"settings": dict(trial), "validation": score}
                for trial, score in zip(tuned.trials, tuned.scores, strict=True)
            ],
            "extensions": tuned.n_extensions,
            "chosen": None if tuned.chosen is None else dict(tuned.chosen),
            "is_inside": tuned.chosen is not None and not tuned.at_edge,
            "at_edge": list(tuned.at_edge),
        }
        for name in spec.arms
        if (tuned := state.tuning.get(spec.tuned_as(name))) is not None
    }


def table(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue().encode()
