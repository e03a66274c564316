"""Models of transformers that a run begins with: from scratch by their settings, or with weights somebody else trained.

Weights are safetensors on this machine: no network, no pickle and no foreign code has a part in it.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from dla_cache.errors import DlaError, SourceError, SpecError, name_some
from dla_cache.lacking import only_errors, quiet
from dla_cache.preprocessing import Preprocessing, read_preprocessing
from dla_cache.spec import StrictModel
from dla_cache.weights import Weights, find_weights

FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises on a config or weights that make no model."""

PIXEL_TOLERANCE = 1e-3
"""Of means and deviations: a run file may round what a processor says."""


class PretrainedFacts(StrictModel):
    """What a run folder remembers of the weights that its model began with: it is loaded again without them."""

    sha256: str
    """Of the content of the files that were loaded, wherever they lay."""
    config: dict[str, Any]
    """Of the model, as transformers writes it."""


def read_pretrained(name_or_folder: str, revision: str | None) -> PretrainedFacts:
    """What will be loaded under that name.

    Raises:
        SpecError: as `load_pretrained`.
    """
    weights = find_pretrained(name_or_folder, revision)
    with told_as_spec_error(f"`{name_or_folder}` holds no model that can be loaded"):
        config = AutoConfig.from_pretrained(weights.path, local_files_only=True, trust_remote_code=False)
    return PretrainedFacts(sha256=weights.sha256, config=config_fields(config))


def load_pretrained(
    name_or_folder: str,
    revision: str | None,
    auto_class: Any,
    *,
    may_lack: Sequence[str] = (),
    **settings: Any,
) -> nn.Module:
    """The model with its trained weights in float32, on the CPU, in evaluation mode.

    Args:
        name_or_folder: a folder, or a repository of the hub as `owner/name` that `dla sources fetch` has fetched.
        revision: branch, tag or commit of a repository.
        auto_class: of transformers, as `AutoModel`, or a class of models itself.
        may_lack: how names of weights begin that are new where the checkpoint has none, as `classifier.`.
        settings: handed on to `from_pretrained`.

    Raises:
        SpecError: if it is not on this machine, holds no safetensors, wants code of its own run, is of another kind
            of model, or lacks weights.
    """
    weights = find_pretrained(name_or_folder, revision)
    with told_as_spec_error(f"`{name_or_folder}` holds no model that can be loaded"), quiet(), only_errors():
        model, found = auto_class.from_pretrained(
            weights.path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    # transformers would go on with random numbers.
    lacking = sorted(name for name in found["missing_keys"] if not name.startswith(tuple(may_lack)))
    if lacking:
        raise SpecError(
            f"the weights in `{name_or_folder}` lack {name_some(lacking)} of a `{type(model).__name__}`",
            hint="name a checkpoint of this very kind of model",
        )
    loaded: nn.Module = model.eval()
    return loaded


def find_pretrained(name_or_folder: str, revision: str | None) -> Weights:
    """The checkpoint on this machine.

    Raises:
        SpecError: if there is none, or it is none that may be loaded.
    """
    try:
        return find_weights(name_or_folder, revision or "")
    except SourceError as error:
        raise SpecError(error.message, hint=error.hint) from error


def check_pixels(
    name_or_folder: str,
    revision: str | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Refuses pixels of another scale than the pretrained model was trained on: it would be worse without a word.

    Raises:
        SpecError: saying what to set, or that nothing beside the weights says how their model wants pixels.
    """
    folder = find_pretrained(name_or_folder, revision).path
    try:
        said = read_preprocessing(folder)
    except SourceError as error:
        raise SpecError(
            f"`{name_or_folder}`: {error.message}",
            hint="save its image processor beside it, by `save_pretrained`, as its makers publish it",
        ) from error
    if said.is_bgr:
        raise SpecError(f"`{name_or_folder}` wants blue first, and a run hands out red first")
    theirs = pixels_in_unit_range(said)
    for field, own, wanted in (("pixel_mean", mean, theirs[0]), ("pixel_std", std, theirs[1])):
        if max(abs(a - b) for a, b in zip(own, wanted, strict=True)) > PIXEL_TOLERANCE:
            values = {name: [round(value, 4) for value in side] for name, side in zip(_PIXELS, theirs, strict=True)}
            raise SpecError(
                f"`{field}` is `{list(own)}`, the model in `{name_or_folder}` was trained on"
                f" `{[round(value, 4) for value in wanted]}`",
                hint=" ".join(f"--set '{name}={value}'" for name, value in values.items()),
            )


_PIXELS = ("pixel_mean", "pixel_std")


def pixels_in_unit_range(said: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of three channels where pixels are in [0, 1] before they are taken off and divided by."""
    unit = 255 * said.scale
    mean, std = (tuple(value / unit for value in values * (3 // len(values))) for values in (said.mean, said.std))
    return mean, std


def make_config(
    architecture: str, settings: Mapping[str, Any], mapping: Any, where: str, *, image_size: int
) -> PreTrainedConfig:
    """The config of a model from scratch.

    Args:
        architecture: as transformers names it, `vit` or `convnext`.
        settings: fields of its config.
        mapping: of transformers, from config classes to those models that will do.
        where: the run's field, for messages.
        image_size: of the run, in pixels; the config's own where it has one that `settings` do not say.

    Raises:
        SpecError: for an unknown architecture or field, or a value that does not fit.
    """
    names = sorted({config.model_type for config in mapping})
    if architecture not in names:
        near = difflib.get_close_matches(architecture, names, n=3) or names
        raise SpecError(f"`{where}.architecture` names `{architecture}`", hint=f"there is {name_some(near, shown=60)}")
    own = next(config for config in mapping if config.model_type == architecture)
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = [field.name for field in dataclasses.fields(own) if field.name not in shared and field.name[0] != "_"]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise SpecError(
                f"`{where}.settings` of a `{architecture}` has no field `{name}`",
                hint=f"there is {name_some(near, shown=60)}",
            )
    with told_as_spec_error(f"`{where}.settings` make no `{architecture}`"):
        is_pair = isinstance(getattr(own, "image_size", None), list | tuple)
        sized = {"image_size": [image_size, image_size] if is_pair else image_size} if "image_size" in known else {}
        made: PreTrainedConfig = own(**{**sized, **settings})
    return made


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as JSON has it, without where it came from."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in ("_name_or_path", "transformers_version")}


def config_of_fields(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that `config_fields` took.

    Raises:
        SpecError: if this version of transformers knows no such model.
    """
    with told_as_spec_error("the run's model has a config that makes no model"):
        config: PreTrainedConfig = AutoConfig.for_model(**fields)
    return config


def with_places(model: Mapping[str, Any], change: Callable[[str], str | None]) -> dict[str, Any]:
    """`model` of a run with what `change` makes of where its pretrained weights lie, its backbone's too."""
    changed = dict(model)
    if isinstance(changed.get("pretrained"), str):
        changed["pretrained"] = change(changed["pretrained"])
    if isinstance(changed.get("backbone"), Mapping):
        changed["backbone"] = with_places(changed["backbone"], change)
    return changed


def folder_or_name(place: str, base: Path) -> str:
    """Where pretrained weights lie: a folder relative to `base`, else a repository's name as it stands."""
    folder = base / Path(place).expanduser()
    return str(folder.resolve()) if folder.is_dir() else place


@contextmanager
def told_as_spec_error(fact: str) -> Any:
    """Turns what transformers raises into one error with a hint."""
    try:
        yield
    except DlaError:
        raise
    except FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(
            f"{fact}: {type(error).__name__}: {reason}", hint="check its files, and what the run file says of it"
        ) from error
