"""Cross entropy with the labels."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.objective import Need, Objective, ObjectiveInputs, Parties, TermConfig


class CeConfig(TermConfig):
    """Weight of the cross entropy; the default is the paper's a."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LABELS})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.25

    @property
    def is_of_labels(self) -> bool:
        return True

    def build(self, parties: Parties) -> Objective:
        return CrossEntropy()


class CrossEntropy(Objective):
    """See `cross_entropy`: the run's `ce` settings come with the batch."""

    def forward(self, inputs: ObjectiveInputs) -> Tensor | None:
        assert inputs.labels is not None
        return cross_entropy(inputs.student.logits, inputs.labels, inputs.balance, inputs.mixed)
