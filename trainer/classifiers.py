"""Students other than the paper's ViT: any image classifier of transformers, or of timm, by its name.

All of them are stock transformers models, so what is trained is what ships.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Annotated, Any, Self

from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from dla_cache.errors import MissingDependencyError, SpecError, name_some
from dla_cache.spec import StrictModel
from trainer.outline import meta_copy, run_on_nothing

TIMM = "timm_wrapper"
"""What transformers calls a model of timm."""

ORIGINS = ("architecture", "timm", "pretrained")
"""Fields of `model` of which one makes a student another than the paper's ViT."""

DERIVED_SETTINGS = frozenset({"image_size", "num_channels", "num_labels"})
"""Of a transformers config, what the run and its data decide."""

MODEL_FAULTS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What a model raises that is built with settings that do not fit each other, or run on an image that does not."""


class ClassifierConfig(StrictModel):
    """A student that is another image classifier than the paper's ViT."""

    n_classes: Annotated[int, Field(gt=0)]
    image_size: Annotated[int, Field(gt=0)] = 224
    """Side of the square image in pixels."""
    architecture: str | None = None
    """As transformers calls it: `swin`, `convnext`, `resnet`, …; weights are random."""
    timm: str | None = None
    """Or as timm does: `resnet18`, …; weights are random. Needs the extra `timm`."""
    pretrained: str | None = None
    """Or a folder or repository of the hub with weights; the classifier is new where the number of classes differs."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of its transformers config, or what timm's model takes, in place of their defaults."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        named = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(f"a student is one of {', '.join(ORIGINS)}, and {' and '.join(named) or 'none'} is named")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("`revision` belongs to `pretrained`")
        return self


def build_classifier(config: ClassifierConfig) -> PreTrainedModel:
    """A classifier with random weights, as its library initialises it.

    Raises:
        SpecError: if there is no such architecture or setting, or it cannot look at images of this size.
        MissingDependencyError: if it needs timm, which is not installed.
    """
    settings = {"num_labels": config.n_classes}
    if config.timm is not None:
        if find_spec("timm") is None:
            raise MissingDependencyError(
                f"the student `{config.timm}` is one of timm, which is not installed", hint="pip install 'dla[timm]'"
            )
        settings |= {"architecture": config.timm, "model_args": config.settings}  # type: ignore[dict-item]
        return build_model(TIMM, settings, config.image_size)
    assert config.architecture is not None
    return build_model(config.architecture, settings | checked_settings(config, config.architecture), config.image_size)


def checked_settings(config: ClassifierConfig, architecture: str) -> dict[str, Any]:
    """The settings of a classifier and the size of its images, as fields of its transformers config.

    Raises:
        SpecError: if one is none of those, or the run's to decide.
    """
    known = settings_of(architecture)
    for name in config.settings:
        if name in DERIVED_SETTINGS:
            raise SpecError(
                f"`model.settings` names `{name}`, which the run and its data decide", hint="set `image_size` of the run"
            )
        if name not in known:
            raise SpecError(
                f"`{architecture}` has no setting `{name}`{did_you_mean(name, known)}",
                hint=f"settings: {', '.join(sorted(known - DERIVED_SETTINGS))}",
            )
    if "image_size" not in known:
        return config.settings
    is_one_number = isinstance(CONFIG_MAPPING[architecture]().image_size, int)
    return {"image_size": config.image_size if is_one_number else [config.image_size] * 2} | config.settings


def settings_of(architecture: str) -> set[str]:
    """The fields of an architecture's own transformers config.

    Raises:
        SpecError: if transformers has no such image classifier.
    """
    # Those of timm go by `timm`: their settings are not transformers'.
    architectures = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.keys() - {TIMM})
    if architecture not in architectures:
        raise SpecError(
            f"transformers has no image classifier `{architecture}`{did_you_mean(architecture, architectures)}",
            hint=f"there are {', '.join(architectures)}",
        )
    shared = {field.name for field in fields(PretrainedConfig)}
    own = {field.name for field in fields(CONFIG_MAPPING[architecture])}
    return {name for name in own - shared if not name.startswith("_")}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What an error says of names that are like one that is unknown."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f", did you mean {name_some(near)}?" if near else ""


def build_model(model_type: str, settings: Mapping[str, Any], image_size: int) -> PreTrainedModel:
    """The image classifier of a transformers config, tried on an image without numbers.

    Args:
        settings: fields of the config; `architectures` chooses where a config has several classes.

    Raises:
        SpecError: if they do not fit each other or the size of images.
    """
    settings = {"architectures": [], **settings}
    try:
        config = CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(settings)))
        return tried(model_class(config)._from_config(config), image_size)
    except (*MODEL_FAULTS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(
            f"`{model_type}` with these settings cannot look at images of {image_size} x {image_size} pixels:"
            f" {type(error).__name__}: {reason}",
            hint="change `model.settings` or `image_size`",
        ) from error


def model_class(config: PretrainedConfig) -> Any:
    """The image classifier that belongs to a config."""
    classes = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    if not isinstance(classes, tuple):
        return classes
    named = [one for one in classes if one.__name__ in (config.architectures or ())]
    return (named or classes)[0]


def tried(student: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The student, if it gives one image a logit a class."""
    logits = run_on_nothing(meta_copy(student), image_size).logits
    if logits.shape != (1, student.config.num_labels):
        raise ValueError(f"it puts out logits {list(logits.shape)}")
    return student


def uses_batch_statistics(student: nn.Module) -> bool:
    """Whether what an image gives depends, in training, on the others of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())
