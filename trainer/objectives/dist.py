"""DIST: the student's probabilities should rise and fall where the reference's do, over classes and over images.

Dimensions: B images, K classes.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.features import LOGITS, Target
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

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

NO_PRODUCT = 1e-8
"""Added to a product of norms, as published."""

LEAST_VARIATION = 0.1
"""The least norm of a student's centred probabilities, as a share of the norm of these probabilities."""


class DistConfig(TermConfig):
    """Weights and temperature; the defaults are the paper's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    classes: NotNegative = 1.0
    """The paper's beta: of the relations among an image's classes."""
    images: NotNegative = 1.0
    """The paper's gamma: of the relations among a class's images."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The paper has 1 for ImageNet, 4 for CIFAR-100."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("dist", parties, "compares probabilities of classes that exclude one another")
        return Dist(self)


class Dist(Objective):
    """See `dist_loss`."""

    def __init__(self, config: DistConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        return dist_loss(
            inputs.student.logits,
            inputs.targets[LOGITS],
            classes=self.config.classes,
            images=self.config.images,
            temperature=self.config.temperature,
        )


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    classes: float = 1.0,
    images: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """T²·[beta·(1 - mean_i r(s_i, t_i)) + gamma·(1 - mean_k r(s_·k, t_·k))], s and t softmax(z/T), r Pearson's.

    One image alone has no relation to others: its part is gamma·T², without gradient.

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype; detached here.
        classes: beta.
        images: gamma.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes differ.

    Source: Huang et al., arXiv:2205.10536, as in `lib/models/losses/dist_kd.py` of
    hunto/image_classification_sota; T² as in `distillers/dist.py` of OFA-KD's.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    student, teacher = ((logits / temperature).softmax(dim=-1) for logits in (student_logits, teacher_logits))
    of_classes = 1 - pearson(student, teacher).mean()
    of_images = 1 - pearson(student.T, teacher.T).mean()
    return temperature**2 * (classes * of_classes + images * of_images)


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """The correlation of each row of a student's probabilities with that of a teacher's, [rows].

    Not of the paper: a row that varies by less than `LEAST_VARIATION` counts as one that varies as much. A student
    begins with logits of 0, where the correlation has no value and the published one a gradient of 1e8.
    """
    of_student, of_teacher = (rows - rows.mean(dim=1, keepdim=True) for rows in (student, teacher))
    variation = torch.linalg.vector_norm(of_student, dim=1)
    variation = variation.maximum(LEAST_VARIATION * torch.linalg.vector_norm(student, dim=1).detach())
    product: Tensor = variation * torch.linalg.vector_norm(of_teacher, dim=1)
    return (of_student * of_teacher).sum(dim=1) / (product + NO_PRODUCT)
