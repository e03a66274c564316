"""Distillation of logits."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.spec import StrictModel
from trainer.objectives.precision import at_least_float32


class KdConfig(StrictModel):
    """Weight and temperature of the distillation; the defaults are the paper's 1 - a and T."""

    weight: Annotated[float, Field(gt=0)] = 0.75
    temperature: Annotated[float, Field(gt=0)] = 2.0


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)), mean over images, labelled or not.

    T² keeps the gradient's size when T changes. The teacher gets no gradient.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes differ, rather than broadcasting them.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}")
    log_p_student = functional.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    log_p_teacher = functional.log_softmax(at_least_float32(teacher_logits.detach()) / temperature, dim=-1)
    divergence = functional.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
