"""Cross entropy on the images that have a label: one class, or any number of them; and what evens out rare classes.

Dimensions: B images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError
from dla_cache.spec import StrictModel
from trainer.precision import at_least_float32

EFFECTIVE_BETA = 0.9999
"""Of the effective number of images, as Cui et al. set it for large data sets."""


class LabelConfig(StrictModel):
    """How a run of any kind learns its labels; the defaults are the plain cross entropy."""

    class_weights: Literal["none", "balanced", "effective"] = "none"
    """Weight of an image by its class, in the mean over images. `balanced`: images over classes times images of the
    class, as scikit-learn has it; of several labels an image, negatives over positives for the positives of a class.
    `effective`: one over the effective number of images, with a mean of 1 over classes."""
    logit_adjustment: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Times the log of a class's share of the labelled images, added to its logit while training, so that the bare
    logits are fair to rare classes; 1 is the paper's tau, 0 off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label that is spread over all classes alike."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What `LabelConfig` comes to with the labels of a run."""

    weights: Tensor | None = None
    """[K], of an image by its class; of several labels an image, of the positives of a class."""
    offsets: Tensor | None = None
    """[K], added to logits while training; -inf for a class without an image, which then takes no part."""
    label_smoothing: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self.weights is None and self.offsets is None and not self.label_smoothing

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted cross entropy of each labelled image, [B]; over several labels their mean."""
        weights = None if self.weights is None else self.weights.to(logits)
        if labels.ndim == 2:
            answers = functional.binary_cross_entropy_with_logits
            return answers(logits, labels.to(logits.dtype), pos_weight=weights, reduction="none").mean(dim=1)
        return functional.cross_entropy(
            logits, labels, weight=weights, reduction="none", label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True, slots=True)
class MixedLabels:
    """Whose labels count for images that are mixed of two."""

    partner: Tensor
    """The other image's labels, of the shape of the labels."""
    share: Tensor
    """[B], of the image's own label; 1 where it is not mixed."""

    def to(self, device: str) -> "MixedLabels":
        """The same on a device."""
        return MixedLabels(self.partner.to(device), self.share.to(device))


PLAIN = Balance()


def balance_of(config: LabelConfig, class_counts: Sequence[int], n_images: int, *, is_multi_label: bool) -> Balance:
    """The weights and offsets for a run whose labelled split has so many images of each class.

    A class without an image gets weight 0.

    Args:
        n_images: labelled images, which is not the sum of the counts where they have several classes.

    Raises:
        SpecError: if the config asks for what is not defined for these labels.

    Source: effective number of images: Cui et al., arXiv:1901.05555, equations 2 to 4, normalised as in its section
    4; logit adjustment: Menon et al., arXiv:2007.07314, equation 10.
    """
    asked = [name for name in ("logit_adjustment", "label_smoothing") if getattr(config, name)]
    asked += ["class_weights"] if config.class_weights == "effective" else []
    if is_multi_label and asked:
        raise SpecError(
            f"`ce.{asked[0]}` is of images with one class, and images of this store may have several",
            hint="`ce: {class_weights: balanced}` is there for them",
        )
    if config.logit_adjustment and config.label_smoothing and 0 in class_counts:
        raise SpecError(
            "`ce.label_smoothing` gives a share to classes without an image, which `ce.logit_adjustment` takes out",
            hint="set one of them to 0",
        )
    counts = torch.tensor(class_counts, dtype=torch.float64)
    offsets = config.logit_adjustment * (counts / n_images).log() if config.logit_adjustment else None
    return Balance(_weights(config, counts, n_images, is_multi_label), offsets, config.label_smoothing)


def _weights(config: LabelConfig, counts: Tensor, n_images: int, is_multi_label: bool) -> Tensor | None:
    if config.class_weights == "none":
        return None
    is_there, some = counts > 0, counts.clamp(min=1)
    if is_multi_label:
        # A class that every image has: nothing stands against its positives.
        weights = torch.where(counts < n_images, (n_images - counts) / some, 1.0)
    elif config.class_weights == "balanced":
        weights = n_images / (is_there.sum() * some)
    else:
        weights = (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**some)
        weights = weights * is_there.sum() / weights[is_there].sum()
    return weights * is_there


def cross_entropy(
    logits: Tensor, labels: Tensor, balance: Balance = PLAIN, mixed: MixedLabels | None = None
) -> Tensor | None:
    """Mean over labelled images of -log softmax(z)[y]; None for a batch without a label.

    Of images with several labels each class is a question of its own: the mean over labelled images and classes of
    -y·log p - (1 - y)·log(1 - p) with p = sigmoid(z), as transformers' `multi_label_classification` has it.

    None rather than 0: the term has nothing to say, and a 0 without gradient would look like a term
    that is cut off. The mean of weighted losses is over images, not over their weights: so the mean over parts of a
    batch is that of the batch.

    Args:
        logits: [B, K], any float dtype.
        labels: int64 [B], -1 for no label; or [B, K] of 0 and 1, -1 all along for no label.
        mixed: of images that are mixed: the loss is share·CE(y) + (1 - share)·CE(y of the partner).

    Returns:
        [], float32 or wider.
    """
    labelled = has_label(labels)
    if not bool(labelled.any()):
        return None
    answers, labels = at_least_float32(logits[labelled]), labels[labelled]
    if balance.is_plain and mixed is None:
        if labels.ndim == 2:
            return functional.binary_cross_entropy_with_logits(answers, labels.to(answers.dtype))
        return functional.cross_entropy(answers, labels)
    if balance.offsets is not None:
        answers = answers + balance.offsets.to(answers)
    losses = balance.losses(answers, labels)
    if mixed is not None:
        share = mixed.share[labelled].to(losses)
        losses = share * losses + (1 - share) * balance.losses(answers, mixed.partner[labelled])
    return losses.mean()


def has_label(labels: Tensor) -> Tensor:
    """Which images have one, bool [B], for labels [B] or [B, K]."""
    return (labels if labels.ndim == 1 else labels[:, 0]) >= 0
