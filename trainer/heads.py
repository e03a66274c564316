"""MESSy's predictive heads: from a block of the student to what a block of the reference holds of a span.

Dimensions: B images, N tokens of a block, D its width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dla_cache.errors import SpecError
from trainer.features import CLS, IMAGE, Features, Target

Reading = Literal["cls", "pooled", "spatial"]
"""What a head sees of a block: the CLS, the mean of the image's tokens, or what a learned query picks of these."""

ATTENTION_HEADS = (8, 4, 2, 1)
"""Of a query: the most that divide the width."""


@dataclass(frozen=True, slots=True, order=True)
class MessyTerm:
    """One summand of the loss: which student block predicts which target.

    Blocks have their own number on each side, so student and reference may differ in depth.
    """

    student_block: int
    target: Target


class LearnedQuery(nn.Module):
    """One query that attends over layer-normed tokens: [B, N, D] to [B, D].

    Source: the attentive probe of V-JEPA, arXiv:2404.08471, without its residual block.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.norm = nn.LayerNorm(width)
        n_heads = next(n for n in ATTENTION_HEADS if width % n == 0)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        keys = self.norm(tokens)
        picked: Tensor = self.attention(self.query.expand(len(tokens), -1, -1), keys, keys, need_weights=False)[0]
        return picked[:, 0]


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
        read: Reading = "cls",
    ) -> None:
        """
        Args:
            student_widths: D of each of the student's blocks.
            target_widths: D of each target.
            hidden: width between a head's two layers.
            read: what a head sees; one that predicts tokens sees each of the image's.
        """
        super().__init__()
        self.terms = tuple(terms)
        self.read = read
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(student_widths[term.student_block], hidden),
                nn.GELU(),
                nn.Linear(hidden, target_widths[term.target]),
            )
            for term in self.terms
        )
        self.queries = nn.ModuleDict(
            {
                str(number): LearnedQuery(student_widths[term.student_block])
                for number, term in enumerate(self.terms)
                if read == "spatial" and term.target.what == "pooled"
            }
        )

    def forward(self, student: Features) -> dict[MessyTerm, Tensor]:
        """Predictions [B, D of the target]; of tokens [B, N of the student, D of the target]."""
        return {
            term: head(self._seen(number, term, student))
            for number, (term, head) in enumerate(zip(self.terms, self.heads, strict=True))
        }

    def _seen(self, number: int, term: MessyTerm, student: Features) -> Tensor:
        if term.target.what == "tokens":
            assert student.spans is not None
            return student.blocks[term.student_block][:, student.spans[IMAGE]]
        query = self.queries[str(number)] if self.read == "spatial" else None
        return read_block(student, term.student_block, self.read, query)


def reading_of(asked: Reading | None, spans: Sequence[str], objective: str) -> Reading:
    """What heads see of a student with these spans, where the objective asks for it or for nothing.

    Raises:
        SpecError: if it is a CLS that the student has not.
    """
    if asked == "cls" and CLS not in spans:
        raise SpecError(
            f"`{objective}.read` is `cls`, and the student has no such token", hint="set it to `pooled` or `spatial`"
        )
    return asked or ("cls" if CLS in spans else "pooled")


def read_block(student: Features, block: int, read: Reading, query: nn.Module | None = None) -> Tensor:
    """What a head sees of a block, [B, D].

    Args:
        query: of `spatial`.
    """
    assert student.spans is not None
    tokens = student.blocks[block][:, student.spans[CLS if read == "cls" else IMAGE]]
    if query is None:
        return tokens.mean(dim=1)
    picked: Tensor = query(tokens)
    return picked
