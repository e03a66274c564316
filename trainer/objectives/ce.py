"""Cross entropy on the images that have a label."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.spec import StrictModel
from trainer.objectives.precision import at_least_float32


class CeConfig(StrictModel):
    """Weight of the cross entropy; the default is the paper's a."""

    weight: Annotated[float, Field(gt=0)] = 0.25


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Mean over labelled images of -log softmax(z)[y]; None for a batch without a label.

    None rather than 0: the term has nothing to say, and a 0 without gradient would look like a term
    that is cut off.

    Args:
        logits: [B, K], any float dtype.
        labels: [B] int64; -1 means no label.

    Returns:
        [], float32 or wider.
    """
    labelled = labels >= 0
    if not bool(labelled.any()):
        return None
    return functional.cross_entropy(at_least_float32(logits[labelled]), labels[labelled])
