"""What all adapters of generators share: parameters, loading without network, pickles or foreign code, and guards."""

import importlib
import importlib.metadata
import platform
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, create_model

from dla_cache.errors import DlaError, MissingDependencyError, SourceError, SpecError
from dla_cache.lacking import only_errors, quiet, require_loaded
from dla_cache.sources.catalog.entry import CAPTION, PipelineRow, Scalar, SourceEntry
from dla_cache.sources.presets import (
    LORA,
    Preset,
    config_hash,
    find_component,
    fuse_lora,
    load_denoiser,
    scheduler_like,
)
from dla_cache.spec import LatentSpec, StrictModel, parse_spec
from dla_cache.weights import Weights, find_weights

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PLACES = re.compile(r"\{[^{}]*\}")
"""In a prompt what looks as if something were put in its place."""

ATTENTION = "native"
"""PyTorch's own, whatever an environment variable says: others round otherwise, and some would fetch kernels."""

NAMES_OF_WEIGHTS = frozenset({"model", "revision", "captioner", "captioner_revision"})
"""Parameters that say where weights lie: the hash of these stands for them in a recipe."""


class WeightParameters(StrictModel):
    """What a cache spec may set on any model, beside the settings of its row."""

    model: str = ""
    """A folder, or a repository of the hub in place of the row's own."""
    revision: str = ""
    """Branch, tag or commit of the repository."""
    variant: str = ""
    """As `fp16`: which of several files of the same weights; there is no other one in its place."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the generator computes in; `dtype` is what the store holds."""
    view_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """Side of the square view in pixels; 0 for that of the row."""

    def of_recipe(self) -> dict[str, Scalar]:
        """Those that decide the numbers and were said."""
        fields = self.model_dump(exclude=set(NAMES_OF_WEIGHTS) | {"view_size"})
        return {name: value for name, value in fields.items() if value != ""}


class CommonParameters(WeightParameters):
    """What a cache spec may set on any generator, beside the settings of its row."""

    scheduler: str = ""
    """Class in place of the checkpoint's, of those that the row allows."""
    captioner: str = ""
    """A folder or repository of a captioning model, for a prompt with `{caption}`; the default one if empty."""
    captioner_revision: str = ""
    masked_words: str = ""
    """Words that are taken out of captions, between bars: `cat|dog`; see `--mask-class-names`."""


P = TypeVar("P", bound=WeightParameters)


def parse_settings(spec: LatentSpec, settings: Mapping[str, Scalar], base: type[P]) -> tuple[P, dict[str, Scalar]]:
    """The parameters of a spec as those of `base` and a row's own settings, defaults filled in.

    Raises:
        SpecError: if one is unknown or of another type, or the prompt has a place that nothing fills.
    """
    kinds: dict[str, Any] = {name: (type(value), value) for name, value in settings.items()}
    model = create_model("Parameters", __base__=base, **kinds)
    parsed = parse_spec(dict(spec.parameters), model, where=f"parameters of `{spec.source}`")
    own = {name: getattr(parsed, name) for name in settings}
    strange = [found for found in PLACES.findall(str(own.get("prompt", ""))) if found != CAPTION]
    if strange:
        raise SpecError(
            f"the prompt of `{spec.source}` has `{strange[0]}`, which stands for nothing",
            hint=f"only `{CAPTION}` stands for something: what is said of each image",
        )
    return base(**{name: getattr(parsed, name) for name in base.model_fields}), own


def parse_parameters(
    spec: LatentSpec, settings: Mapping[str, Scalar], row: PipelineRow | None = None
) -> tuple[CommonParameters, dict[str, Scalar]]:
    """The parameters of a spec as those of any generator and a row's own settings, defaults filled in.

    Raises:
        SpecError: if one is unknown or of another type.
        SourceError: if the scheduler is none of the row's.
    """
    parsed, own = parse_settings(spec, settings, CommonParameters)
    if row is not None and parsed.scheduler and parsed.scheduler not in row.schedulers:
        known = ", ".join(f"`{name}`" for name in row.schedulers) or "none"
        raise SourceError(
            f"`{spec.source}` is not known to be repeatable with the scheduler `{parsed.scheduler}`",
            hint=f"take one of {known}",
        )
    return parsed, own


