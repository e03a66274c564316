"""What is computed for every image, and the recipe hash that names it.

A `CacheSpec` is what a user writes. A `Recipe` is what a source makes of one of its entries:
everything that decides the stored numbers, and nothing else (no path, device, time or worker).
"""

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from dla_cache.errors import SpecError

WRITER_VERSION = 1
"""Part of every recipe: raised when the same recipe would store other numbers."""

UNKNOWN_FIELDS = "unknown_fields"
"""Type of the fault that a model finds in a mapping with fields it does not have."""

M = TypeVar("M", bound=BaseModel)


class Modality(StrEnum):
    """The one vocabulary of modalities."""

    DEPTH = "depth"
    AUDIO = "audio"
    SHAPE = "shape"
    MOTION = "motion"
    NORMALS = "normals"


class StrictModel(BaseModel):
    """Base of every config and record: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_each_field(cls, value: Any) -> Any:
        # Pydantic's own refusal knows the place alone, and comes with a second fault if the field was required.
        unknown = [str(name) for name in value if name not in cls.model_fields] if isinstance(value, dict) else []
        if unknown:
            facts = {"model": cls.__name__, "unknown": unknown, "known": list(cls.model_fields)}
            raise PydanticCustomError(UNKNOWN_FIELDS, "unknown fields {unknown}; {model} has {known}", facts)
        return value


LARGEST_SHARD = 1_000_000
"""Images."""

LARGEST_LATENT = 2**28
"""Numbers in one latent: far above what any generator makes, and what a forged store may not ask memory for."""


class LatentFormat(StrictModel):
    """How one sample of a modality looks in the store."""

    kind: Literal["continuous", "codes"]
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    """Shape of one sample, without the batch axis."""
    axes: tuple[Literal["channel", "height", "width", "token", "codebook", "step", "frequency", "time"], ...]
    """The meaning of each axis of `shape`: a flip of the image turns `height` and `width`. `token` and `step` may be
    shorter in a sample, all others are as long as `shape` says."""
    dtype: Literal["float16", "float32", "uint8", "int16", "int32"]
    vocabulary: Annotated[int, Field(gt=0)] | None = None
    """Number of codes; codes only."""
    space: str = ""
    """What the numbers are and how to decode them, in words."""

    @model_validator(mode="after")
    def _axes_fit(self) -> Self:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"`axes` names {len(self.axes)} axes, `shape` has {len(self.shape)}")
        if (self.kind == "codes") != (self.vocabulary is not None):
            raise ValueError("`vocabulary` belongs to codes and only to codes")
        if (self.kind == "codes") == self.dtype.startswith("float"):
            raise ValueError(f"`{self.kind}` cannot be stored as `{self.dtype}`")
        if math.prod(self.shape) > LARGEST_LATENT:
            raise ValueError(f"a latent of shape {list(self.shape)} has more than {LARGEST_LATENT:,} numbers")
        return self

    @property
    def channel_axis(self) -> int:
        """The axis of one sample along which statistics are kept: channels, or codebooks."""
        return self.axes.index("codebook" if self.kind == "codes" else "channel")


class LatentSpec(StrictModel):
    """One modality of the cache: which source fills it, and how."""

    modality: Modality
    source: str
    """Name of a source, as `dla sources list` shows it."""
    parameters: dict[str, str | int | float | bool] = {}
    """The source's own settings; it refuses those it does not know."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Recipe seed; a sample's seed derives from it, the modality and the image ID."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored dtype of continuous latents; codes take the smallest integer that holds them."""


