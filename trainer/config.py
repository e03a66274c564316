"""What a training run is: one frozen config, read from YAML over a preset."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from dla_cache.errors import SpecError
from dla_cache.remote import is_remote
from dla_cache.spec import StrictModel, parse_spec
from trainer.classifiers import ORIGINS, ClassifierConfig
from trainer.mixing import MixingConfig
from trainer.objectives import Need, ObjectiveConfig
from trainer.objectives.cross_entropy import LabelConfig
from trainer.presets import PRESETS
from trainer.pretrained import folder_or_name, with_places
from trainer.probe import ProbeConfig
from trainer.schedule import LoopConfig
from trainer.student import StudentConfig
from trainer.teacher import TeacherConfig
from trainer.views import ViewConfig

MODEL_CONFIGS: Mapping[str, type[StrictModel]] = {
    "probe": ProbeConfig,
    "teacher": TeacherConfig,
    "student": StudentConfig,
}

DERIVED_FIELDS = frozenset({"n_classes", "formats", "modalities", "image_size"})
"""Model fields that the store and the run decide, and `model` may not."""


def config_class(kind: str, model: Mapping[str, Any]) -> type[StrictModel]:
    """What describes the `model` of a run; a student is the paper's ViT unless it says what else."""
    return ClassifierConfig if kind == "student" and not model.keys().isdisjoint(ORIGINS) else MODEL_CONFIGS[kind]


Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]

PLACES = ("store", "images", "output", "teacher", "teachers", "targets")
"""Fields of a run that are paths, `store` maybe a URL, `teachers` several by name; a run file's are relative to the
file. They are no part of what a run is."""


RUNTIME_FIELDS = (*PLACES, "device", "threads")
"""Fields that say where and how a run is computed: no part of what it is, so it may be resumed with others."""


def folder_of(place: str | None) -> Path | None:
    """A place of a run that may be absent."""
    return None if place is None else Path(place)


