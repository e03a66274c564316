"""Distillation of logits."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from trainer.features import LOGITS, Target
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.precision import at_least_float32


class KdConfig(TermConfig):
    """Weight and temperature of the distillation; the defaults are the paper's 1 - a and T."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.75
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        return Kd(self.temperature)


class Kd(Objective):
    """See `kd_loss`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        teacher_logits = inputs.targets[LOGITS]
        return kd_loss(inputs.student.logits, teacher_logits, self.temperature, is_multi_label=inputs.is_multi_label)


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
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    if is_multi_label:
        student_logits, teacher_logits = yes_and_no(student_logits), yes_and_no(teacher_logits)
    log_p_student = functional.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p_teacher = functional.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    divergence = functional.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def yes_and_no(logits: Tensor) -> Tensor:
    """Logits [B, K] of K questions as [B·K, 2]: softmax(z, 0) is (p, 1 - p), p = sigmoid(z)."""
    answers = logits.reshape(-1)
    return torch.stack([answers, torch.zeros_like(answers)], dim=-1)
