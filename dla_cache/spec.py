"""What is computed for every image, and the recipe hash that names it.

A `CacheSpec` is what a user writes. A `Recipe` is what a source makes of one of its entries:
everything that decides the stored numbers, and nothing else (no path, device, time or worker).
"""

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from dla_cache.errors import SpecError
from dla_cache.modality import DIRECTIONS, PICTURES
from dla_cache.modality import Modality as Modality
from dla_cache.strict_yaml import load_yaml as load_yaml

WRITER_VERSION = 1
"""Part of every recipe: raised when the same recipe would store other numbers."""

UNKNOWN_FIELDS = "unknown_fields"
"""Type of the fault that a model finds in a mapping with fields it does not have."""

M = TypeVar("M", bound=BaseModel)


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


class RecordModel(BaseModel):
    """Base of what a store records of itself: frozen. Fields that it does not know are passed over, so that a later
    version may say more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


LARGEST_SHARD = 1_000_000
"""Images."""

LARGEST_DRAWS = 1024

LARGEST_LATENT = 2**28
"""Numbers in one latent: far above what any generator makes, and what a forged store may not ask memory for."""


SMALL_IMAGE_SIZE = 256
"""Shorter side in pixels, enough for crops that a model sees with 224."""

SMALL_IMAGE_QUALITY = 90


Finite = Annotated[float, Field(allow_inf_nan=False)]

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


class Quantisation(StrictModel):
    """What the int8 of a modality stand for: `float32(int8) * scale + offset`, along the channel axis.

    Both are float32 numbers, a scale one of at most 16 significant bits: then the product is exact, and every way to
    compute this in float32 or wider gives the same float32.
    """

    scale: tuple[Annotated[Finite, Field(gt=0)], ...]
    """One for each channel: the distance from one number that can be stored to the next."""
    offset: tuple[Finite, ...]
    """One for each channel: what 0 stands for."""

    @model_validator(mode="after")
    def _stands_for_float32(self) -> Self:
        if len(self.scale) != len(self.offset):
            raise ValueError(f"{len(self.scale)} scales, {len(self.offset)} offsets")
        pairs = zip(self.scale, self.offset, strict=True)
        if any(128 * scale + abs(offset) > LARGEST_FLOAT32 for scale, offset in pairs):
            raise ValueError("an int8 would stand for a number beyond float32")
        return self


AXES_OF_V1 = frozenset({"channel", "height", "width", "token", "codebook", "step", "frequency", "time"})
"""What readers of format v1 know without being told that a store requires more of them."""

Axis = Literal["channel", "height", "width", "token", "codebook", "step", "frequency", "time", "draw", "frame", "layer"]
"""What one axis of a latent counts."""


class LatentFormat(StrictModel):
    """How one sample of a modality looks in the store."""

    kind: Literal["continuous", "codes"]
    shape: tuple[Annotated[int, Field(gt=0)], ...]
    """Shape of one sample, without the batch axis."""
    axes: tuple[Axis, ...]
    """The meaning of each axis of `shape`: a flip of the image turns `height` and `width`."""
    dtype: Literal["float16", "float32", "bfloat16", "int8", "uint8", "int16", "int32"]
    """What lies on disk; codes are uint8, int16 or int32. A reader gets `read_dtype`."""
    quantisation: Quantisation | None = None
    """What the numbers stand for; int8 only."""
    rounded_from: tuple[Literal["float16", "float32", "bfloat16"], ...] = ()
    """The dtypes that the numbers had on disk before `dla cache convert` made fewer bits of them, the first one first:
    rounding twice gives other numbers than rounding once."""
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
        if (self.kind == "codes") != (self.dtype in ("uint8", "int16", "int32")):
            raise ValueError(f"`{self.kind}` cannot be stored as `{self.dtype}`")
        if math.prod(self.shape) > LARGEST_LATENT:
            raise ValueError(f"a latent of shape {list(self.shape)} has more than {LARGEST_LATENT:,} numbers")
        if (self.dtype == "int8") != (self.quantisation is not None):
            raise ValueError("`quantisation` belongs to int8 and only to int8")
        if self.quantisation is not None and len(self.quantisation.scale) != self.shape[self.channel_axis]:
            raise ValueError(f"`quantisation` is of {len(self.quantisation.scale)} channels, `shape` of another number")
        if "draw" in self.axes[1:]:
            raise ValueError("`draw` is the first axis or none")
        return self

    @property
    def n_draws(self) -> int:
        """How many latents of an image lie in one sample."""
        return self.shape[0] if self.axes[:1] == ("draw",) else 1

    @property
    def of_one_draw(self) -> Self:
        """The format of one latent of an image, where a sample holds several."""
        if self.axes[:1] != ("draw",):
            return self
        return self.model_copy(update={"shape": self.shape[1:], "axes": self.axes[1:]})

    def with_draws(self, draws: int) -> Self:
        """The format of a sample that holds so many latents of an image: one stays as it is."""
        if draws == 1:
            return self
        return type(self).model_validate(
            self.model_dump() | {"shape": (draws, *self.shape), "axes": ("draw", *self.axes)}
        )

    @property
    def channel_axis(self) -> int:
        """The axis of one sample along which statistics are kept: channels, or codebooks."""
        return self.axes.index("codebook" if self.kind == "codes" else "channel")

    def no_mirror_of(self, modality: Modality) -> str | None:
        """Why a latent of this format cannot be made that of the mirrored image; None if it can: turned along its
        `width`, or, of a kind that does not lie over the image, as it is."""
        # Frames are pictures, not flow: those of a mirrored video are mirrored pictures.
        if modality.kind in DIRECTIONS and not (modality.kind == "motion" and {"frame", "width"} <= set(self.axes)):
            return "mirroring changes the sign of a direction, which a latent does not show"
        if modality.kind in PICTURES and "token" in self.axes and "width" not in self.axes:
            return "a grid that was flattened into tokens has no width to turn"
        return None

    @property
    def read_dtype(self) -> str:
        """Of the numbers that a reader gets, by NumPy's name."""
        return "float32" if self.dtype in ("bfloat16", "int8") else self.dtype

    @property
    def built_dtype(self) -> str:
        """What lay on disk when a source had made the latents, before any conversion."""
        return self.rounded_from[0] if self.rounded_from else self.dtype


