"""What all adapters of generators share: parameters, loading without network, pickles or foreign code, and guards."""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, create_model

from dla_cache.errors import DlaError, SourceError
from dla_cache.sources.catalog.entry import PipelineRow, Scalar, SourceEntry
from dla_cache.sources.weights import Weights, find_weights
from dla_cache.spec import LatentSpec, StrictModel, parse_spec

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NAMES_OF_WEIGHTS = frozenset({"model", "revision", "captioner", "captioner_revision"})
"""Parameters that say where weights lie: the hash of these stands for them in a recipe."""


class CommonParameters(StrictModel):
    """What a cache spec may set on any generator, beside the settings of its row."""

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
    scheduler: str = ""
    """Class in place of the checkpoint's, of those that the row allows."""
    captioner: str = ""
    """A folder or repository of a captioning model, for a prompt with `{caption}`; the default one if empty."""
    captioner_revision: str = ""
    masked_words: str = ""
    """Words that are taken out of captions, between bars: `cat|dog`; see `--mask-class-names`."""

    def of_recipe(self) -> dict[str, Scalar]:
        """Those that decide the numbers and were said."""
        fields = self.model_dump(exclude=set(NAMES_OF_WEIGHTS) | {"view_size"})
        return {name: value for name, value in fields.items() if value != ""}


def parse_parameters(
    spec: LatentSpec, settings: Mapping[str, Scalar], row: PipelineRow | None = None
) -> tuple[CommonParameters, dict[str, Scalar]]:
    """The parameters of a spec as the common ones and a row's own settings, defaults filled in.

    Raises:
        SpecError: if one is unknown or of another type.
        SourceError: if the scheduler is none of the row's.
    """
    kinds: dict[str, Any] = {name: (type(value), value) for name, value in settings.items()}
    model = create_model("Parameters", __base__=CommonParameters, **kinds)
    parsed = parse_spec(dict(spec.parameters), model, where=f"parameters of `{spec.source}`")
    if row is not None and parsed.scheduler and parsed.scheduler not in row.schedulers:
        known = ", ".join(f"`{name}`" for name in row.schedulers) or "none"
        raise SourceError(
            f"`{spec.source}` is not known to be repeatable with the scheduler `{parsed.scheduler}`",
            hint=f"take one of {known}",
        )
    own = {name: getattr(parsed, name) for name in settings}
    return CommonParameters(**{name: getattr(parsed, name) for name in CommonParameters.model_fields}), own


def load_pipeline(
    entry: SourceEntry, row: PipelineRow, parameters: CommonParameters, device: str
) -> tuple[Any, dict[str, str], dict[str, str]]:
    """The pipeline on its device, the hashes of its weights by name, and where they came from.

    Raises:
        SourceError: if weights or variant are not there, the checkpoint is of another pipeline, or the scheduler is
            none of the row's.
    """
    import diffusers

    weights = find_weights(
        parameters.model or entry.model,
        parameters.revision,
        variant=parameters.variant,
        without=[name for name, value in row.load.items() if value is None],
    )
    with quiet():
        pipeline = getattr(diffusers, row.pipeline).from_pretrained(
            weights.path,
            dtype=COMPUTE_DTYPES[parameters.compute_dtype],
            use_safetensors=True,
            local_files_only=True,
            **({"variant": parameters.variant} if parameters.variant else {}),
            **row.load,
        )
    hashes, origin = {"model": weights.sha256}, origin_of("model", weights)
    scheduler = parameters.scheduler or row.scheduler
    if scheduler:
        made = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **row.scheduler_settings)
        pipeline.scheduler = made
    named = getattr(pipeline, "scheduler", None)
    if row.schedulers and type(named).__name__ not in row.schedulers:
        raise SourceError(
            f"the checkpoint brings the scheduler `{type(named).__name__}`, with which `{row.pipeline}` is not known to"
            " be repeatable",
            hint=f"set `scheduler` to one of {', '.join(f'`{name}`' for name in row.schedulers)}",
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device), hashes, origin


@contextmanager
def quiet() -> Iterator[None]:
    """Loads without the bars of diffusers and transformers: a command has one of its own."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


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
    return {**versions, "device": f"{place.type} {name}", "attention": "native", **origin}


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
def told_as_source_error(source: str) -> Iterator[None]:
    """Turns whatever a generator's library raises while it loads or is tried into one error with a hint."""
    try:
        yield
    except (DlaError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SourceError(
            f"`{source}` cannot be opened: {reason}", hint="check that the checkpoint is one of this pipeline"
        ) from error
