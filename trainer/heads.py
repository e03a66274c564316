"""MESSy's predictive heads: from the student's CLS token to what a teacher block holds of a modality."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, order=True)
class MessyTerm:
    """One summand of the loss: which student block predicts which span of which teacher block.

    Blocks are counted from 0 and have their own number on each side, so student and teacher may
    differ in depth.
    """

    student_block: int
    teacher_block: int
    modality: str


class MessyHeads(nn.Module):
    """One head Linear → GELU → Linear for each term; thrown away after training.

    Source: arXiv:2606.08336, equation of the MESSy loss; hidden width 512 as in its training code.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        layers: Sequence[tuple[int, int]],
        modalities: Sequence[str],
        *,
        hidden: int = 512,
    ) -> None:
        """A head for each of (student block, teacher block) and modality."""
        super().__init__()
        self.terms = tuple(MessyTerm(student, teacher, name) for student, teacher in layers for name in modalities)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(student_width, hidden), nn.GELU(), nn.Linear(hidden, teacher_width))
            for _ in self.terms
        )

    def forward(self, student_block_outputs: Sequence[Tensor]) -> dict[MessyTerm, Tensor]:
        """Predictions [B, teacher width] from blocks [B, N, student width], CLS first."""
        return {
            term: head(student_block_outputs[term.student_block][:, 0])
            for term, head in zip(self.terms, self.heads, strict=True)
        }
