"""Few-step presets: a checkpoint whose denoiser, scheduler or both another file replaces, or a LoRA changes."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file

from dla_cache.errors import MissingDependencyError, SourceError
from dla_cache.sources.catalog.entry import PipelineRow, Scalar
from dla_cache.weights import WEIGHTS, Weights, content_hash, find_weights

LORA, LORA_SCALE = "lora", "lora_scale"
OTHER_CHECKPOINT = "take the checkpoint that it was made for"
LORA_HALVES = ("lora_A.weight", "down.weight")
"""What the names of the first of the two matrices of a layer's LoRA end with, once diffusers has read it."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What stands in the place of a checkpoint's own components."""

    components: Mapping[str, str]
    """By the component's name: a repository, folder or file, maybe followed by `#` and a file in it. None is empty."""
    lora_scale: float
    scheduler_settings: Mapping[str, Scalar]

    @property
    def denoisers(self) -> dict[str, str]:
        """Components that replace one of the checkpoint's; a LoRA only changes one."""
        return {name: place for name, place in self.components.items() if name != LORA}

    def of_recipe(self) -> dict[str, Scalar]:
        """What decides the numbers; for the components their hash stands."""
        return {**self.scheduler_settings, **({LORA_SCALE: self.lora_scale} if LORA in self.components else {})}


def preset_settings(row: PipelineRow) -> dict[str, Scalar]:
    """What a spec may set of a preset, and its defaults."""
    scale: dict[str, Scalar] = {LORA_SCALE: row.lora_scale} if LORA in row.components else {}
    return {**row.components, **scale, **row.scheduler_settings}


def preset_of(row: PipelineRow, settings: Mapping[str, Scalar]) -> Preset:
    """The preset that settings of a spec make, with the defaults filled in."""
    return Preset(
        {name: str(settings[name]) for name in row.components if settings[name]},
        float(settings.get(LORA_SCALE, row.lora_scale)),
        {name: settings[name] for name in row.scheduler_settings},
    )


def find_component(place: str) -> tuple[Weights, str]:
    """Weights of a component, and which file of theirs they are; empty for a whole folder.

    Raises:
        SourceError: if they are not on this machine, or the file is outside of the folder or no safetensors.
    """
    model, _, file = place.partition("#")
    as_file = Path(model).expanduser()
    if not file and as_file.is_file():
        model, file = str(as_file.parent), as_file.name
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise SourceError(f"`{file}` is no file in `{model}`", hint="name a file by its path in the folder")
    if file and not file.endswith(WEIGHTS):
        raise SourceError(
            f"`{file}` is no safetensors, and other formats can run code when they are read",
            hint="take a safetensors of the same weights, or convert them",
        )
    return find_weights(model, only=file), file


def load_denoiser(name: str, weights: Weights, file: str, base: Path, dtype: torch.dtype) -> Any:
    """A denoiser from elsewhere; a single file is one of the shape that the checkpoint's own configuration says.

    Args:
        name: of the component, `unet` or `transformer`, as the folder of the checkpoint is called.
        base: folder of the checkpoint.

    Raises:
        SourceError: if the file is not all of such a denoiser, or more.
    """
    if not file:
        auto: Any = diffusers.AutoModel
        return auto.from_pretrained(str(weights.path), dtype=dtype, use_safetensors=True, local_files_only=True)
    config = json.loads(config_of(base, name).read_text())
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise SourceError(f"the checkpoint's `{name}` is no model of diffusers", hint="take another checkpoint")
    made: Any = kind
    with torch.device("meta"):  # nothing is drawn for weights that are replaced at once
        denoiser = made.from_config(config)
    state = load_file(weights.path / file)
    wrong = {
        key for key, value in denoiser.state_dict().items() if key not in state or state[key].shape != value.shape
    } | (set(state) - set(denoiser.state_dict()))
    if wrong:
        raise SourceError(
            f"`{file}` is no `{name}` of this checkpoint: {len(wrong)} weights do not fit, such as `{min(wrong)}`",
            hint=OTHER_CHECKPOINT,
        )
    denoiser.load_state_dict(state, assign=True)
    return denoiser.to(dtype).eval()


def config_of(base: Path, name: str) -> Path:
    """Where a checkpoint says what shape one of its components has.

    Raises:
        SourceError: if the checkpoint has no such component.
    """
    config = base / name / "config.json"
    if not config.is_file():
        raise SourceError(f"the checkpoint has no `{name}` to replace", hint="check that it is one of this pipeline")
    return config


def config_hash(base: Path, name: str) -> str:
    """Content hash of `config_of`, which decides the numbers beside the weights from elsewhere."""
    return content_hash(base, [config_of(base, name)])


def fuse_lora(pipeline: Any, weights: Weights, file: str, scale: float) -> None:
    """Adds a LoRA to the weights that it was made for, once and for all.

    Raises:
        SourceError: if no file is named, or a part of it fits nothing: diffusers would go on without that part.
        MissingDependencyError: if peft is not installed, which diffusers loads a LoRA by.
    """
    if not file:
        found = sorted(path.relative_to(weights.path).as_posix() for path in weights.path.rglob(f"*{WEIGHTS}"))
        raise SourceError(
            "a LoRA is a single file, and none is named",
            hint=f"append it after `#`: {', '.join(f'`#{name}`' for name in found)}",
        )
    try:
        from peft.tuners.lora import LoraLayer
    except ModuleNotFoundError as error:
        raise MissingDependencyError("a LoRA needs `peft`", hint="pip install 'dla[sources]'") from error
    where = {"weight_name": file, "local_files_only": True, "use_safetensors": True}
    unet = getattr(pipeline, "unet", None)
    shape = {} if unet is None else {"unet_config": unet.config}
    try:
        with silent():
            read = pipeline.lora_state_dict(str(weights.path), **where, **shape)
            pipeline.load_lora_weights(str(weights.path), **where)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"`{file}` is no LoRA of this checkpoint: {reason}", hint=OTHER_CHECKPOINT) from error
    n_named = sum(key.endswith(LORA_HALVES) for key in (read[0] if isinstance(read, tuple) else read))
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    n_fitted = sum(isinstance(module, LoraLayer) for model in models for module in model.modules())
    if not n_fitted or n_fitted != n_named:
        raise SourceError(
            f"`{file}` is no LoRA of this checkpoint: {n_fitted} of its {n_named} layers fit", hint=OTHER_CHECKPOINT
        )
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()


def scheduler_like(scheduler: Any, kind: str, settings: Mapping[str, Scalar]) -> Any:
    """A scheduler of another class of diffusers, or of the same if `kind` is empty, with the same schedule of noise.

    Some classes cut what they put out off at -1 and 1 unless their configuration says otherwise, as that of a class
    that does not know of it may not. A latent is none that may be cut off.
    """
    made = getattr(diffusers, kind) if kind else type(scheduler)
    with silent():  # it would tell of every setting that one of the classes knows and the other does not
        return made.from_config({"clip_sample": False, **scheduler.config}, **settings)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps diffusers from telling what it is asked for and checked on anyway."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)
