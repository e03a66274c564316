"""Teacher targets as a store of their own: what a frozen model says of each view of each image, computed once.

Every view has series of its own, so that a batch reads the one that its epoch shows:

    target-logits-v3    [K], or of the k largest [k + 1]: these, and what stands for each of the others
    target-index-v3     [k], which classes these are
    target-pooled-v3    [T, D], or side by side where widths differ: every pooled target
    target-tokens-v3    [T·N, D], or side by side: every target of tokens

Dimensions: B images, K classes, k of them stored, T targets, N tokens, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_serializer, field_validator, model_validator
from torch import Tensor

from dla_cache.modality import Modality
from dla_cache.spec import ORIGINAL_IMAGES, ImageRecipe, LatentFormat, Recipe, StrictModel, parse_spec
from dla_cache.store import LatentStore
from trainer.config import merge, placed, preset_of
from trainer.features import LOGITS, Target
from trainer.objectives import Need, ObjectiveConfig
from trainer.views import VIEWS_VERSION, ViewConfig

SOURCE = "teacher"
"""What the recipe of a series names as its source."""

DEFAULT_VIEWS = 8


class ReferenceFacts(StrictModel):
    """What must be known of a model to learn from it, or from what it said."""

    kind: str
    """Probe, teacher or student."""
    class_names: tuple[str, ...]
    is_multi_label: bool
    recipes: dict[str, str] = Field(default_factory=dict)
    """Recipe hash of each modality that it sees."""
    latents_sha256: dict[str, str] = Field(default_factory=dict)
    """Content hash of the latents that it was shown."""
    blocks: dict[str, int] = Field(default_factory=dict)
    """Width of each block by its name, in their order; none of a probe."""
    spans: tuple[str, ...] = ()
    """What its tokens stand for."""
    weights_sha256: str
    images: ImageRecipe = ORIGINAL_IMAGES
    """Which pictures of the images it was shown."""
    image_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    @field_serializer("recipes", "blocks")
    def _in_order(self, value: dict[str, Any]) -> list[list[Any]]:
        """Pairs, since a store sorts the names of what it writes, and `blocks.10` would come before `blocks.2`."""
        return [[name, one] for name, one in value.items()]

    @field_validator("recipes", "blocks", mode="before")
    @classmethod
    def _from_pairs(cls, value: Any) -> Any:
        return dict(value)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Whose latents it sees, in its order."""
        return tuple(self.recipes)

    @property
    def sees_images(self) -> bool:
        """Whether its answer depends on the view."""
        return self.kind != "probe"


class TargetsConfig(StrictModel):
    """What `dla train targets` computes: a frozen model's answers to K views of every image."""

    kind: Literal["targets"] = "targets"
    store: str
    """Path of the store that the model's latents are read from."""
    images: str | None = None
    """Folder that the image paths of the store are relative to; none for a store that holds the images itself."""
    output: str
    """Folder of the new store."""
    teacher: str
    """Run folder of the probe, teacher or student to ask."""
    splits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Splits of the store; those that the model was trained on when absent."""
    view: ViewConfig = ViewConfig()
    """`count` says how many views of an image are stored, 8 when absent; `seed` decides them, 0 when absent."""
    objective: ObjectiveConfig = ObjectiveConfig.model_validate({"kd": {}})
    """What students will be trained on: all that it needs of the model is stored."""
    also: tuple[str, ...] = ()
    """More targets, as `pooled/image/2` or `tokens/cls/11`: what, span, block."""
    top_logits: Annotated[int, Field(gt=0)] | None = None
    """Stores so many of the largest logits, and for all others the one that keeps their sum of probabilities."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Of what is stored. `dla cache convert --dtype int8` makes it smaller still."""
    shard_size: Annotated[int, Field(gt=0, le=2**16)] = 1024
    """Images of a shard: the unit of work and of commit."""
    batch_size: Annotated[int, Field(gt=0)] = 64
    """Images that the model is asked about at a time; rounding differs by less than what is stored."""
    threads: Annotated[int, Field(gt=0)] = 1
    """That read and decode images."""
    device: str = "cpu"
    """As torch names it."""

    @field_validator("splits", "also", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("also")
    @classmethod
    def _are_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(Target.parse(text)) for text in value))

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if Need.REFERENCE not in self.objective.needs and not self.also:
            raise ValueError("`objective` needs nothing of a teacher: there is nothing to store")
        if self.shard_size % self.batch_size:
            raise ValueError(f"`shard_size` {self.shard_size} is no multiple of `batch_size` {self.batch_size}")
        return self


