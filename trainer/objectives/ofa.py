"""OFA-KD: every stage of the student answers for itself, and learns the reference's logits with its own class raised.

Dimensions: B images, D width of a block, K classes.
"""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainer.features import LOGITS, Layer, resolve_layer
from trainer.objectives.decoupled import OneClassConfig, images_with_class
from trainer.objectives.kd import comparable
from trainer.objectives.objective import (
    ModelOutline,
    Need,
    Objective,
    ObjectiveInputs,
    Parties,
    refuse_several_labels,
)
from trainer.objectives.stage_head import StageHead


class OfaConfig(OneClassConfig):
    """Stages, and how much the image's own class is raised."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS, Need.LABELS})
    layers: tuple[Layer, ...] = (0.25, 0.5, 0.75, 1.0)
    """Blocks of the student that answer for themselves, beside its logits: the ends of the paper's four stages. Those
    that fall together in a shallow model count once."""
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """At 1 plain distillation of the reference's probabilities; above, a class that the reference is sure of counts
    more. Published are 1 to 1.5, set by pair of architectures."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def build(self, parties: Parties) -> Objective:
        refuse_several_labels("ofa", parties, "asks for the class of an image")
        return Ofa(self, parties.student)


class Ofa(Objective):
    """Σ of `ofa_loss` over the stages and the student's own logits, each of weight 1 as in the paper.

    The published heads are parts of the student's own architecture, blocks of it for a ViT and separable convolutions
    for maps. A `StageHead` with an MLP fits every student.
    """

    def __init__(self, config: OfaConfig, student: ModelOutline) -> None:
        super().__init__()
        self.config = config
        blocks = dict.fromkeys(resolve_layer(layer, student.names, "student") for layer in config.layers)
        self.heads = nn.ModuleList(StageHead(student, block, "mlp") for block in blocks)

    def forward(self, inputs: ObjectiveInputs) -> Tensor | None:
        config = self.config
        named = images_with_class(inputs, config.unlabelled)
        if named is None:
            return None
        answers = [inputs.student.logits, *(head(inputs.student) for head in self.heads)]
        target = inputs.targets[LOGITS][named.which]
        losses = [
            ofa_loss(one[named.which], target, named.classes, epsilon=config.epsilon, temperature=config.temperature)
            for one in answers
        ]
        return sum(losses[1:], start=losses[0])


def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, classes: Tensor, *, epsilon: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """-Σ_k [(p_t(k) + 1_y(k))^ε - 1_y(k)]·log p_s(k), mean over images, p = softmax(z/T), without T².

    Args:
        student_logits: [B, K], any float dtype.
        teacher_logits: [B, K], any float dtype; detached here.
        classes: y, int64 [B]; 1_y is 1 at y, else 0.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes of the logits differ.

    Source: Hao et al., arXiv:2310.19444, `ofa_loss` in `distillers/ofa.py` of its code.
    """
    student_logits, teacher_logits = comparable(student_logits, teacher_logits)
    own = functional.one_hot(classes, student_logits.shape[1])
    raised = ((teacher_logits / temperature).softmax(dim=-1) + own) ** epsilon - own
    return -(raised * functional.log_softmax(student_logits / temperature, dim=-1)).sum(dim=1).mean()
