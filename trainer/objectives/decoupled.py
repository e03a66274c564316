"""Distillation that parts an image's own class from the others: DKD and NKD.

Dimensions: B images, K classes.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trainer.features import LOGITS, Target
from trainer.objectives.cross_entropy import has_label
from trainer.objectives.kd import comparable
from trainer.objectives.objective import (
    ModelOutline,
    Need,
    Objective,
    ObjectiveInputs,
    Parties,
    TermConfig,
    refuse_several_labels,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Unlabelled = Literal["skip", "teacher"]
"""What an objective that needs an image's class makes of one without a label: nothing, or it takes the class that the
reference thinks most likely."""


class OneClassConfig(TermConfig):
    """Base of what asks for the class of an image beside the reference's logits."""

    wants_one_class: ClassVar[bool] = True
    unlabelled: Unlabelled = "skip"
    """What is done with images that have no label. The paper has none; `teacher` is ours."""

    @property
    def is_of_labels(self) -> bool:
        return self.unlabelled == "skip"

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)


class DkdConfig(OneClassConfig):
    """Decoupled distillation; the defaults are the paper's for CIFAR-100."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.LABELS})
    alpha: NotNegative = 1.0
    """Weight of how sure to be of the image's own class."""
    beta: NotNegative = 8.0
    """Weight of what the other classes say among themselves; published are 2 to 8."""
    temperature: Positive = 4.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the term grows to its weight; published are 20 epochs."""

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("dkd", parties, "asks for the class of an image")
        return Dkd(self)


class NkdConfig(OneClassConfig):
    """Normalised distillation; the defaults are the paper's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.LABELS})
    gamma: NotNegative = 1.5
    """Weight of the other classes."""
    temperature: Positive = 1.0
    """Of the other classes alone."""

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("nkd", parties, "asks for the class of an image")
        return Nkd(self)


@dataclass(frozen=True, slots=True)
class Named:
    """The images of a batch whose class is known."""

    which: Tensor
    """bool [B]."""
    classes: Tensor
    """int64, of each of these."""


def images_with_class(inputs: ObjectiveInputs, unlabelled: Unlabelled) -> Named | None:
    """The images whose class is known or, where the reference is asked, all of them; None if there are none."""
    assert inputs.labels is not None
    labels, which = inputs.labels, has_label(inputs.labels)
    if unlabelled == "teacher":
        labels, which = torch.where(which, labels, inputs.targets[LOGITS].argmax(dim=-1)), torch.ones_like(which)
    return Named(which, labels[which]) if bool(which.any()) else None


class Dkd(Objective):
    """See `dkd_loss`."""

    def __init__(self, config: DkdConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: ObjectiveInputs) -> Tensor | None:
        config = self.config
        named = images_with_class(inputs, config.unlabelled)
        if named is None:
            return None
        loss = dkd_loss(
            inputs.student.logits[named.which],
            inputs.targets[LOGITS][named.which],
            named.classes,
            alpha=config.alpha,
            beta=config.beta,
            temperature=config.temperature,
        )
        # The first step has a share already: a term without a gradient is taken for one that is cut off.
        return loss if not config.warmup_steps else min(1.0, (inputs.step + 1) / config.warmup_steps) * loss


class Nkd(Objective):
    """See `nkd_loss`."""

    def __init__(self, config: NkdConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: ObjectiveInputs) -> Tensor | None:
        named = images_with_class(inputs, self.config.unlabelled)
        if named is None:
            return None
        return nkd_loss(
            inputs.student.logits[named.which],
            inputs.targets[LOGITS][named.which],
            named.classes,
            gamma=self.config.gamma,
            temperature=self.config.temperature,
        )


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    classes: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T²·[alpha·KL(b_t ‖ b_s) + beta·KL(q_t ‖ q_s)], mean over images.

    With p = softmax(z/T), b = (p_y, 1 - p_y), and q the softmax over the classes other than y alone.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype; detached here.
        classes: y, int64 [B].

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes of the logits differ.

    Source: Zhao et al., arXiv:2203.08679, as in `mdistiller/distillers/DKD.py` of its code. That adds -1000 to the
    logit of y; here the other classes are picked out, which needs no number that float16 has not.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    own = functional.kl_div(
        own_or_other(student, classes), own_or_other(teacher, classes), reduction="batchmean", log_target=True
    )
    others = functional.kl_div(
        functional.log_softmax(without(student, classes), dim=-1),
        functional.log_softmax(without(teacher, classes), dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * (alpha * own + beta * others)


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, classes: Tensor, *, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """-p_t(y)·log p_s(y) - gamma·T²·Σ_k q_t(k)·log q_s(k), mean over images.

    With p = softmax(z), and q = softmax(z/T) over the classes k other than y alone.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype; detached here.
        classes: y, int64 [B].

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes of the logits differ.

    Source: Yang et al., arXiv:2303.13005, `mmcls/models/dis_losses/nkd.py` of its code. (The copy in
    `mmcls/distillation/losses` leaves the class y among the others.)
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    own_teacher = teacher_logits.softmax(dim=-1).gather(1, classes[:, None])[:, 0]
    own = own_teacher * functional.cross_entropy(student_logits, classes, reduction="none")
    others = functional.cross_entropy(
        without(student_logits, classes) / temperature,
        (without(teacher_logits, classes) / temperature).softmax(dim=-1),
    )
    return own.mean() + gamma * temperature**2 * others


def without(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits [B, K - 1] of the classes other than `classes`, in their order."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, classes[:, None], value=False)
    return logits[others].reshape(len(logits), -1)


def own_or_other(logits: Tensor, classes: Tensor) -> Tensor:
    """log of (p_y, 1 - p_y), [B, 2], p = softmax(logits): finite however sure p is."""
    both = torch.cat([logits.gather(1, classes[:, None]), without(logits, classes).logsumexp(1, keepdim=True)], dim=1)
    return functional.log_softmax(both, dim=-1)
