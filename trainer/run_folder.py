"""A run folder: the config it was begun with, the data it was begun on, and what it found.

`config.yaml` comes first and `result.json` last: a folder with the one can be resumed, with the other is done.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from dla_cache.durable import make_folder, writing_to
from dla_cache.errors import CheckpointError, RecipeMismatchError, RunInUseError, SpecError
from dla_cache.remote import is_remote
from dla_cache.spec import ORIGINAL_IMAGES, ImageRecipe, LatentFormat, StrictModel, canonical_json, load_yaml
from dla_cache.store import LatentStore
from trainer.checkpoint import write_atomically
from trainer.config import PLACES, RUNTIME_FIELDS, RunConfig, resolve_run
from trainer.pretrained import PretrainedFacts, with_places
from trainer.records import Metric, read_record, start_again
from trainer.schedule import RUNTIME_FIELDS as LOOP_RUNTIME_FIELDS


class DataFacts(StrictModel):
    """What a run folder remembers of what it learns from: enough to load the model, and to refuse anything else."""

    class_names: tuple[str, ...]
    is_multi_label: bool = False
    """Whether an image may have any number of the classes."""
    class_counts: tuple[int, ...]
    """Labelled images of each class."""
    n_labelled: int
    """Images of the labelled role."""
    n_images: int
    """Rows of the store."""
    recipes: dict[str, str]
    """Modality → recipe hash, for all of the store."""
    formats: dict[str, LatentFormat]
    """Of one draw of each modality that the model, or an objective of a student, sees."""
    modalities: tuple[str, ...]
    """Those the model itself sees, in its order; none for a student."""
    rows_sha256: str
    """Of image IDs, files, splits and labels in row order, see `digest_of_rows`."""
    latents_sha256: dict[str, str]
    """Modality → content hash of the latents that the run, or what it learns from, sees."""
    teacher_sha256: str | None
    """Of the weights it learns from; of several models the hash of all."""
    teacher_kind: str | None = None
    """Whether these are a probe's, a teacher's or a student's; of several models all there are."""
    teachers_sha256: dict[str, str] = Field(default_factory=dict)
    """Of the weights of each of several models, by name."""
    targets_sha256: str | None = None
    """Content hash of the stored targets it learns from."""
    pretrained: PretrainedFacts | None = None
    """Of the weights that the model began with."""
    images: ImageRecipe = ORIGINAL_IMAGES
    """What it decodes: the files of the images, or smaller pictures that the store holds of them."""


