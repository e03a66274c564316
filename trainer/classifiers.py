"""Students other than the paper's ViT: any image classifier of transformers, or of timm, by its name.

All of them are stock transformers models, so what is trained is what ships.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PreTrainedConfig, PreTrainedModel, TimmWrapperConfig

from dla_cache.errors import MissingDependencyError, SpecError
from dla_cache.spec import StrictModel
from trainer.backbone import check_backbone_pixels, pretrained_backbone
from trainer.outline import meta_copy, run_on_nothing
from trainer.pretrained import (
    PretrainedFacts,
    check_pixels,
    config_of_fields,
    load_pretrained,
    make_config,
    read_pretrained,
    told_as_spec_error,
)

ORIGINS = ("architecture", "timm", "pretrained")
"""Fields of `model`: with one of them a student is another than the paper's ViT."""

HEADS = ("classifier", "cls_classifier", "distillation_classifier", "head", "fc")
"""What libraries call the layer from features to classes."""


class ClassifierConfig(StrictModel):
    """A student that is another image classifier than the paper's ViT."""

    n_classes: Annotated[int, Field(gt=0)]
    image_size: Annotated[int, Field(gt=0)] = 224
    """Side of the square image in pixels."""
    architecture: str | None = None
    """From scratch, as transformers names it: `deit`, `swin`, `convnext`, `resnet`, `mobilenet_v2`, …"""
    timm: str | None = None
    """From scratch, as timm names it: `resnet18`, …; needs the extra `timm`."""
    pretrained: str | None = None
    """Or with weights: a folder, relative to the run file, or a repository of the hub that `dla sources fetch` has
    fetched. Its classifier is new where the number of classes differs."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of its transformers config in place of their defaults; of timm, what its model takes."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        named = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"a student has one of {', '.join(ORIGINS)}, and this {' and '.join(named) or 'none'}")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("`revision` is of a `pretrained` student")
        if "image_size" in self.settings:
            raise ValueError("`settings.image_size` is `image_size` of the run")
        return self


def build_classifier(config: ClassifierConfig, facts: PretrainedFacts | None) -> PreTrainedModel:
    """A classifier with fresh weights, as its library draws them; `load_classifier` brings the trained ones.

    Args:
        facts: of pretrained weights, which say what model it is.

    Raises:
        SpecError: if there is no such image classifier or setting, or it cannot look at images of this size.
        MissingDependencyError: if it is one of timm, which is not installed.
    """
    if config.timm is not None:
        return build_of(timm_config(config.timm, config), config)
    if config.architecture is not None:
        return build_of(config_of(config.architecture, config), config)
    assert facts is not None
    own = with_settings(facts, config)
    try:
        return build_of(own, config)
    except SpecError:  # positions of another size, that are interpolated when they are loaded
        return build_of(with_image_size(own, config.image_size), config)


def config_of(architecture: str, config: ClassifierConfig) -> PreTrainedConfig:
    """The transformers config of an architecture with the run's settings and size of images.

    Raises:
        SpecError: for an unknown architecture or setting, or a value that does not fit.
    """
    size = config.image_size
    return make_config(architecture, config.settings, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "model", image_size=size)


def timm_config(name: str, config: ClassifierConfig) -> PreTrainedConfig:
    """What stock transformers needs to know of a model of timm.

    Raises:
        MissingDependencyError: if timm is not installed.
    """
    if find_spec("timm") is None:
        raise MissingDependencyError(
            f"the student `{name}` is one of timm, which is not installed", hint="pip install 'dla[timm]'"
        )
    return TimmWrapperConfig(architecture=name, model_args=config.settings or None)


def with_settings(facts: PretrainedFacts, config: ClassifierConfig) -> PreTrainedConfig:
    """The config of pretrained weights with the run's settings in it.

    Raises:
        SpecError: if a setting is none of its fields, or it is no image classifier's.
    """
    own = config_of_fields(facts.config)
    made = config_of(own.model_type, config)
    for name in config.settings:
        setattr(own, name, getattr(made, name))
    return own


def with_image_size(own: PreTrainedConfig, image_size: int) -> PreTrainedConfig:
    """A config for images of this size, if it has a word for it."""
    match getattr(own, "image_size", None):
        case int():
            own.image_size = image_size
        case list() | tuple():
            own.image_size = [image_size, image_size]
    return own


def build_of(own: PreTrainedConfig, config: ClassifierConfig) -> PreTrainedModel:
    """The classifier of a transformers config, tried on an image without numbers.

    Raises:
        SpecError: if its settings do not fit each other, the number of classes or the size of images.
    """
    own.num_labels = config.n_classes
    size = f"{config.image_size} x {config.image_size} pixels"
    with told_as_spec_error(f"a `{own.model_type}` of these settings cannot look at images of {size}"):
        student: PreTrainedModel = class_of(own)._from_config(own)
        logits = run_on_nothing(meta_copy(student), config.image_size).logits
        if logits.shape != (1, config.n_classes):
            raise ValueError(f"it puts out logits {list(logits.shape)} of {config.n_classes} classes")
    return student


def class_of(own: PreTrainedConfig) -> Any:
    """The image classifier that belongs to a config; of several the one that its `architectures` name."""
    known: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(own)]
    if not isinstance(known, tuple):
        return known
    named = [one for one in known if one.__name__ in (own.architectures or ())]
    return (named or known)[0]


def pretrained_facts(model: Mapping[str, Any]) -> PretrainedFacts | None:
    """What is known of the weights that `model` of a run names, for itself or its backbone; None if it names none.

    Raises:
        SpecError: if they are not there, or may not be loaded.
    """
    if model.get("pretrained") is None:
        return pretrained_backbone(model)
    return read_pretrained(model["pretrained"], model.get("revision"))


def check_pretrained_pixels(
    model: Mapping[str, Any], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """Refuses pixels of another scale than those weights were trained on.

    Raises:
        SpecError: saying what to set.
    """
    check_backbone_pixels(model, mean, std)
    if model.get("pretrained") is not None:
        check_pixels(model["pretrained"], model.get("revision"), mean, std)


@torch.no_grad()
def load_classifier(student: PreTrainedModel, config: StrictModel) -> None:
    """Gives a student the weights that its config names, if it does, but for a classifier of other classes.

    Learned positions of another size of images are interpolated.

    Raises:
        SpecError: if there are none, they lack some, or have another shape.
    """
    if not isinstance(config, ClassifierConfig) or config.pretrained is None:
        return
    heads = heads_of(student)
    trained = load_pretrained(config.pretrained, config.revision, type(student), may_lack=heads)
    theirs, ours = trained.state_dict(), student.state_dict()
    positions = {
        f"{name}.position_embeddings": module
        for name, module in trained.named_modules()
        if hasattr(module, "interpolate_pos_encoding")
    }
    taken: dict[str, Tensor] = {}
    for name in dict.fromkeys((*ours, *theirs)):
        if name in ours and name in theirs and theirs[name].shape == ours[name].shape:
            taken[name] = theirs[name]
        elif name in positions:
            taken[name] = interpolated(positions[name], ours[name], config.image_size)
        elif not name.startswith(heads):
            raise SpecError(
                f"`{name}` of `{config.pretrained}` does not fit the student: {shape_in(theirs, name)} there,"
                f" {shape_in(ours, name)} here",
                hint="drop the `settings` of `model` that change it, or set `image_size` as it was trained",
            )
    student.load_state_dict(ours | taken)


def shape_in(tensors: Mapping[str, Tensor], name: str) -> str:
    """The shape of a tensor in words."""
    return f"shape {list(tensors[name].shape)}" if name in tensors else "none"


def heads_of(student: nn.Module) -> tuple[str, ...]:
    """How the names of a classifier's own parameters begin, those of the trunk left out."""
    found: dict[str, None] = {}
    for name, _ in student.named_parameters():
        for depth, part in enumerate(name.split(".")[:2], start=1):
            if part in HEADS:
                found[".".join([*name.split(".")[:depth], ""])] = None
    return tuple(found)


def interpolated(module: Any, like: Tensor, image_size: int) -> Tensor:
    """The learned positions of a module for images of another size, as its own library interpolates them."""
    positions: Tensor = module.interpolate_pos_encoding(torch.empty_like(like), image_size, image_size)
    return positions


def uses_batch_statistics(student: nn.Module) -> bool:
    """Whether what an image gives depends, in training, on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())
