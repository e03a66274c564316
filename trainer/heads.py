"""MESSy's predictive heads: from a block of the student to what a block of the reference holds of a span."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trainer.features import CLS, Features, Target


@dataclass(frozen=True, slots=True, order=True)
class MessyTerm:
    """One summand of the loss: which student block predicts which target.

    Blocks have their own number on each side, so student and reference may differ in depth.
    """

    student_block: int
    target: Target


class MessyHeads(nn.Module):
    """One head Linear → GELU → Linear for each term; thrown away after training.

    Source: arXiv:2606.08336, equation of the MESSy loss; hidden width 512 as in its training code.
    """

    def __init__(
        self,
        terms: Sequence[MessyTerm],
        student_widths: Sequence[int],
        target_widths: Mapping[Target, int],
        *,
        hidden: int,
    ) -> None:
        """
        Args:
            student_widths: D of each of the student's blocks.
            target_widths: D of each target.
            hidden: width between a head's two layers.
        """
        super().__init__()
        self.terms = tuple(terms)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(student_widths[term.student_block], hidden),
                nn.GELU(),
                nn.Linear(hidden, target_widths[term.target]),
            )
            for term in self.terms
        )

    def forward(self, student: Features) -> dict[MessyTerm, Tensor]:
        """Predictions [B, D of the target] from the student's CLS."""
        assert student.spans is not None
        seen = student.spans[CLS]
        return {
            term: head(student.blocks[term.student_block][:, seen].mean(dim=1))
            for term, head in zip(self.terms, self.heads, strict=True)
        }