def resolve_targets(value: Mapping[str, Any], *, base: Path, where: str) -> TargetsConfig:
    """What `value` describes: its `preset` below it, its paths taken from `base`.

    Raises:
        SpecError: for an unknown preset or field, or parts that do not fit together.
    """
    preset, given = preset_of(value, where)
    return parse_spec(placed(merge(preset, given), base, where), TargetsConfig, where=where)


IN_THE_STORE = {"class_names", "is_multi_label"}
"""Facts that a store of targets holds by itself."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series of one view: which targets lie in it, and how."""

    name: str
    targets: tuple[Target, ...]
    format: LatentFormat


@dataclass(frozen=True, slots=True)
class TargetLayout:
    """How the targets of a view lie in series; the same for every view."""

    shapes: Mapping[Target, tuple[int, ...]]
    """Of one image: [K], [D] or [N, D]."""
    top_logits: int | None
    dtype: str

    def kinds(self) -> dict[str, tuple[Target, ...]]:
        """The targets by the kind of series that they lie in."""
        kinds: dict[str, tuple[Target, ...]] = {}
        for target in sorted(self.shapes):
            kinds[target.what] = (*kinds.get(target.what, ()), target)
        if "logits" in kinds and self.top_logits is not None:
            kinds["index"] = (LOGITS,)
        return kinds

    def series(self, view: int) -> tuple[Series, ...]:
        """All series of a view."""
        return tuple(
            Series(series_name(kind, view), targets, self._format(kind, targets))
            for kind, targets in self.kinds().items()
        )

    def _format(self, kind: str, targets: Sequence[Target]) -> LatentFormat:
        n_classes = self.shapes.get(LOGITS, (0,))[0]
        if kind == "index":
            assert self.top_logits is not None
            dtype = "int16" if n_classes < 2**15 else "int32"
            fields = {"shape": (self.top_logits,), "axes": ("codebook",), "dtype": dtype, "vocabulary": n_classes}
            return LatentFormat.model_validate({"kind": "codes", **fields})
        if kind == "logits":
            n_stored = n_classes if self.top_logits is None else self.top_logits + 1
            return self._continuous((n_stored,), ("channel",))
        shapes = [self.shapes[target] for target in targets]
        width = shapes[0][-1]
        if any(shape[-1] != width for shape in shapes):
            return self._continuous((sum(math.prod(shape) for shape in shapes),), ("channel",))
        n_tokens = sum(math.prod(shape[:-1]) for shape in shapes)
        return self._continuous((n_tokens, width), ("token", "channel"))

    def _continuous(self, shape: tuple[int, ...], axes: tuple[Any, ...]) -> LatentFormat:
        return LatentFormat(kind="continuous", shape=shape, axes=axes, dtype=self.dtype)  # type: ignore[arg-type]

    def pack(self, kind: str, said: Mapping[Target, Tensor]) -> Tensor:
        """What is stored in a series of a kind, [B, *shape], float32 or int64."""
        if kind in ("logits", "index"):
            return self._packed_logits(said[LOGITS].float(), kind)
        targets = self.kinds()[kind]
        flat = torch.cat([said[target].float().flatten(1) for target in targets], dim=1)
        return flat.view(len(flat), *self._format(kind, targets).shape)

    def _packed_logits(self, logits: Tensor, kind: str) -> Tensor:
        if self.top_logits is None:
            return logits
        largest, index = logits.topk(self.top_logits, dim=1)
        if kind == "index":
            return index
        others = logits.scatter(1, index, float("-inf"))
        n_others = logits.shape[1] - self.top_logits
        return torch.cat([largest, others.logsumexp(dim=1, keepdim=True) - torch.tensor(n_others).log()], dim=1)

    def unpack(self, stored: Mapping[str, Tensor]) -> dict[Target, Tensor]:
        """The targets [B, ...] in float32, from what the series of a view hold.

        Args:
            stored: kind of series → [B, *shape]; those that are not wanted may be left out.
        """
        said: dict[Target, Tensor] = {}
        for kind, targets in self.kinds().items():
            if kind not in stored or kind == "index":
                continue
            values = stored[kind].float()
            if kind == "logits":
                said[LOGITS] = values if self.top_logits is None else self._dense(values, stored["index"].long())
                continue
            shapes = [self.shapes[target] for target in targets]
            parts = torch.split(values.flatten(1), [math.prod(shape) for shape in shapes], dim=1)
            for target, shape, part in zip(targets, shapes, parts, strict=True):
                said[target] = part.reshape(len(part), *shape)
        return said

    def _dense(self, values: Tensor, index: Tensor) -> Tensor:
        n_classes = self.shapes[LOGITS][0]
        return values[:, -1:].expand(-1, n_classes).scatter(1, index, values[:, :-1])


