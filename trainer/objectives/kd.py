"""Distillation of logits: Hinton's, of standardised logits, and generalized distillation.

Dimensions: B images, K classes.
"""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.features import LOGITS, Target
from trainer.objectives.objective import (
    ModelOutline,
    Need,
    Objective,
    ObjectiveInputs,
    Parties,
    TermConfig,
    refuse_several_labels,
)
from trainer.precision import at_least_float32

LEAST_DEVIATION = 0.1
"""Of a student's logits over classes, when they are standardised."""

NO_DEVIATION = 1e-7
"""The same of a teacher, as published: only against a division by 0."""


class KdConfig(TermConfig):
    """Weight and temperature of the distillation; the defaults are the paper's 1 - a and T."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.75
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        return Kd(self.temperature)


class StandardisedKdConfig(TermConfig):
    """KD of z-scored logits: what ranks and spacing say, whatever the scale; weight and temperature are the paper's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    wants_all_logits: ClassVar[bool] = True
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 9.0
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """The base temperature, of logits with a standard deviation of 1."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("standardised_kd", parties, "standardises logits over classes that exclude one another")
        if parties.student.n_classes < 3:
            raise SpecError(
                "`standardised_kd` has nothing to say of 2 classes: standardised, every answer is one of two",
                hint="`kd` is there for them",
            )
        return StandardisedKd(self.temperature)


class GeneralizedDistillationConfig(TermConfig):
    """Lopez-Paz et al.: the reference alone is softened, and nothing is scaled by T².

    With T = 1 it is KD. The imitation parameter λ is `weight`, 1 - λ that of `ce`; paper and code try λ from 0 to 1 and
    T from 1 to 50 and name no best, so both defaults are ours.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    """λ of the paper's equation; its code has λT² here."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Of the reference's logits; the student's are taken as they are, so T says how sure the student is to be."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        return GeneralizedDistillation(self.temperature)


class Kd(Objective):
    """See `kd_loss`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        teacher_logits = inputs.targets[LOGITS]
        return kd_loss(inputs.student.logits, teacher_logits, self.temperature, is_multi_label=inputs.is_multi_label)


class StandardisedKd(Objective):
    """See `standardised_kd_loss`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        return standardised_kd_loss(inputs.student.logits, inputs.targets[LOGITS], self.temperature)


class GeneralizedDistillation(Objective):
    """See `generalized_distillation_loss`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        return generalized_distillation_loss(
            inputs.student.logits, inputs.targets[LOGITS], self.temperature, is_multi_label=inputs.is_multi_label
        )


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, is_multi_label: bool = False
) -> Tensor:
    """T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)), mean over images, labelled or not.

    T² keeps the gradient's size when T changes. The teacher gets no gradient.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype.
        is_multi_label: each class is a question of its own, of logits (z, 0); the mean then runs over classes, too,
            as that of the cross entropy does.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes differ, rather than broadcasting them.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits, is_multi_label=is_multi_label)
    log_p_student = functional.log_softmax(student_logits / temperature, dim=-1)
    log_p_teacher = functional.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = functional.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def standardised_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`kd_loss` of Z(z_s) and Z(z_t), Z(z) = (z - mean over classes) / standard deviation over classes.

    The deviation is the unbiased one, as in the code. Not of the paper: the student's counts as `LEAST_DEVIATION` where
    it is less, since a student begins with logits of 0, and the published 1e-7 there makes a gradient of 1e7.

    Args:
        student_logits: [B, K], any float dtype, K > 1.
        teacher_logits: [B, K], any float dtype.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Source: Sun et al., CVPR 2024, arXiv:2403.01427, algorithm 1; `normalize` in `mdistiller/distillers/KD.py` of its
    code.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    return kd_loss(
        standardised(student_logits, LEAST_DEVIATION), standardised(teacher_logits, NO_DEVIATION), temperature
    )


def standardised(logits: Tensor, least: float) -> Tensor:
    """Logits [B, K] of mean 0 and, where theirs is more than `least`, of standard deviation 1."""
    centred = logits - logits.mean(dim=-1, keepdim=True)
    # A vector's norm has a gradient of 0 at 0, `Tensor.std` none.
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    return centred / deviation.clamp_min(least)


def generalized_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, *, is_multi_label: bool = False
) -> Tensor:
    """-Σ_k softmax(z_t/T)_k · log softmax(z_s)_k, mean over images, labelled or not.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype; detached here.
        is_multi_label: as in `kd_loss`.

    Returns:
        [], float32 or wider; at its least the entropy of the softened reference, not 0.

    Raises:
        ValueError: if the shapes differ.

    Source: Lopez-Paz et al., arXiv:1511.03643, equations 4 and 5, and the steps of section 4.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits, is_multi_label=is_multi_label)
    return functional.cross_entropy(student_logits, (teacher_logits / temperature).softmax(dim=-1))


def comparable(
    student_logits: Tensor, teacher_logits: Tensor, *, is_multi_label: bool = False
) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the teacher's without gradient; each class as a question, where an image has several.

    Raises:
        ValueError: if the shapes differ, rather than broadcasting them.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    both = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    return (yes_and_no(both[0]), yes_and_no(both[1])) if is_multi_label else both


def yes_and_no(logits: Tensor) -> Tensor:
    """Logits [B, K] of K questions as [B·K, 2]: softmax(z, 0) is (p, 1 - p), p = sigmoid(z)."""
    answers = logits.reshape(-1)
    return torch.stack([answers, torch.zeros_like(answers)], dim=-1)
