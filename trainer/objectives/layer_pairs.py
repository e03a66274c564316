"""Which block of the student is compared with which block of what it learns from, and what of each.

Dimensions: B images, N tokens of a block, D its width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dla_cache.errors import SpecError
from dla_cache.spec import StrictModel
from trainer.features import CLS, IMAGE, Features, Layer, Target, resolve_layer
from trainer.objectives.objective import ModelOutline, Parties
from trainer.precision import at_least_float32

What = Literal["pooled", "tokens"]
"""A span's mean [B, D], or each of its tokens [B, N, D]; which of them, the objective decides."""


class LayerPair(StrictModel):
    """Two blocks whose outputs, before the final norm, are compared."""

    student: Layer = 1.0
    """Block of the student: counted from 0, a fraction of the depth at which it ends, or a name."""
    teacher: Layer = 1.0
    """Block of what the student learns from, named likewise."""
    span: str | None = None
    """Whose tokens of the teacher: `cls`, `image` or a modality. When absent `cls`, or `image` of a model without one;
    of tokens one by one `image`, and nothing else."""
    read: Literal["cls", "pooled"] | None = None
    """What of the student's block: its CLS, or the mean of its image tokens. When absent `cls`, or `pooled` of a
    student without one. Of tokens one by one it is left out."""

    def target(self, reference: ModelOutline, what: What, objective: str) -> Target:
        """What the reference is asked.

        Args:
            objective: its name, for messages.

        Raises:
            SpecError: if the reference has no such block or span.
        """
        if not reference.blocks:
            raise SpecError(
                f"`{objective}` compares blocks, and the model that the student learns from has none: it is a probe",
                hint="learn from a teacher or a student, or distil logits alone with `kd`",
            )
        span = self.span or (CLS if what == "pooled" and CLS in reference.spans else IMAGE)
        if what == "tokens" and span != IMAGE:
            raise SpecError(
                f"`{objective}` compares image tokens one by one, and `span` is `{span}`", hint="leave `span` out"
            )
        if span not in reference.spans:
            raise SpecError(
                f"`{objective}` compares the span `{span}`, the teacher has"
                f" {', '.join(f'`{one}`' for one in reference.spans)}",
                hint="name one of those",
            )
        return Target(what, span, resolve_layer(self.teacher, reference.names, "teacher"))

    def fitted(self, parties: Parties, what: What, objective: str) -> "FittedPair":
        """The pair for this student and this reference.

        Raises:
            SpecError: if one of them has no such block, span or CLS.
        """
        student, reference = parties.student, parties.teacher()
        target = self.target(reference, what, objective)
        if self.read == "cls" and CLS not in student.spans:
            raise SpecError(f"`{objective}` reads `cls`, and the student has no such token", hint="read `pooled`")
        if what == "tokens" and self.read is not None:
            raise SpecError(f"`{objective}` compares image tokens one by one", hint="leave `read` out")
        reads_cls = what == "pooled" and (self.read or "cls") == "cls" and CLS in student.spans
        block = resolve_layer(self.student, student.names, "student")
        widths = student.width(block), reference.width(target.block)
        return FittedPair(block, CLS if reads_cls else IMAGE, target, *widths)


@dataclass(frozen=True, slots=True)
class FittedPair:
    """A `LayerPair` between two models that are known."""

    block: int
    """Of the student."""
    span: str
    """Of the student: `cls` or `image`."""
    target: Target
    student_width: int
    target_width: int

    def of_student(self, student: Features) -> Tensor:
        """What is compared with the target: [B, D], float32 or wider; or tokens [B, N, D], any float dtype."""
        assert student.spans is not None
        tokens = student.blocks[self.block][:, student.spans[self.span]]
        return at_least_float32(tokens).mean(dim=1) if self.target.what == "pooled" else tokens


def fit_pairs(pairs: Sequence[LayerPair], parties: Parties, what: What, objective: str) -> tuple[FittedPair, ...]:
    """All pairs fitted; those that fall together in a shallow model count once.

    Raises:
        SpecError: see `LayerPair.fitted`.
    """
    return tuple(dict.fromkeys(pair.fitted(parties, what, objective) for pair in pairs))