class CacheSpec(StrictModel):
    """What `dla cache build` computes and how it is laid out."""

    latents: Annotated[tuple[LatentSpec, ...], Field(min_length=1)]
    shard_size: Annotated[int, Field(gt=0, le=LARGEST_SHARD)] = 512
    """Images per shard: the unit of work and of commit."""
    splits: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Splits of the manifest to build; all when absent."""
    layout: Literal["zarr", "webdataset"] = "zarr"
    """How the store lies on disk: arrays for Zarr clients, or tars for WebDataset readers."""
    images: Literal["none", "original"] = "none"
    """Whether the store holds the images, too, as the bytes of their files; then it needs no image folder."""

    @model_validator(mode="after")
    def _one_entry_per_modality(self) -> Self:
        names = [entry.modality.value for entry in self.latents]
        if len(set(names)) != len(names):
            raise ValueError(f"each modality may stand once, got {names}")
        return self


class Recipe(StrictModel):
    """Everything that decides the stored numbers of one modality."""

    modality: Modality
    source: str
    weights_sha256: str
    """Content hash of the weights that were loaded; empty for a source without weights."""
    parameters: dict[str, str | int | float | bool]
    """Every setting of the source, defaults filled in."""
    seed: int
    source_view_size: Annotated[int, Field(gt=0)]
    """Side in pixels of the one square view a source sees."""
    format: LatentFormat
    writer_version: int = WRITER_VERSION

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of this recipe, hexadecimal."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_yaml(path: Path, model: type[M]) -> M:
    """The YAML file at `path` as a checked `model`.

    Raises:
        SpecError: if the file is missing, is no YAML mapping, or does not fit the model.
    """
    return parse_spec(load_yaml(path), model, where=str(path))


class StrictLoader(yaml.SafeLoader):
    """Safe YAML without second thoughts: a key stands once in a mapping, nothing holds itself, and every fault is a
    `yaml.YAMLError`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.unfinished: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; an alias of one that is not whole yet would make a value that holds itself."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.unfinished:
            problem = f"what `&{event.anchor}` names holds itself"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
        anchor = getattr(event, "anchor", None)
        if anchor is None:
            return super().compose_node(parent, index)
        self.unfinished.add(anchor)
        node = super().compose_node(parent, index)
        self.unfinished.discard(anchor)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The mapping as it is written: what `<<` merges into it may be said again."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"it says `{key.value}` twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node, as a date of which Python may say that there is no month 13."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
            fault = f"`{node.value}` cannot be read as `{node.tag.rpartition(':')[2]}`"
            raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark) from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked.

    Raises:
        SpecError: if the file is missing, holds no mapping, or says a key twice.
    """
    try:
        value = StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise SpecError(f"`{path}` cannot be read: {error.strerror}", hint="check the path") from error
    except RecursionError as error:
        raise SpecError(f"`{path}` is nested too deeply", hint="check for brackets that are never closed") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(
            f"`{path}` is no YAML: {_yaml_fault(error)}", hint="check quotes, brackets and indentation there"
        ) from error
    if not isinstance(value, dict):
        raise SpecError(f"`{path}` holds no mapping of keys to values", hint="see manifests/README.md for the fields")
    return value


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def parse_spec(value: dict[str, Any], model: type[M], *, where: str) -> M:
    """`value` as a checked `model`; every fault is named with its place.

    Raises:
        SpecError: listing each faulty field; for an unknown one also the nearest name, and those there are.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = _innermost(error.errors())
        told = "; ".join(_told(fault, model) for fault in faults)
        known = {fault["ctx"]["model"]: fault["ctx"]["known"] for fault in faults if fault["type"] == UNKNOWN_FIELDS}
        lists = [f"fields of {name}: {', '.join(f'`{field}`' for field in fields)}" for name, fields in known.items()]
        hint = "; ".join(lists) or "see manifests/README.md for the fields and their bounds"
        raise SpecError(f"`{where}` does not fit {model.__name__}: {told}", hint=hint) from error


def _innermost(faults: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The faults without those that follow from a deeper one: pydantic calls a list of one faulty entry too short."""
    above = {fault["loc"][:depth] for fault in faults for depth in range(len(fault["loc"]))}
    return [fault for fault in faults if fault["loc"] not in above]


def _told(fault: ErrorDetails, model: type[BaseModel]) -> str:
    """One fault in words, with its place."""
    place = [str(part) for part in fault["loc"]]
    if fault["type"] != UNKNOWN_FIELDS:
        # What our own validators say, without the `Value error, ` that pydantic puts before it.
        message = fault["ctx"]["error"] if fault["type"] == "value_error" else fault["msg"]
        return f"`{'.'.join(place) or model.__name__}`: {message}"
    told = []
    for name in fault["ctx"]["unknown"]:
        nearest = difflib.get_close_matches(name, fault["ctx"]["known"], n=1)
        told.append(f"unknown field `{'.'.join([*place, name])}`" + "".join(f", did you mean `{n}`?" for n in nearest))
    return "; ".join(told)