class Roles(StrictModel):
    """Which splits of the store play which part. The test split is read once, after all is chosen."""

    labelled: Annotated[tuple[str, ...], Field(min_length=1)] = ("labelled",)
    transfer: tuple[str, ...] = ()
    """Unlabelled images: they take part in distillation and self-training."""
    validation: Annotated[tuple[str, ...], Field(min_length=1)] = ("validation",)
    test: tuple[str, ...] = ("test",)
    """None for a run that is compared on validation alone: it reads no test split and has no test score."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        names = [*self.labelled, *self.transfer, *self.validation, *self.test]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"a split may play one part only, and {', '.join(f'`{name}`' for name in twice)} plays two"
            )
        return self


class SelfTraining(StrictModel):
    """A teacher's own confident answers on unlabelled images become their labels.

    Source: FixMatch, arXiv:2001.07685, equation 4, with dropout in place of strong augmentation.
    """

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.8
    weight: Annotated[float, Field(gt=0)] = 1.0


class RunConfig(StrictModel):
    """One run: a probe or teacher on images and latents, or an image-only student."""

    kind: Literal["probe", "teacher", "student"]
    store: str
    """Path of the store."""
    images: str | None = None
    """Folder that the image paths of the store are relative to; none for a store that holds the images itself."""
    output: str
    """Run folder."""
    teacher: str | None = None
    """Students only: run folder of the probe, teacher or student to learn from."""
    teachers: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], str], Field(min_length=2)] | None = (
        None
    )
    """Students only, in place of `teacher`: run folders of several, by names of your own, whose order is that of the
    alphabet. Objectives that learn from one hear them as one, see `ensemble`; `mst` routes between them."""
    ensemble: Literal["logits", "probabilities"] = "logits"
    """What the answers of several `teachers` are averaged as: the mean of logits is the geometric mean of
    distributions at any temperature, that of probabilities the arithmetic one."""
    targets: str | None = None
    """Students only, in place of `teacher`: store of what it said of each view, as `dla train targets` makes it.
    No teacher and no latents are needed then."""
    modalities: tuple[str, ...] | None = None
    """Probes and teachers: which modalities to see; all of the store when absent."""
    roles: Roles = Roles()
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the labelled role that takes part, rounded up in each class; the others take part in nothing. A smaller
    share is part of a larger one."""
    label_fraction_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Which images these are, whatever the run's own seed."""
    labelled_per_batch: Annotated[int, Field(gt=0)] = 32
    transfer_per_batch: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(gt=0)] = 224
    """Side in pixels of what a model sees."""
    pixel_mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5)
    """Per channel, pixels in [0, 1]; subtracted before a model sees them."""
    pixel_std: tuple[PositiveFinite, PositiveFinite, PositiveFinite] = (0.5, 0.5, 0.5)
    """Per channel; divided by. Small patches of low contrast drown beside their positions otherwise."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of ProbeConfig, TeacherConfig, StudentConfig or, of another student than the paper's ViT, ClassifierConfig
    that the store does not decide."""
    objective: ObjectiveConfig | None = None
    """Students only."""
    ce: LabelConfig = LabelConfig()
    """How labels are learned where some classes are rare, by a run of any kind; how much they weigh beside what a
    student distils is `objective.ce.weight`."""
    allow_empty_classes: bool = False
    """Whether classes may have no image in the labelled role: they are never learned, only scored."""
    self_training: SelfTraining | None = None
    """Probes and teachers, with a transfer role."""
    view: ViewConfig = ViewConfig()
    mixing: MixingConfig | None = None
    """Mixup and CutMix of labelled images; only where nothing in the run reads latents or stored targets."""
    loop: LoopConfig = LoopConfig()
    epochs: Annotated[int, Field(gt=0)] | None = None
    """Instead of `loop.steps`: passes over the largest role, with one learning rate an epoch."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides initialisation, order, views and dropout."""
    device: str = "cpu"
    """As torch names it: `cpu`, `cuda`, `cuda:1`, …"""
    threads: Annotated[int, Field(gt=0)] = 1
    """So many read and decode images ahead; they change nothing in the batches."""

    @field_validator("device")
    @classmethod
    def _device_has_a_name(cls, value: str) -> str:
        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(f"torch knows no device `{value}`; for example `cpu`, `cuda` or `cuda:1`") from None
        return value

    @field_validator("teachers")
    @classmethod
    def _in_order_of_names(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        return None if value is None else dict(sorted(value.items()))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.epochs is not None and "steps" in self.loop.model_fields_set:
            raise ValueError("`epochs` and `loop.steps` both say how long: leave one out, or set `epochs: null`")
        known = set(config_class(self.kind, self.model).model_fields) - DERIVED_FIELDS
        unknown = sorted(set(self.model) - known)
        if unknown:
            raise ValueError(f"`model` of a {self.kind} has no field {unknown}; it has {sorted(known)}")
        if (self.kind == "student") != (self.objective is not None):
            raise ValueError("`objective` belongs to students and every student has one")
        needs_teacher = self.objective is not None and bool(self.objective.needs & {Need.REFERENCE, Need.TEACHERS})
        named = [name for name in ("teacher", "teachers", "targets") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"`{named[0]}` and `{named[1]}` both say what to learn from: leave one out")
        if self.targets is not None and self.objective is not None and Need.TEACHERS in self.objective.needs:
            raise ValueError(
                "`mst` runs its teachers with masks on their features, and `targets` holds what one said without them:"
                " name `teacher` or `teachers` instead"
            )
        if self.ensemble != "logits" and self.teachers is None:
            raise ValueError("`ensemble` says how several `teachers` answer as one, and none are named")
        if needs_teacher != bool(named):
            what = (
                "the objective learns from a `teacher`, from several `teachers` or from stored `targets`, and none is"
                " named; a student of"
                " labels alone has `objective: {ce: {}}` and `roles: {transfer: []}`"
                if needs_teacher
                else f"`{named[0]}` is named, and no objective learns from it"
            )
            raise ValueError(what)
        if bool(self.roles.transfer) != bool(self.transfer_per_batch):
            raise ValueError("`roles.transfer` and `transfer_per_batch` go together")
        if self.self_training is not None and (self.kind == "student" or not self.roles.transfer):
            raise ValueError("`self_training` belongs to probes and teachers that have a transfer role")
        if self.kind == "student" and self.modalities is not None:
            raise ValueError("`modalities` belongs to probes and teachers: a student sees images only")
        of_labels = self.objective is None or self.objective.is_of_labels
        if self.roles.transfer and of_labels and self.self_training is None:
            raise ValueError(
                "nothing in this run learns from the transfer images: set `roles: {transfer: []}`; or, of an objective"
                " that has it, `unlabelled: teacher`"
            )
        return self

    @model_serializer(mode="wrap")
    def _with_one_length(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is written out must be a run file again, and one that names both lengths is refused.
        fields: dict[str, Any] = serialise(self)
        if self.epochs is not None:
            fields["loop"].pop("steps")
        return fields

    @property
    def models_at_hand(self) -> dict[str, str]:
        """Run folders of the models that it learns from, by their names; `teacher` of the only one."""
        return {"teacher": self.teacher} if self.teacher is not None else self.teachers or {}

    @property
    def training_splits(self) -> tuple[str, ...]:
        """Splits whose statistics may be known to the model."""
        return self.roles.labelled + self.roles.transfer

    @property
    def images_per_step(self) -> int:
        """Images in a batch."""
        return self.labelled_per_batch + self.transfer_per_batch


def resolve_run(value: Mapping[str, Any], *, base: Path, where: str) -> RunConfig:
    """The run that `value` describes: its `preset` below it, its paths taken from `base`.

    A run that says how long, in `epochs` or in `loop.steps`, takes the place of the preset's length.

    Raises:
        SpecError: for an unknown preset or field, or parts that do not fit together.
    """
    fields = over_preset(value, where)
    run = parse_spec(placed(fields, base, where), RunConfig, where=where)
    if run.targets is not None and "view" not in value:
        run.model_fields_set.discard("view")  # a preset's views give way to those of stored targets
    return run


def over_preset(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a run says over what its `preset` says, which it no longer names.

    Raises:
        SpecError: if there is no such preset.
    """
    preset, given = preset_of(value, where)
    loop = given.get("loop")
    if given.get("epochs") is not None or (isinstance(loop, Mapping) and "steps" in loop):
        preset = without_length(preset)
    roles = given.get("roles")
    if isinstance(roles, Mapping) and "transfer" in roles and not roles["transfer"]:
        preset = without_transfer(preset)
    model = given.get("model")
    if isinstance(model, Mapping) and given.get("kind") == "student" and not model.keys().isdisjoint(ORIGINS):
        preset = {name: value for name, value in preset.items() if name != "model"}  # the shape of a ViT
    return merge(preset, given)


def preset_of(value: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What the preset that `value` names says of its kind, and all that `value` says itself.

    Raises:
        SpecError: if there is no such preset.
    """
    given = dict(value)
    name, kind = given.pop("preset", None), given.get("kind")
    if name is not None and (name not in PRESETS or kind not in PRESETS[name]):
        raise SpecError(
            f"`{where}` asks for preset `{name}` of a `{kind}`",
            hint=f"presets: {', '.join(PRESETS)}; kinds: {', '.join([*MODEL_CONFIGS, 'targets'])}",
        )
    return (PRESETS[name][kind] if name is not None and kind is not None else {}), given


def with_objective(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`value` with the objective of its preset written out, unless it says one: for a field of it to be set.

    Raises:
        SpecError: if there is no such preset.
    """
    preset, _ = preset_of(value, where)
    return {name: preset[name] for name in ("objective",) if name in preset} | dict(value)


def placed(value: dict[str, Any], base: Path, where: str) -> dict[str, Any]:
    """A run with its paths taken from `base`."""
    placed = dict(value)
    for field in PLACES:
        if isinstance(place := value.get(field), str):
            placed[field] = _place_of(field, place, base, where)
        elif isinstance(place, Mapping):
            placed[field] = {name: _place_of(field, str(one), base, where) for name, one in place.items()}
    if isinstance(placed.get("model"), Mapping):
        placed["model"] = with_places(placed["model"], lambda place: folder_or_name(place, base))
    return placed


def _place_of(field: str, place: str, base: Path, where: str) -> str:
    if not is_remote(place):
        return str(base / place)
    if field != "store":
        raise SpecError(f"`{where}` has a URL as `{field}`", hint="name a folder; of a run `store` alone may be a URL")
    return place


def without_length(preset: Mapping[str, Any]) -> dict[str, Any]:
    """The preset without what says how long it trains."""
    loop = {name: value for name, value in preset.get("loop", {}).items() if name != "steps"}
    return {**{name: value for name, value in preset.items() if name != "epochs"}, "loop": loop}


def without_transfer(preset: Mapping[str, Any]) -> dict[str, Any]:
    """A preset without what it says of transfer images, for a run that says it has none."""
    return {name: value for name, value in preset.items() if name not in ("transfer_per_batch", "self_training")}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping; what a list or `objective` says, it says whole."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping) and name != "objective"
        merged[name] = merge(merged[name], value) if both else value
    return merged
