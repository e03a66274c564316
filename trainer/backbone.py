"""An image model of transformers in the place of a teacher's patches.

Dimensions: B images, S side of an image, N tokens of the image, C channels of what the model says last, D width.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING

from dla_cache.errors import SpecError, name_some
from dla_cache.spec import StrictModel, parse_spec
from trainer.blocks import NORM_EPS
from trainer.pretrained import (
    PretrainedFacts,
    check_pixels,
    config_of_fields,
    load_pretrained,
    make_config,
    read_pretrained,
    told_as_spec_error,
)


class BackboneConfig(StrictModel):
    """Which image model of transformers: a pretrained one, or one from scratch by its settings."""

    pretrained: str | None = None
    """Folder, relative to the run file, or repository of the hub that `dla sources fetch` has fetched."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    architecture: str | None = None
    """Of a model from scratch, as transformers names it: `vit`, `deit`, `dinov2`, `swin`, `convnext`, `resnet`, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of its config."""
    freeze: bool = False
    """Whether pretrained weights stay as they are: no gradient, no dropout, no new batch statistics."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.pretrained is None) == (self.architecture is None):
            raise ValueError("a backbone has `pretrained` weights or an `architecture` from scratch: name one")
        if self.pretrained is not None and self.settings:
            raise ValueError("`settings` are of an `architecture` from scratch: a pretrained backbone brings its own")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("`revision` is of a `pretrained` backbone")
        if self.architecture is not None and self.freeze:
            raise ValueError("`freeze` is of a `pretrained` backbone: one from scratch would never learn anything")
        return self


def backbone_in(model: Mapping[str, Any]) -> BackboneConfig | None:
    """The backbone that `model` of a run file speaks of, if it has one.

    Raises:
        SpecError: if it is not said right.
    """
    said = model.get("backbone")
    return None if said is None else parse_spec(said, BackboneConfig, where="model.backbone")


def pretrained_backbone(model: Mapping[str, Any]) -> PretrainedFacts | None:
    """What the pretrained weights are that `model` of a run file names; None if it names none.

    Raises:
        SpecError: if they are not there, or may not be loaded.
    """
    backbone = backbone_in(model)
    if backbone is None or backbone.pretrained is None:
        return None
    return read_pretrained(backbone.pretrained, backbone.revision)


def check_backbone_pixels(
    model: Mapping[str, Any], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """Refuses pixels of another scale than those that a pretrained backbone was trained on, see `check_pixels`."""
    backbone = backbone_in(model)
    if backbone is not None and backbone.pretrained is not None:
        check_pixels(backbone.pretrained, backbone.revision, mean, std)


class Backbone(nn.Module):
    """What an image model says last, token by token or place by place, layer-normed and projected to D.

    All of its tokens are taken, class, distillation and register tokens too; a map's places row by row.
    """

    def __init__(self, config: BackboneConfig, facts: PretrainedFacts | None, *, image_size: int, width: int) -> None:
        """Freshly initialised; `load` brings the trained weights, or a checkpoint does.

        Args:
            facts: of pretrained weights, which say what model it is.

        Raises:
            SpecError: if it is no image model, cannot take the images of the run, or answers differently each time.
        """
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.model = build_image_model(config, facts, image_size)
        self.n_tokens, n_channels = self._measure()
        self.norm = nn.LayerNorm(n_channels, eps=NORM_EPS)
        self.project = nn.Linear(n_channels, width)
        if config.freeze:
            self.model.requires_grad_(False)

    @torch.no_grad()
    def _measure(self) -> tuple[int, int]:
        """N and C, of a grey image."""
        self.model.eval()
        before = torch.get_rng_state()
        like = next(self.model.parameters())
        pixels = torch.zeros(1, 3, self.image_size, self.image_size, device=like.device)
        fact = f"`{type(self.model).__name__}` cannot be a backbone for images of {self.image_size} pixels"
        with told_as_spec_error(fact):
            tokens = tokens_of_image(self.model(pixel_values=pixels).last_hidden_state)
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise SpecError(
                f"`{type(self.model).__name__}` draws random numbers even where nothing is trained",
                hint="take the image classifier of that family, as `vit` for `vit_mae`",
            )
        return tokens.shape[1], tokens.shape[2]

    def load(self) -> None:
        """Takes the trained weights that the config names; a model from scratch stays as it is.

        Raises:
            SpecError: see `load_pretrained`.
        """
        if self.config.pretrained is not None:
            kind = type(self.model)
            trained = load_pretrained(self.config.pretrained, self.config.revision, kind, **without_pooler(kind))
            self.model.load_state_dict(trained.state_dict())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.config.freeze:
            self.model.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens [B, N, D] of normalised pixels [B, 3, S, S]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze):
            tokens = tokens_of_image(self.model(pixel_values=pixels).last_hidden_state)
        projected: Tensor = self.project(self.norm(tokens))
        return projected


def tokens_of_image(features: Tensor) -> Tensor:
    """Tokens [B, N, C] as they are; of a map [B, C, h, w] its places, row by row.

    Raises:
        ValueError: if it is neither.
    """
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    if features.dim() != 3:
        raise ValueError(f"its last hidden state has shape {tuple(features.shape)}: neither tokens nor a map")
    return features


def build_image_model(config: BackboneConfig, facts: PretrainedFacts | None, image_size: int) -> nn.Module:
    """The model with fresh weights, without its pooler: nothing here would reach that.

    Raises:
        SpecError: if there is no such image model.
    """
    mapping: Mapping[type[PreTrainedConfig], Any] = MODEL_FOR_IMAGE_MAPPING
    if config.architecture is not None:
        own = make_config(config.architecture, config.settings, mapping, "model.backbone", image_size=image_size)
    else:
        assert facts is not None
        own = config_of_fields(facts.config)
    if type(own) not in mapping:
        names = sorted({known.model_type for known in mapping})
        raise SpecError(
            f"`{config.pretrained}` is a `{own.model_type}`, which is no image model",
            hint=f"take one of {name_some(names, shown=60)}",
        )
    kind = mapping[type(own)]
    with told_as_spec_error(f"a `{own.model_type}` cannot be built"):
        model: nn.Module = kind(own, **without_pooler(kind))
    return model


def without_pooler(kind: type[nn.Module]) -> dict[str, Any]:
    """What a class of image models wants said to have no pooler."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