def series_name(kind: str, view: int) -> str:
    """The modality that a series is to its store."""
    return f"target-{kind}-v{view}"


def view_count(view: ViewConfig) -> int:
    """How many views are stored, once they are resolved."""
    assert view.count is not None
    return view.count


def recipe_of(series: Series, layout: TargetLayout, facts: ReferenceFacts, view: ViewConfig, number: int) -> Recipe:
    """What the numbers of a series are: of whom, of which view, of what. Its hash is their fingerprint."""
    assert view.seed is not None
    return Recipe(
        modality=Modality(series.name),
        source=SOURCE,
        weights_sha256=facts.weights_sha256,
        parameters={
            **flattened(facts.model_dump(mode="json", exclude=IN_THE_STORE), "reference"),
            **flattened(view.model_dump(mode="json"), "view"),
            "views_version": VIEWS_VERSION,
            "targets": " ".join(f"{target}={'x'.join(map(str, layout.shapes[target]))}" for target in series.targets),
            "top_logits": layout.top_logits or 0,
            "number": number,
        },
        seed=view.seed,
        source_view_size=facts.image_size,
        format=series.format,
    )


def shapes_in(recipe: Recipe) -> dict[Target, tuple[int, ...]]:
    """The targets that a series holds, with the shape of each."""
    said = [text.rpartition("=") for text in str(recipe.parameters["targets"]).split()]
    return {Target.parse(name): tuple(int(n) for n in shape.split("x")) for name, _, shape in said}


def facts_in(store: LatentStore, recipe: Recipe) -> tuple[ReferenceFacts, ViewConfig]:
    """Whom a series is from, and its views."""
    of_store = {"class_names": tuple(store.class_names), "is_multi_label": store.rows.is_multi_label}
    facts = nested(recipe.parameters, "reference") | of_store
    return ReferenceFacts.model_validate(facts), ViewConfig.model_validate(nested(recipe.parameters, "view"))


Scalar = str | int | float | bool


def flattened(value: Any, path: str) -> dict[str, Scalar]:
    """The scalars in mappings and lists by their path, as `view/scale_min`; what is None or empty has none."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {at: one for name, part in items for at, one in flattened(part, f"{path}/{name}").items()}
    return {} if value is None else {path: value}


def nested(flat: Mapping[str, Scalar], path: str) -> Any:
    """What was flattened under a path."""
    if path in flat:
        return flat[path]
    start = f"{path}/"
    names = dict.fromkeys(key.removeprefix(start).split("/")[0] for key in flat if key.startswith(start))
    parts = {name: nested(flat, start + name) for name in names}
    if not parts or not all(name.isdecimal() for name in parts):
        return parts
    return [parts[name] for name in sorted(parts, key=int)]  # as text, 10 comes before 2