def load_pipeline(
    entry: SourceEntry, row: PipelineRow, parameters: CommonParameters, preset: Preset, device: str
) -> tuple[Any, dict[str, str], dict[str, str], tuple[str, ...]]:
    """The pipeline on its device, the hashes of its weights by name, where they came from, and weights that lack.

    Raises:
        SourceError: if weights or variant are not there, the checkpoint is of another pipeline, a component is of
            another checkpoint, or the scheduler is none of the row's.
    """
    import diffusers

    dtype = COMPUTE_DTYPES[parameters.compute_dtype]
    left_out = [*(name for name, value in row.load.items() if value is None), *preset.denoisers]
    weights = find_weights(
        parameters.model or entry.model,
        parameters.revision,
        variant=parameters.variant,
        without=left_out,
    )
    hashes, origin = {"model": weights.sha256}, origin_of("model", weights)
    found = {name: find_component(place) for name, place in preset.components.items()}
    for name, (component, _) in found.items():
        hashes[name] = component.sha256
        origin |= origin_of(name, component)
    with quiet(), only_errors():
        denoisers = {}
        for name in preset.denoisers:
            component, file = found[name]
            if file:
                hashes[f"{name}_config"] = config_hash(weights.path, name)
            denoisers[name] = load_denoiser(name, component, file, weights.path, dtype)
        models, lacking = load_transformers_models(weights.path, left_out, parameters)
        pipeline = getattr(diffusers, row.pipeline).from_pretrained(
            weights.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **({"variant": parameters.variant} if parameters.variant else {}),
            **row.load,
            **denoisers,
            **models,
        )
        if LORA in found:
            fuse_lora(pipeline, *found[LORA], preset.lora_scale)
            origin["peft"] = importlib.metadata.version("peft")
    require_loaded(pipeline.components)
    scheduler = parameters.scheduler or row.scheduler
    if row.keeps_scheduler and scheduler not in ("", type(pipeline.scheduler).__name__):
        raise SourceError(
            f"`{row.pipeline}` keeps the scheduler of its checkpoint, `{type(pipeline.scheduler).__name__}`:"
            f" `{scheduler}` tells a model of the noise in another way",
            hint="leave `scheduler` out",
        )
    if scheduler or preset.scheduler_settings:
        pipeline.scheduler = scheduler_like(pipeline.scheduler, scheduler, preset.scheduler_settings)
    named = getattr(pipeline, "scheduler", None)
    if row.schedulers and type(named).__name__ not in row.schedulers:
        raise SourceError(
            f"the checkpoint brings the scheduler `{type(named).__name__}`, with which `{row.pipeline}` is not known to"
            " be repeatable",
            hint=f"set `scheduler` to one of {', '.join(f'`{name}`' for name in row.schedulers)}",
        )
    pipeline.set_progress_bar_config(disable=True)
    with only_errors():
        return pipeline.to(device), hashes, origin, lacking


