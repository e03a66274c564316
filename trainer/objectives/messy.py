"""MESSy: the student predicts from its CLS, or its image tokens, what the teacher's blocks hold of each modality."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.features import CLS, IMAGE, Layer, Target, resolve_layer
from trainer.heads import MessyHeads, MessyTerm, Reading, reading_of
from trainer.objectives.distances import TEMPERATURE, Distance, distance_between
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.precision import at_least_float32


class MessyConfig(TermConfig):
    """Weight of the term and what is predicted; the defaults are the paper's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    layers: Annotated[tuple[tuple[Layer, Layer], ...], Field(min_length=1)] = (
        (0.83, 0.83),
        (0.91, 0.91),
        (1.0, 1.0),
    )
    """(student block, teacher block), each counted from 0, a fraction of the depth at which it ends, or a name. The
    default is the paper's blocks 9, 10 and 11 of 12; pairs that fall together in a shallow model count once."""
    spans: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """What is predicted of the teacher: modalities, `image` or `cls`; all of its modalities when absent."""
    what: Literal["pooled", "tokens"] = "pooled"
    """What of a span: its mean; or, of `spans: [image]`, each token, predicted from the student's image tokens."""
    read: Reading | None = None
    """What a head sees of the student's block: `cls`, `pooled` (the mean of the image tokens), or `spatial` (what a
    learned query picks of these). When absent `cls`, or `pooled` of a student without one."""
    hidden: Annotated[int, Field(gt=0)] = 512
    """Hidden width of a head."""
    normalise_targets: bool = False
    """Whether targets are layer-normed; raw ones weigh by the teacher's scale."""
    distance: Distance = "mse"
    """Between prediction and target: `mse` is the paper's; `smooth_l1`; `cosine`, blind to the target's scale; or
    `infonce`, which asks which of the batch's targets is the image's own, so that batches are no longer sums of their
    parts: processes and `loop.accumulation` change what it is."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = TEMPERATURE
    """Of `infonce`."""

    @model_validator(mode="after")
    def _tokens_are_of_the_image(self) -> Self:
        if self.what == "tokens" and (self.spans not in (None, (IMAGE,)) or self.read is not None):
            raise ValueError(
                "`what: tokens` goes from image tokens to image tokens: leave `read` out, and `spans` or `[image]`"
            )
        return self

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(chain.from_iterable(messy_targets(self, reference.names, reference.spans))))

    def build(self, parties: Parties) -> Objective:
        return Messy(self, parties)


class Messy(Objective):
    """A head for each layer pair and each span that it predicts; see `messy_loss`."""

    def __init__(self, config: MessyConfig, parties: Parties) -> None:
        super().__init__()
        student, reference = parties.student, parties.teacher()
        terms = messy_terms(config, student.names, messy_targets(config, reference.names, reference.spans))
        self.config = config
        self.heads = MessyHeads(
            terms,
            list(student.blocks.values()),
            {term.target: reference.width(term.target.block) for term in terms},
            hidden=config.hidden,
            read=reading_of(config.read, student.spans, "messy"),
        )

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        return messy_loss(
            self.heads(inputs.student),
            inputs.targets,
            normalise_targets=self.config.normalise_targets,
            distance=self.config.distance,
            temperature=self.config.temperature,
        )


def messy_targets(config: MessyConfig, teacher_blocks: Sequence[str], spans: Sequence[str]) -> list[list[Target]]:
    """What is predicted: for each layer pair a target for each span.

    Args:
        teacher_blocks: names of the blocks of what the student learns from, in their order.
        spans: of what it learns from: `cls`, `image`, modalities.

    Raises:
        SpecError: if there is no latent to predict, or no such span or layer.
    """
    modalities = [span for span in spans if span not in (CLS, IMAGE)]
    wanted = config.spans or ((IMAGE,) if config.what == "tokens" else modalities)
    if not wanted:
        raise SpecError(
            "`messy` predicts what a teacher makes of latents, and the run in `teacher` is not one that sees any",
            hint="train one with `kind: teacher`, drop `messy` from the objective, or predict its image tokens with"
            " `spans: [image]`",
        )
    unknown = [span for span in wanted if span not in spans]
    if unknown:
        raise SpecError(
            f"`messy.spans` names `{unknown[0]}`, the teacher has {', '.join(f'`{span}`' for span in spans) or 'none'}",
            hint="name one of those",
        )
    blocks = [resolve_layer(teacher, teacher_blocks, "teacher") for _, teacher in config.layers]
    return [[Target(config.what, span, block) for span in wanted] for block in blocks]


def messy_terms(
    config: MessyConfig, student_blocks: Sequence[str], targets: Sequence[Sequence[Target]]
) -> tuple[MessyTerm, ...]:
    """A term for each of the `messy_targets` of each layer pair; those that fall together once.

    Args:
        student_blocks: names of the student's blocks, in their order.

    Raises:
        SpecError: if the student has no such layer.
    """
    blocks = [resolve_layer(student, student_blocks, "student") for student, _ in config.layers]
    return tuple(
        dict.fromkeys(
            MessyTerm(block, target) for block, of_layer in zip(blocks, targets, strict=True) for target in of_layer
        )
    )


def messy_loss(
    predictions: Mapping[MessyTerm, Tensor],
    targets: Mapping[Target, Tensor],
    *,
    normalise_targets: bool = False,
    distance: Distance = "mse",
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Σ over terms of MSE(h(s[CLS]), mean over span of t), or another distance; its mean is over images, D and tokens.

    Args:
        predictions: [B, D] each, any float dtype; of tokens [B, N, D], then resized to the target's tokens.
        targets: [B, D] or [B, N, D] each, at least those of the predictions; detached here.
        normalise_targets: layer-norms each target over D, without learned scale.
        distance: see `distance_between`.
        temperature: of `infonce`.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if there is no prediction, a target is missing, or shapes differ.

    Source: Sbrolli et al., arXiv:2606.08336, the MESSy loss.
    """
    if not predictions or not {term.target for term in predictions} <= targets.keys():
        raise ValueError(f"predictions of {sorted(predictions)} and targets of {sorted(targets)}")
    losses = []
    for term, prediction in predictions.items():
        target = at_least_float32(targets[term.target].detach())
        if term.target.what == "tokens":
            prediction = resize_tokens(prediction, target.shape[1])
        if normalise_targets:
            target = functional.layer_norm(target, target.shape[-1:])
        losses.append(distance_between(prediction, target, distance, temperature))
    return torch.stack(losses).sum()


def resize_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """Tokens [B, N, D] of a square grid as [B, n_tokens, D] of another, bilinear; float32 or wider.

    Raises:
        ValueError: if one of the grids is no square.
    """
    sides = math.isqrt(tokens.shape[1]), math.isqrt(n_tokens)
    if sides[0] ** 2 != tokens.shape[1] or sides[1] ** 2 != n_tokens:
        raise ValueError(f"{tokens.shape[1]} or {n_tokens} tokens are no square grid")
    if sides[0] == sides[1]:
        return at_least_float32(tokens)
    grid = at_least_float32(tokens).transpose(1, 2).reshape(len(tokens), -1, sides[0], sides[0])
    grid = functional.interpolate(grid, (sides[1], sides[1]), mode="bilinear", antialias=sides[1] < sides[0])
    return grid.flatten(2).transpose(1, 2)
