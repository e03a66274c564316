"""MESSy: the student's CLS predicts what the teacher's blocks hold of each modality."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.spec import StrictModel
from trainer.heads import MessyTerm
from trainer.objectives.precision import at_least_float32


class MessyConfig(StrictModel):
    """Weight of the term and what is predicted; the defaults are the paper's for 12 blocks."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    layers: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)] = ((9, 9), (10, 10), (11, 11))
    """(student block, teacher block), counted from 0."""
    hidden: Annotated[int, Field(gt=0)] = 512
    """Hidden width of a head."""
    normalise_targets: bool = False
    """Whether targets are layer-normed; raw ones weigh by the teacher's scale."""


def pooled_targets(
    teacher_block_outputs: Sequence[Tensor], spans: Mapping[str, slice], terms: Iterable[MessyTerm]
) -> dict[MessyTerm, Tensor]:
    """For each term the mean over the modality's span of the teacher block, [B, D], without gradient.

    Args:
        teacher_block_outputs: [B, N, D] each, before the final norm.
        spans: modality → its tokens in the teacher's sequence.
    """
    return {
        term: at_least_float32(teacher_block_outputs[term.teacher_block][:, spans[term.modality]].detach()).mean(dim=1)
        for term in terms
    }


def messy_loss(
    predictions: Mapping[MessyTerm, Tensor], targets: Mapping[MessyTerm, Tensor], *, normalise_targets: bool = False
) -> Tensor:
    """Σ over terms of MSE(h(s[CLS]), mean over span of t); the mean is over images and D.

    Args:
        predictions: [B, D] each, any float dtype.
        targets: [B, D] each; detached here.
        normalise_targets: layer-norms each target over D, without learned scale.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if terms or shapes differ: a term that is on one side only must not drop out.

    Source: Sbrolli et al., arXiv:2606.08336, the MESSy loss.
    """
    if predictions.keys() != targets.keys() or not predictions:
        raise ValueError(f"predictions of {sorted(predictions)} and targets of {sorted(targets)}")
    losses = []
    for term, prediction in predictions.items():
        target = at_least_float32(targets[term].detach())
        if prediction.shape != target.shape:
            raise ValueError(f"`{term}` predicts shape {tuple(prediction.shape)} of {tuple(target.shape)}")
        if normalise_targets:
            target = functional.layer_norm(target, target.shape[-1:])
        losses.append(functional.mse_loss(at_least_float32(prediction), target))
    return torch.stack(losses).sum()