def load_transformers_models(
    folder: Path, left_out: Sequence[str], parameters: WeightParameters
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The text and image models of a pipeline by name, and the names of weights that the checkpoint does not hold.

    diffusers sees to it that its own models are whole, but takes those of transformers as they come, see `load_model`.
    """
    import diffusers
    import transformers

    models: dict[str, Any] = {}
    lacking: list[str] = []
    for name, kind in diffusers.DiffusionPipeline.load_config(folder).items():
        if name in left_out or not isinstance(kind, list) or kind[0] != "transformers":
            continue
        model_class = getattr(transformers, kind[1], None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            # As diffusers does it: a component without that variant comes as it is.
            is_variant = any((folder / name).glob(f"*.{parameters.variant}[.-]*")) if parameters.variant else True
            said = parameters if is_variant else parameters.model_copy(update={"variant": ""})
            models[name], missing = load_model(f"transformers.{kind[1]}", folder / name, said)
            lacking += [f"{name}.{weight}" for weight in missing]
    return models, tuple(lacking)


def load_model(
    model_class: str, folder: Path, parameters: WeightParameters, **settings: Any
) -> tuple[Any, tuple[str, ...]]:
    """A single model, as `transformers.Dinov2Model`, and the names of weights that the checkpoint does not hold.

    Those are NaN: transformers draws them with a warning, and latents that depend on them would look like any others.
    No error at once: many an encoder lacks its pooler, and nobody asks for it.

    Raises:
        SourceError: if it is a model of diffusers, and the checkpoint lacks any.
    """
    package, name = model_class.split(".")
    library = importlib.import_module(package)
    with quiet(), only_errors():
        model, found = getattr(library, name).from_pretrained(
            folder,
            dtype=COMPUTE_DTYPES[parameters.compute_dtype],
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **({"variant": parameters.variant} if parameters.variant else {}),
            **settings,
        )
    require_loaded({name: model})
    lacking = tuple(sorted(found["missing_keys"]))
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for weight in lacking:
            if weight in held and held[weight].is_floating_point():
                held[weight].fill_(float("nan"))
    return model.eval(), lacking


def origin_of(name: str, weights: Weights) -> dict[str, str]:
    """Where weights came from, for a store's records: never a path."""
    if not weights.repo:
        return {name: "a folder"}
    return {name: weights.repo, f"{name}_commit": weights.commit}


def made_with(device: str, origin: Mapping[str, str]) -> dict[str, Scalar]:
    """What decides the numbers within a tolerance, and where the weights came from."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine()
    return {**versions, "device": f"{place.type} {name}", "attention": ATTENTION, **origin}


@contextmanager
def guarded(pipeline: Any, methods: Sequence[str]) -> Iterator[None]:
    """While it lasts each of these methods raises: a hidden decode is an error, not a slow run.

    Raises:
        SourceError: if a method is not there, or is called.
    """
    replaced: list[tuple[Any, str]] = []
    try:
        for place in methods:
            *path, name = place.split(".")
            owner = pipeline
            for step in path:
                owner = getattr(owner, step, None)
            if not hasattr(owner, name):
                raise SourceError(
                    f"`{type(pipeline).__name__}` has no `{place}` to guard",
                    hint="install the version of diffusers that dla's constraints name",
                )

            def refuse(*_args: Any, place: str = place, **_kwargs: Any) -> Any:
                raise SourceError(
                    f"the generator called its decoder, `{place}`",
                    hint="its row does not stop it: this is a bug of dla",
                )

            setattr(owner, name, refuse)
            replaced.append((owner, name))
        yield
    finally:
        for owner, name in replaced:
            delattr(owner, name)  # the class's own method is there again


@contextmanager
def refuse_global_draws(
    source: str,
    device: torch.device,
    hint: str = "set another `scheduler`, or take a checkpoint whose scheduler is configured to draw none",
) -> Iterator[None]:
    """A generator may draw from the generators that it is given, and from no other.

    A list of schedulers that do so is not enough: a checkpoint's configuration can make one of them draw elsewhere.

    Raises:
        SourceError: if a global random generator is not as it was, at the end.
    """
    before = _random_states(device)
    yield
    if before != _random_states(device):
        raise SourceError(
            f"`{source}` draws random numbers that no seed of an image decides, so a cache of it could not be repeated",
            hint=hint,
        )


def _random_states(device: torch.device) -> tuple[object, ...]:
    _, keys, place, *_ = np.random.get_state()
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return random.getstate(), np.asarray(keys).tobytes(), place, *(state.numpy().tobytes() for state in states)


@contextmanager
def told_as_source_error(
    source: str, hint: str = "check that the checkpoint is one of this pipeline"
) -> Iterator[None]:
    """Turns whatever a generator's library raises while it loads or is tried into one error with a hint."""
    try:
        yield
    except DlaError:
        raise
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"the device has not enough memory for `{source}`: not even for one image",
            hint="end what else runs there, take a larger device, a smaller `view_size` or `compute_dtype: bfloat16`",
        ) from error
    except ImportError as error:  # what a library raises when a checkpoint needs another one beside it
        raise MissingDependencyError(
            f"`{source}` needs a package that is not there: {' '.join(str(error).split())[:300]}",
            hint="install it into dla's environment",
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SourceError(f"`{source}` cannot be opened: {reason}", hint=hint) from error