class RunResult(StrictModel):
    """What a finished run says of itself."""

    kind: str
    metric: Metric
    """What the scores are: top-1, or mean average precision where an image may have several classes."""
    seed: int
    best_step: int
    """0 of a run of no steps, whose weights are those it began with."""
    validation_score: float
    """Of the kept weights; chosen among steps, so a little optimistic."""
    test_score: float | None
    """None of a run without a test role, which has read no test image."""
    test_low: float | None
    """95 % interval over test images: Wilson's of top-1, a bootstrap's of mAP."""
    test_high: float | None
    test_images: int
    branches: dict[str, float]
    """Test score of the model, of each of its parts, and with some of its modalities left out (`image and depth`)."""
    branch_intervals: dict[str, tuple[float, float]]
    """95 % interval of each, as of the test score."""
    position_to_content: dict[str, float]
    """Before training, for each span: norm of the positions over norm of their tokens. Well below 1 a model
    hardly knows where a token lies."""
    gradient_shares: dict[str, float] = Field(default_factory=dict)
    """Of each loss term: its mean share of the summed norms of the terms' own gradients, over all evaluations."""
    inert: tuple[str, ...] = ()
    """Terms below one percent of it: active, and nearly without effect."""
    parameters: int
    """Numbers that make up the model that is kept: a student's are without its throw-away heads."""
    train_seconds: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the test split said of a run: fractions in [0, 1], and the images they are of."""

    value: float
    low: float
    high: float
    n: int


def held_out(result: RunResult, where: str) -> HeldOut:
    """The test score of a run.

    Raises:
        CheckpointError: if it has read no test split.
    """
    if result.test_score is None or result.test_low is None or result.test_high is None:
        raise CheckpointError(
            f"the run in `{where}` has no test score: its `roles.test` is empty",
            hint="`dla evaluate` measures it on a split that you name; train it with a test role to have one",
        )
    return HeldOut(result.test_score, result.test_low, result.test_high, result.test_images)


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Keeps every other process from training in `folder`; the kernel frees the lock of a dead one.

    A folder that is made here goes again if nothing came into it: it would stand in the way of a corrected run.

    Raises:
        RunInUseError: if another process trains there.
        StoreError: if the folder cannot be made or locked.
    """
    is_new = not folder.exists()
    with writing_to(folder):
        make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY)
        is_locked = try_lock(descriptor)
    try:
        if not is_locked:
            raise RunInUseError(
                f"another process trains in `{folder}`", hint="wait until it is done, or choose another output"
            )
        yield
    finally:
        if is_new and is_locked:
            with suppress(OSError):
                folder.rmdir()
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Whether nobody else held the lock of an open folder, which is now ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def digest_of_rows(store: LatentStore) -> str:
    """What a run learns about images beside their latents, as one sha256: another order is another run.

    Paths lie outside it, so data may move.
    """
    digest = hashlib.sha256()
    for number, row in enumerate(store.rows):
        text = canonical_json([row.image_id, row.sha256, row.split, row.label, row.removed])
        digest.update(f"{',' if number else '['}{text}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def begun_facts(folder: Path, *, resume: bool) -> DataFacts | None:
    """The data facts of the run to go on with; None if the folder holds no run.

    Raises:
        CheckpointError: if it holds one that is not to be gone on with, or its facts cannot be read.
    """
    if not (folder / "config.yaml").exists():
        return None
    if not resume:
        raise CheckpointError(
            f"`{folder}` already holds a run",
            hint="add `--resume` to continue it, choose another output, or remove the folder to begin anew",
        )
    return read_facts(folder)


def begin_folder(folder: Path, config: RunConfig, facts: DataFacts) -> None:
    """Writes the data facts and the resolved config."""
    write_atomically(folder / "data.json", facts.model_dump_json(indent=1).encode())
    # Last: a folder with a config is one that can be resumed.
    # Relative to the folder, so that the file is a run file like any other and all can be moved together.
    relative = config.model_copy(
        update={name: place_seen_from(folder, getattr(config, name)) for name in PLACES}
        | {"model": with_places(config.model, lambda place: relative_place(place, folder))}
    )
    write_atomically(folder / "config.yaml", dump_config(relative).encode())


def place_seen_from(folder: Path, place: Any) -> Any:
    """A place of a run, several by name, or none, as seen from a folder."""
    if isinstance(place, dict):
        return {name: place_seen_from(folder, one) for name, one in place.items()}
    return place if place is None or is_remote(place) else os.path.relpath(place, folder)


def relative_place(place: str, folder: Path) -> str:
    """Where pretrained weights lie as seen from `folder`; a repository's name as it stands."""
    return os.path.relpath(place, folder) if os.path.isabs(place) else place


def dump_config(config: StrictModel) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_same_run(folder: Path, config: RunConfig, begun: DataFacts, facts: DataFacts) -> None:
    """Refuses to go on with another config, other data or another teacher; where things lie may have changed.

    A modality that the store has gained does not matter.

    Raises:
        CheckpointError: if a setting or the teacher differs.
        RecipeMismatchError: if images, labels or latents differ.
    """
    saved, now = identity_of(read_config(folder)), identity_of(config)
    changed = [name for name in now if saved[name] != now[name]]
    if changed:
        raise CheckpointError(
            f"`{folder}` holds a run with another {', '.join(f'`{name}`' for name in changed)}",
            hint="restore the setting, or choose another output",
        )
    same = {
        "classes": (begun.class_names, begun.is_multi_label) == (facts.class_names, facts.is_multi_label),
        "images, splits or labels": begun.rows_sha256 == facts.rows_sha256,
        "pictures of the images": begun.images == facts.images,
    }
    same |= {
        f"latents of `{name}`": facts.latents_sha256.get(name) == was for name, was in begun.latents_sha256.items()
    }
    differing = [what for what, is_same in same.items() if not is_same]
    if differing:
        raise RecipeMismatchError(
            f"the run in `{folder}` was begun on other {' and other '.join(differing)} than `{config.store}` holds",
            hint="name the store it was begun on, or choose another output",
        )
    if begun.pretrained != facts.pretrained:
        raise CheckpointError(
            f"the run in `{folder}` was begun with other pretrained weights than its `model` names now",
            hint="name the weights it was begun with, or choose another output",
        )
    if begun.teacher_sha256 != facts.teacher_sha256:
        hashes = facts.teachers_sha256
        others = [name for name in hashes if begun.teachers_sha256.get(name) != hashes[name]]
        place = (config.teachers or {})[others[0]] if others else config.teacher or config.targets
        raise CheckpointError(
            f"the run in `{folder}` was begun with another teacher than `{place}` holds now",
            hint="name the teacher it was begun with, or choose another output",
        )
    if begun.targets_sha256 != facts.targets_sha256:
        raise CheckpointError(
            f"the run in `{folder}` was begun with other targets than `{config.targets}` holds now",
            hint="name the targets it was begun with, or choose another output",
        )


def identity_of(config: RunConfig) -> dict[str, Any]:
    """What a run is: its config without where things lie and how they are computed."""
    placeless = config.model_copy(update={"model": with_places(config.model, lambda _: None)})
    fields = placeless.model_dump(mode="json", exclude=set(RUNTIME_FIELDS))
    fields["loop"] = {name: value for name, value in fields["loop"].items() if name not in LOOP_RUNTIME_FIELDS}
    fields["teachers"] = list(config.teachers or ())  # where they lie may change, their names may not
    return fields


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"`{folder}` is no run folder", hint="train the run first, or check the path")
    try:
        return resolve_run(load_yaml(path), base=folder, where=str(path))
    except SpecError as error:
        raise CheckpointError(error.message, hint=start_again(folder)) from error


def read_facts(folder: Path) -> DataFacts:
    """What a run folder remembers of its data."""
    return read_record(folder / "data.json", DataFacts)


def read_result(folder: Path) -> RunResult:
    """What a finished run said of itself."""
    if not (folder / "result.json").exists():
        raise CheckpointError(f"the run in `{folder}` is not finished", hint="train it with `--resume`")
    return read_record(folder / "result.json", RunResult)
