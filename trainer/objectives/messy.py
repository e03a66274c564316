"""MESSy: the student's CLS predicts what the teacher's blocks hold of each modality."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError
from dla_cache.spec import StrictModel
from trainer.features import CLS, IMAGE, Layer, Target, resolve_layer
from trainer.heads import MessyTerm
from trainer.precision import at_least_float32


class MessyConfig(StrictModel):
    """Weight of the term and what is predicted; the defaults are the paper's for 12 blocks."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    layers: Annotated[tuple[tuple[Layer, Layer], ...], Field(min_length=1)] = ((9, 9), (10, 10), (11, 11))
    """(student block, teacher block), each counted from 0, a fraction of the depth, or a name."""
    spans: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """What is predicted of the teacher: modalities, `image` or `cls`; all of its modalities when absent."""
    hidden: Annotated[int, Field(gt=0)] = 512
    """Hidden width of a head."""
    normalise_targets: bool = False
    """Whether targets are layer-normed; raw ones weigh by the teacher's scale."""


def messy_targets(config: MessyConfig, teacher_blocks: Sequence[str], spans: Sequence[str]) -> list[list[Target]]:
    """What is predicted: for each layer pair a target for each span.

    Args:
        teacher_blocks: names of the blocks of what the student learns from, in their order.
        spans: of what it learns from: `cls`, `image`, modalities.

    Raises:
        SpecError: if there is no latent to predict, or no such span or layer.
    """
    modalities = [span for span in spans if span not in (CLS, IMAGE)]
    wanted = modalities if config.spans is None else config.spans
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
    return [[Target("pooled", span, block) for span in wanted] for block in blocks]


def messy_terms(
    config: MessyConfig, student_blocks: Sequence[str], targets: Sequence[Sequence[Target]]
) -> tuple[MessyTerm, ...]:
    """A term for each of the `messy_targets` of each layer pair.

    Args:
        student_blocks: names of the student's blocks, in their order.

    Raises:
        SpecError: if the student has no such layer.
    """
    blocks = [resolve_layer(student, student_blocks, "student") for student, _ in config.layers]
    return tuple(
        MessyTerm(block, target) for block, of_layer in zip(blocks, targets, strict=True) for target in of_layer
    )


def messy_loss(
    predictions: Mapping[MessyTerm, Tensor], targets: Mapping[Target, Tensor], *, normalise_targets: bool = False
) -> Tensor:
    """Σ over terms of MSE(h(s[CLS]), mean over span of t); the mean is over images and D.

    Args:
        predictions: [B, D] each, any float dtype.
        targets: [B, D] each, at least those of the predictions; detached here.
        normalise_targets: layer-norms each target over D, without learned scale.

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
        if prediction.shape != target.shape:
            raise ValueError(f"`{term}` predicts shape {tuple(prediction.shape)} of {tuple(target.shape)}")
        if normalise_targets:
            target = functional.layer_norm(target, target.shape[-1:])
        losses.append(functional.mse_loss(at_least_float32(prediction), target))
    return torch.stack(losses).sum()
