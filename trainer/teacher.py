"""The DLA teacher: a transformer over an image and undecoded latents in one sequence.

Dimensions: B images, N tokens of the sequence, M tokens a modality, b bottleneck tokens, D width, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dla_cache.errors import TrainingError
from dla_cache.spec import LatentFormat
from trainer.adapters import LatentScaler, ModalityEncoder, check_modalities
from trainer.backbone import Backbone, BackboneConfig
from trainer.blocks import NORM_EPS, Block
from trainer.features import CLS, IMAGE
from trainer.fusion import Fusion, StreamBlocks, StreamHeads, mean_of_present, streams_of
from trainer.pretrained import PretrainedFacts
from trainer.probe import LatentClassifier, ProbeConfig
from trainer.trunk import TrunkConfig

N_BOTTLENECKS = 4
"""Source: arXiv:2107.00135, section 4.3."""


class TeacherConfig(TrunkConfig):
    """Shape of a teacher; the defaults are the published ViT-B/16, `formats` aside."""

    formats: dict[str, LatentFormat]
    """Format of each modality, raw as the store holds it; empty for a teacher that sees only images."""
    modalities: tuple[str, ...]
    """Order of the modalities in the sequence; that of `formats` when absent. A field of its own,
    since a mapping may come back from a file in another order and the positions are learned."""
    backbone: BackboneConfig | None = None
    """An image model in the place of patches: its last tokens, or places of its last map, are the image's tokens, and
    `patch_size` counts for nothing."""
    fusion: Fusion = "early"
    """Where image and latents meet. `early`, the paper's: in every block, as one sequence. `bottleneck`: each has
    blocks of its own, and from block `bottleneck_from` on they share `n_bottlenecks` tokens. `late`: each has blocks
    and a classifier of its own, and the logits are averaged."""
    n_bottlenecks: Annotated[int, Field(gt=0)] | None = None
    """Of `bottleneck` fusion: how many tokens are shared; 4 when absent, as in arXiv:2107.00135."""
    bottleneck_from: Annotated[int, Field(ge=0)] | None = None
    """Of `bottleneck` fusion: the first block, counted from 0, that shares tokens, two before the end at the latest;
    at two thirds of the depth when absent, which is 8 of 12, as in arXiv:2107.00135."""
    tokens_per_modality: Annotated[int, Field(gt=0)] = 100
    resampler_heads: Annotated[int, Field(gt=0)] = 8
    modality_dropout: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Probability that a modality of a training image becomes null tokens; the image never does."""
    standardise: bool = False
    """Whether latents are standardised per channel before anything else sees them."""
    late_fusion: bool = False
    """Whether an MLP on the latents alone votes beside the transformer, whatever `fusion` that has."""
    late_fusion_hidden: Annotated[int, Field(gt=0)] = 256
    late_fusion_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    late_fusion_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the late branch in the answer; the transformer has the rest."""

    @model_validator(mode="before")
    @classmethod
    def _order_from_formats(cls, value: Any) -> Any:
        if isinstance(value, dict) and "modalities" not in value and isinstance(value.get("formats"), dict):
            return {**value, "modalities": tuple(value["formats"])}
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if sorted(self.modalities) != sorted(self.formats):
            raise ValueError(f"`modalities` orders {list(self.modalities)}, `formats` has {sorted(self.formats)}")
        if self.width % self.resampler_heads:
            raise ValueError(f"`width` {self.width} is no multiple of `resampler_heads` {self.resampler_heads}")
        if self.late_fusion and not self.standardise:
            raise ValueError("`late_fusion` reads standardised latents: set `standardise`")
        if self.late_fusion and not self.formats:
            raise ValueError("`late_fusion` needs a modality")
        if self.fusion != "early" and not self.formats:
            raise ValueError(f"`fusion: {self.fusion}` needs a modality to fuse with the image")
        if self.fusion != "bottleneck" and (self.n_bottlenecks, self.bottleneck_from) != (None, None):
            raise ValueError("`n_bottlenecks` and `bottleneck_from` belong to `fusion: bottleneck`")
        if self.fusion == "bottleneck" and not 0 <= self.first_shared_block <= self.depth - 2:
            raise ValueError(
                f"`bottleneck_from` is {max(0, self.first_shared_block)} of `depth` {self.depth}: what one block writes"
                " into the shared tokens the next one reads, so two blocks at least must share them"
            )
        return self

    @property
    def has_patches(self) -> bool:
        return self.backbone is None

    @property
    def first_shared_block(self) -> int:
        """The first block that shares bottleneck tokens."""
        return min(self.depth * 2 // 3, self.depth - 2) if self.bottleneck_from is None else self.bottleneck_from


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """What a teacher says of a batch, and what its blocks hold."""

    logits: Tensor
    """[B, K]. With late fusion the weighted mean of both branches' logits, else the transformer's."""
    block_outputs: tuple[Tensor, ...]
    """[B, N, D] of each block, before the final norm."""
    branch_logits: dict[str, Tensor]
    """[B, K] of each branch: `fused`, the transformer that mixes image and latents in one sequence,
    and with late fusion `late`, the MLP on latents alone."""


class Teacher(nn.Module):
    """`[CLS] image [SEP] modality [SEP] modality ...` through pre-norm blocks to a head on CLS.

    Positions, null tokens and the sequence are the same whatever the `fusion`, see `trainer.fusion`. Where the sequence
    falls into streams, the first token of each is classified and the logits are averaged over the image and those
    modalities that are there: with bottlenecks by one head, with late fusion each stream by its own.
    """

    def __init__(self, config: TeacherConfig, pretrained: PretrainedFacts | None = None) -> None:
        """Freshly initialised, its backbone too: see `load_backbone`.

        Args:
            pretrained: of the backbone's weights, if it has any.

        Raises:
            SpecError: if the backbone is no image model, or cannot take the images of the run.
        """
        super().__init__()
        self.config = config
        width = config.width
        if config.backbone is None:
            self.patch_embedding = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size)
            self.n_image_tokens = config.n_patches
        else:
            self.backbone = Backbone(config.backbone, pretrained, image_size=config.image_size, width=width)
            self.n_image_tokens = self.backbone.n_tokens
        self.class_token = nn.Parameter(torch.empty(width))
        self.separator = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(self.sequence_length, width))
        for token, std in ((self.class_token, 0.02), (self.separator, 0.02), (self.positions, config.position_std)):
            nn.init.trunc_normal_(token, std=std)
        self.scalers = nn.ModuleDict(
            {name: LatentScaler(config.formats[name]) for name in config.modalities if config.standardise}
        )
        self.encoders = nn.ModuleDict({name: self._encoder(name) for name in config.modalities})
        self.dropout = nn.Dropout(config.dropout)
        # Built one by one: nn.TransformerEncoder copies one layer, so all would start equal.
        streams = streams_of(self.spans)
        self.blocks = nn.ModuleList(
            self._block() if config.fusion == "early" else StreamBlocks(streams, self._block)
            for _ in range(config.depth)
        )
        if config.fusion == "bottleneck":
            self.bottlenecks = nn.Parameter(torch.empty(config.n_bottlenecks or N_BOTTLENECKS, width))
            nn.init.trunc_normal_(self.bottlenecks, std=0.02)
        if config.fusion == "late":
            self.stream_heads = StreamHeads(tuple(streams), width, config.n_classes)
        else:
            self.norm = nn.LayerNorm(width, eps=NORM_EPS)
            self.head = nn.Linear(width, config.n_classes)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.late_branch: LatentClassifier | None = None
        if config.late_fusion:
            self.late_branch = LatentClassifier(
                ProbeConfig(
                    n_classes=config.n_classes,
                    formats=config.formats,
                    hidden=config.late_fusion_hidden,
                    dropout=config.late_fusion_dropout,
                )
            )

    def _encoder(self, modality: str) -> ModalityEncoder:
        return ModalityEncoder(
            self.config.formats[modality],
            self.config.width,
            tokens_per_modality=self.config.tokens_per_modality,
            n_heads=self.config.resampler_heads,
            dropout=self.config.dropout,
            position_std=self.config.position_std,
        )

    def _block(self) -> Block:
        config = self.config
        return Block(config.width, config.n_heads, mlp_ratio=config.mlp_ratio, dropout=config.dropout)

    @property
    def spans(self) -> dict[str, slice]:
        """Where CLS, the image and each modality lie in the sequence; separators belong to none."""
        stop = 1 + self.n_image_tokens
        spans = {CLS: slice(0, 1), IMAGE: slice(1, stop)}
        for name in self.config.modalities:
            spans[name] = slice(stop + 1, stop + 1 + self.config.tokens_per_modality)
            stop = spans[name].stop
        return spans

    @property
    def widths(self) -> dict[str, int]:
        """D of each block, by its module's name."""
        return {f"blocks.{number}": self.config.width for number in range(self.config.depth)}

    @property
    def sequence_length(self) -> int:
        """Tokens in the sequence, CLS and separators included."""
        return 1 + self.n_image_tokens + len(self.config.modalities) * (1 + self.config.tokens_per_modality)

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Takes the per-channel mean and standard deviation [C] of the training splits.

        Raises:
            TrainingError: if this teacher does not standardise `modality`.
        """
        if modality not in self.scalers:
            raise TrainingError(f"the teacher does not standardise `{modality}`", hint="set `standardise: true`")
        scaler: LatentScaler = self.scalers[modality]  # type: ignore[assignment]
        scaler.set_statistics(mean, std)

    def load_backbone(self) -> None:
        """Gives a pretrained backbone its weights.

        Raises:
            SpecError: if they are not there, or may not be loaded.
        """
        if self.config.backbone is not None:
            self.backbone.load()

    def forward(
        self,
        pixels: Tensor,
        raw_latents: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        present: Mapping[str, bool] | None = None,
    ) -> TeacherOutput:
        """Logits and block outputs of a batch.

        In training each modality of each image is dropped with probability `modality_dropout`. A
        dropped, absent or wholly padded modality is its learned null tokens to the transformer and 0
        to the late branch; a stream of null tokens has no vote.

        The branches' logits are averaged. Softmax makes of the mean the normalised product of both
        distributions, weighted, so a class must be plausible to both; a sigmoid does so class by class.

        Args:
            pixels: [B, 3, H, W] float, normalised.
            raw_latents: modality → [B, *shape] as stored: any float dtype, or integer codes.
            masks: modality → boolean [B, n], true where a latent token is real; none means all are.
            present: modality → false to leave it out of all images; its latent need not be given.

        Raises:
            TrainingError: if a modality is unknown, or missing and not left out.
            LatentShapeError: if a latent does not fit its format.
        """
        masks = masks or {}
        latents = self._scaled(raw_latents, present)
        kept = self._kept(pixels, latents, masks)
        tokens = self.dropout(self._content(pixels, latents, masks, kept) + self.positions)
        block_outputs = self._block_outputs(tokens)
        fused = self._answer(block_outputs[-1], kept)
        if self.late_branch is None:
            return TeacherOutput(fused, tuple(block_outputs), {"fused": fused})
        late = self.late_branch(latents, masks, kept)
        logits = torch.lerp(fused.float(), late.float(), self.config.late_fusion_weight)
        return TeacherOutput(logits, tuple(block_outputs), {"fused": fused, "late": late})

    def _block_outputs(self, tokens: Tensor) -> list[Tensor]:
        outputs, shared = [], None
        for number, block in enumerate(self.blocks):
            if self.config.fusion == "early":
                tokens = block(tokens)
            else:
                if self.config.fusion == "bottleneck" and number == self.config.first_shared_block:
                    shared = self.bottlenecks.expand(len(tokens), -1, -1)
                tokens, shared = block(tokens, shared)
            outputs.append(tokens)
        return outputs

    def _answer(self, tokens: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, K] of the last block's output [B, N, D]."""
        if self.config.fusion == "early":
            answer: Tensor = self.head(self.norm(tokens[:, 0]))
            return answer
        classes = {name: tokens[:, span.start] for name, span in streams_of(self.spans).items()}
        if self.config.fusion == "late":
            return mean_of_present(self.stream_heads(classes), kept)
        return mean_of_present({name: self.head(self.norm(first)) for name, first in classes.items()}, kept)

    def _scaled(self, raw_latents: Mapping[str, Tensor], present: Mapping[str, bool] | None) -> dict[str, Tensor]:
        wanted = check_modalities(self.config.modalities, raw_latents, present)
        return {
            name: self.scalers[name](raw_latents[name]) if name in self.scalers else raw_latents[name]
            for name in wanted
        }

    def _kept(self, pixels: Tensor, latents: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {}
        for name in self.config.modalities:
            is_kept = pixels.new_full((len(pixels),), name in latents, dtype=torch.bool)
            if self.training:
                is_kept &= torch.rand(len(pixels), device=pixels.device) >= self.config.modality_dropout
            kept[name] = is_kept & masks[name].any(dim=1) if name in masks else is_kept
        return kept

    def _content(
        self,
        pixels: Tensor,
        latents: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
    ) -> Tensor:
        """The sequence [B, N, D] before positions are added."""
        n_images, width = len(pixels), self.config.width
        parts = [self.class_token.expand(n_images, 1, width), self._image_tokens(pixels)]
        for name in self.config.modalities:
            encoder: ModalityEncoder = self.encoders[name]  # type: ignore[assignment]
            parts.append(self.separator.expand(n_images, 1, width))
            if name in latents:
                parts.append(encoder(latents[name], masks.get(name), kept[name]))
            else:
                parts.append(encoder.null_tokens.expand(n_images, -1, -1))
        return torch.cat(parts, dim=1)

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        if self.config.backbone is not None:
            tokens: Tensor = self.backbone(pixels)
            return tokens
        patches: Tensor = self.patch_embedding(pixels)
        return patches.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def position_to_content(self, pixels: Tensor, raw_latents: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean norm of the positions over mean norm of the tokens they are added to, for each span.

        Well below 1 the model hardly knows where a token lies, and learns slowly or not at all.
        """
        latents = self._scaled(raw_latents, None)
        kept = {name: pixels.new_ones(len(pixels), dtype=torch.bool) for name in latents}
        content = self._content(pixels, latents, {}, kept).norm(dim=-1)
        positions = self.positions.norm(dim=-1)
        spans = {name: span for name, span in self.spans.items() if name != CLS}
        return {name: float(positions[span].mean() / content[:, span].mean()) for name, span in spans.items()}
