"""Cross entropy on the images that have a label: one class, or any number of them."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.spec import StrictModel
from trainer.precision import at_least_float32


class CeConfig(StrictModel):
    """Weight of the cross entropy; the default is the paper's a."""

    weight: Annotated[float, Field(gt=0)] = 0.25


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Mean over labelled images of -log softmax(z)[y]; None for a batch without a label.

    Of images with several labels each class is a question of its own: the mean over labelled images and classes of
    -y·log p - (1 - y)·log(1 - p) with p = sigmoid(z), as transformers' `multi_label_classification` has it.

    None rather than 0: the term has nothing to say, and a 0 without gradient would look like a term
    that is cut off.

    Args:
        logits: [B, K], any float dtype.
        labels: int64 [B], -1 for no label; or [B, K] of 0 and 1, -1 all along for no label.

    Returns:
        [], float32 or wider.
    """
    labelled = has_label(labels)
    if not bool(labelled.any()):
        return None
    answers, labels = at_least_float32(logits[labelled]), labels[labelled]
    if labels.ndim == 2:
        return functional.binary_cross_entropy_with_logits(answers, labels.to(answers.dtype))
    return functional.cross_entropy(answers, labels)


def has_label(labels: Tensor) -> Tensor:
    """Which images have one, bool [B], for labels [B] or [B, K]."""
    return (labels if labels.ndim == 1 else labels[:, 0]) >= 0
