"""A run folder: the config it was begun with, the data it was begun on, and what it found.

`config.yaml` comes first and `result.json` last: a folder with the one can be resumed, with the other is done.
"""

import os
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from dla_cache.errors import CheckpointError, RecipeMismatchError
from dla_cache.spec import LatentFormat, StrictModel, load_yaml
from trainer.checkpoint import write_atomically
from trainer.config import PLACES, RunConfig, resolve_run

M = TypeVar("M", bound=StrictModel)


class DataFacts(StrictModel):
    """What a run folder remembers of its data: enough to load the model, and to refuse other latents."""

    class_names: tuple[str, ...]
    recipes: dict[str, str]
    """Modality → recipe hash of the latents it was trained on."""
    formats: dict[str, LatentFormat]
    modalities: tuple[str, ...]
    """Those the model itself sees, in its order; none for a student."""


class RunResult(StrictModel):
    """What a finished run says of itself."""

    kind: str
    seed: int
    best_step: int
    validation_top1: float
    """Of the kept weights; chosen among steps, so a little optimistic."""
    test_top1: float
    test_low: float
    """Wilson's 95 % interval over test images."""
    test_high: float
    test_images: int
    branches: dict[str, float]
    """Test top-1 of each part of the model."""
    position_to_content: dict[str, float]
    """Before training, for each span: norm of the positions over norm of their tokens. Well below 1 a model
    hardly knows where a token lies."""
    train_seconds: float
    images_per_s: float


def begin_folder(folder: Path, config: RunConfig, facts: DataFacts, *, resume: bool) -> None:
    """Writes the resolved config and the data facts, or checks that they are those of a run to resume."""
    if (folder / "config.yaml").exists():
        if not resume:
            raise CheckpointError(
                f"`{folder}` already holds a run", hint="add `--resume` to continue it, or choose another output"
            )
        check_same_run(folder, config, facts)
        return
    write_atomically(folder / "data.json", facts.model_dump_json(indent=1).encode())
    # Last: a folder with a config is one that can be resumed.
    # Relative to the folder, so that the file is a run file like any other and all can be moved together.
    places = {name: value for name in PLACES if (value := getattr(config, name)) is not None}
    relative = config.model_copy(update={name: os.path.relpath(place, folder) for name, place in places.items()})
    write_atomically(folder / "config.yaml", dump_config(relative).encode())


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check_same_run(folder: Path, config: RunConfig, facts: DataFacts) -> None:
    """Refuses a folder of another config or other data; where things lie may have changed.

    Raises:
        CheckpointError: if a setting differs.
        RecipeMismatchError: if classes or latents differ; a modality that the store has gained does not matter.
    """
    saved, now = read_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
    changed = [name for name in now if name not in (*PLACES, "device") and saved[name] != now[name]]
    if changed:
        raise CheckpointError(
            f"`{folder}` holds a run with another {', '.join(f'`{name}`' for name in changed)}",
            hint="restore the setting, or choose another output",
        )
    begun = read_facts(folder)
    recipes_now = {name: facts.recipes.get(name) for name in begun.recipes}
    if (begun.class_names, begun.modalities, begun.recipes) != (facts.class_names, facts.modalities, recipes_now):
        raise RecipeMismatchError(
            f"the run in `{folder}` was begun on other classes or latents than `{config.store}` holds",
            hint="name the store it was begun on, or choose another output",
        )


def read_config(folder: Path) -> RunConfig:
    """The resolved config of a run folder."""
    if not (folder / "config.yaml").exists():
        raise CheckpointError(f"`{folder}` is no run folder", hint="train the run first, or check the path")
    path = folder / "config.yaml"
    return resolve_run(load_yaml(path), base=folder, where=str(path))


def read_facts(folder: Path) -> DataFacts:
    """What a run folder remembers of its data."""
    return read_record(folder / "data.json", DataFacts)


def read_result(folder: Path) -> RunResult:
    """What a finished run said of itself."""
    if not (folder / "result.json").exists():
        raise CheckpointError(f"the run in `{folder}` is not finished", hint="train it with `--resume`")
    return read_record(folder / "result.json", RunResult)


def read_record(path: Path, model: type[M]) -> M:
    """A JSON file of a run folder as the `model` that was written."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error}", hint="another version of dla may have written it: train the run again"
        ) from error