class LatentSpec(StrictModel):
    """One modality of the cache: which source fills it, and how."""

    modality: Modality
    source: str
    """Name of a source, as `dla sources list` shows it."""
    parameters: dict[str, str | int | float | bool] = {}
    """The source's own settings; it refuses those it does not know."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Recipe seed; a sample's seed derives from it, the modality, the image ID and the draw."""
    draws: Annotated[int, Field(ge=1, le=LARGEST_DRAWS)] = 1
    """Latents of an image, each of another seed: more than one make a first axis `draw` of a sample."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Stored dtype of continuous latents; codes take the smallest integer that holds them. int8 needs the range of all
    latents, so `dla cache convert` makes it of a store that is there."""

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Self:
        for name, value in self.parameters.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"parameter `{name}` is {value}, no finite number")
        return self


class CacheSpec(StrictModel):
    """What `dla cache build` computes and how it is laid out."""

    latents: Annotated[tuple[LatentSpec, ...], Field(min_length=1)]
    shard_size: Annotated[int, Field(gt=0, le=LARGEST_SHARD)] = 512
    """Images per shard: the unit of work and of commit."""
    splits: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Splits of the manifest to build; all when absent."""
    layout: Literal["zarr", "webdataset"] = "zarr"
    """How the store lies on disk: arrays for Zarr clients, or tars for WebDataset readers."""
    images: Literal["none", "original", "jpeg", "raw"] = "none"
    """Whether the store holds the images, too, so that training needs no image folder: the bytes of their files, or
    smaller pictures made of them, as JPEG or as plain RGB (PPM)."""
    image_size: Annotated[int, Field(gt=0)] = SMALL_IMAGE_SIZE
    """Of `jpeg` and `raw`: the shorter side in pixels. Smaller images stay as they are."""
    image_quality: Annotated[int, Field(ge=1, le=100)] = SMALL_IMAGE_QUALITY
    """Of `jpeg`: libjpeg's scale."""

    @model_validator(mode="after")
    def _settings_of_images_have_a_use(self) -> Self:
        # Their defaults pass anywhere: a spec as `--dry-run` prints it is a spec.
        if self.images not in ("jpeg", "raw") and self.image_size != SMALL_IMAGE_SIZE:
            raise ValueError(f"`image_size` is of images as `jpeg` or `raw`, not as `{self.images}`")
        if self.images != "jpeg" and self.image_quality != SMALL_IMAGE_QUALITY:
            raise ValueError(f"`image_quality` is of images as `jpeg`, not as `{self.images}`")
        return self

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
    def as_built(self) -> Self:
        """The recipe that the latents had before any conversion to fewer bits."""
        built = {"dtype": self.format.built_dtype, "quantisation": None, "rounded_from": ()}
        return self.model_copy(update={"format": self.format.model_copy(update=built)})

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of this recipe, hexadecimal."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


ImageEncoding = Literal["original", "jpeg", "raw"]
"""How a store holds images."""


class ImageRecipe(StrictModel):
    """Everything that decides the bytes that a store holds of images, beside the images themselves."""

    encoding: ImageEncoding
    """`original`: the bytes of their files, with the sha256 of their rows. Else pictures made of them."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Shorter side in pixels at most, of made pictures."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of JPEG."""
    made_by: str | None = None
    """Name and version of the libraries that made the pictures: other ones may make other bytes."""

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        is_made = self.encoding != "original"
        fits = ((self.size is not None) == is_made, (self.made_by is not None) == is_made)
        if not all(fits) or (self.quality is not None) != (self.encoding == "jpeg"):
            raise ValueError(f"these are not the fields of images as `{self.encoding}`")
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """Its fields as JSON has them, without those it has no use for."""
        return self.model_dump(mode="json", exclude_none=True)

    def __str__(self) -> str:
        settings = (f"{name.replace('_', ' ')} {value}" for name, value in self.facts.items() if name != "encoding")
        return ", ".join([self.encoding, *settings])

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON of this recipe, hexadecimal."""
        return hashlib.sha256(canonical_json(self.facts).encode()).hexdigest()


ORIGINAL_IMAGES = ImageRecipe(encoding="original")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_yaml(path: Path, model: type[M]) -> M:
    """The YAML file at `path` as a checked `model`.

    Raises:
        SpecError: if the file is missing, is no YAML mapping, or does not fit the model.
    """
    return parse_spec(load_yaml(path), model, where=str(path))


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
