"""DHO: labels and the reference's answers by a head each, and the student's own classifier as their mixture.

Dimensions: B images, K classes.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from trainer.features import LOGITS, Target
from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.kd import kd_loss
from trainer.objectives.objective import (
    ModelOutline,
    Need,
    Objective,
    ObjectiveInputs,
    Parties,
    TermConfig,
    refuse_several_labels,
)
from trainer.objectives.stage_head import StageHead
from trainer.precision import at_least_float32

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DhoConfig(TermConfig):
    """Dual-head optimisation, in place of `ce` and `kd`; weights and temperature are those of its code."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS, Need.LABELS})
    labels: Positive = 1.0
    """Weight of the head that learns labels, beside 1 of the one that learns the reference's answers."""
    temperature: Positive = 2.0
    """Of the distillation."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the head of labels in the student's logits. The paper chooses it after training, on validation; here it
    is part of what is trained, to be tuned like any setting."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (LOGITS,)

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("dho", parties, "mixes two answers of one class")
        return Dho(self, parties.student)


class Dho(Objective):
    """`labels`·CE(h_CE, y) on labelled images, and T²·KL(t ‖ h_KD) on all, with z = alpha·h_CE + (1 - alpha)·h_KD.

    z is what the student's own classifier says, so that it is the mixture at every step and ships as it is. h_CE is a
    head trained beside it and thrown away; h_KD follows from both.

    Not as published: there the answer is the mixture of *probabilities*, alpha·softmax(h_CE) + (1 - alpha)·softmax(h_KD
    / beta), equation 8, which is the softmax of no linear layer; here that of logits, which is. Mixed so, beta would
    say nothing that alpha does not, and is left out. And the two heads are trained in other coordinates, z and h_CE.

    Source: Kang et al., arXiv:2505.07675, equations 5, 6 and 8; T = 2, T² and weights of 1 as in `train_imgnet_semi.py`
    of erjui/DHO, which takes means over labelled and unlabelled images apart.
    """

    def __init__(self, config: DhoConfig, student: ModelOutline) -> None:
        super().__init__()
        self.config = config
        self.label_head = StageHead(student, len(student.blocks) - 1, "linear")

    def forward(self, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        """The parts `ce`, absent where no image has a label, and `kd`."""
        assert inputs.labels is not None
        of_labels = at_least_float32(self.label_head(inputs.student))
        alpha = self.config.alpha
        of_reference = (at_least_float32(inputs.student.logits) - alpha * of_labels) / (1 - alpha)
        parts = {"kd": kd_loss(of_reference, inputs.targets[LOGITS], self.config.temperature)}
        ce = cross_entropy(of_labels, inputs.labels, inputs.balance, inputs.mixed)
        return parts if ce is None else {"ce": self.config.labels * ce, **parts}
