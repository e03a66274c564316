"""FD-CMKD: low and high frequencies of a feature vector, taken apart and distilled each in its way.

Dimensions: B images, D width of the reference's features, K classes.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.features import Target
from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.distances import unit
from trainer.objectives.layer_pairs import LayerPair
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.objectives.projectors import Projector, make_projector
from trainer.precision import at_least_float32

LEAST_WIDTH = 4
"""Below it one of the halves is empty."""


class FdCmkdConfig(TermConfig):
    """Weight of all of it, which features, and whether its distances are as weak as published."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LABELS, Need.REFERENCE, Need.STUDENT_BLOCKS})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    pair: LayerPair = LayerPair()
    """Whose features: of the last blocks, pooled."""
    projector: Projector | None = None
    """From the student's width to the reference's; when absent none where they agree, else `linear`."""
    rescale: bool = False
    """Whether both distances are taken D times. A number of a vector of length 1 is about 1/√D, so the published mean
    over numbers is about 1/D of what the cross entropies beside it are, and hardly moves the student."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (self.pair.target(reference, "pooled", "fd_cmkd"),)

    def build(self, parties: Parties) -> Objective:
        return FdCmkd(self, parties)


class FdCmkd(Objective):
    """Four parts, added up with the published weights, 1 each; `ce` of the student's own logits stands beside it.

    - `low`: MSE between the low halves, each of length 1 (see `split_frequencies`)
    - `high`: MSE between `signed_log` of the high halves, each of length 1
    - `shared`: classifiers Φ_low, Φ_high on the halves of student *and* reference: Σ of four cross entropies. Those of
      the reference teach the classifiers alone; so they are no part of their own
    - `own`: classifiers of the student's halves alone: Σ of two cross entropies

    A classifier is ReLU → Linear D→K. On a batch without labels `shared` and `own` are left out.

    Source: arXiv:2511.19887; its published code as copied in zxn0710/re-FD-CMKD-main, `main_fd_cmkd.py` and
    `utils/utils.py`.
    """

    def __init__(self, config: FdCmkdConfig, parties: Parties) -> None:
        """
        Raises:
            SpecError: if a model has not the blocks, or the features are too narrow to be taken apart.
        """
        super().__init__()
        self.pair = config.pair.fitted(parties, "pooled", "fd_cmkd")
        width, n_classes = self.pair.target_width, parties.student.n_classes
        if width < LEAST_WIDTH:
            raise SpecError(
                f"`fd_cmkd` takes features apart that have {width} numbers", hint="name wider blocks in its `pair`"
            )
        self.scale = width if config.rescale else 1
        self.projector = make_projector(self.pair.student_width, width, config.projector)
        self.shared_low, self.shared_high, self.own_low, self.own_high = (nn.Linear(width, n_classes) for _ in range(4))

    def forward(self, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        assert inputs.labels is not None
        student = split_frequencies(self.projector(self.pair.of_student(inputs.student)))
        reference = split_frequencies(inputs.targets[self.pair.target].detach())
        (low, high), (reference_low, reference_high) = student, reference
        parts = {
            "low": self.scale * functional.mse_loss(unit(low), unit(reference_low)),
            "high": self.scale * functional.mse_loss(signed_log(unit(high)), signed_log(unit(reference_high))),
        }
        shared = (self.shared_low, low), (self.shared_high, high)
        shared_of_reference = (self.shared_low, reference_low), (self.shared_high, reference_high)
        own = (self.own_low, low), (self.own_high, high)
        for name, asked in (("shared", shared + shared_of_reference), ("own", own)):
            answers = [classifier(functional.relu(half)) for classifier, half in asked]
            losses = [cross_entropy(logits, inputs.labels, inputs.balance, inputs.mixed) for logits in answers]
            known = [loss for loss in losses if loss is not None]
            parts |= {name: torch.stack(known).sum()} if known else {}
        return parts


def split_frequencies(features: Tensor) -> tuple[Tensor, Tensor]:
    """What the lower and the upper half of the frequencies of each vector hold, both again [B, D].

    Frequencies are those of the Fourier transform along D, however a network's channels are ordered; the constant is
    dropped. Of the other ⌊D/2⌋ the first half is low.

    Args:
        features: [B, D], any float dtype.

    Returns:
        float32 or wider.
    """
    width = features.shape[-1]
    spectrum = torch.fft.rfft(at_least_float32(features), dim=-1)
    number = torch.arange(spectrum.shape[-1], device=features.device)
    is_low = (number >= 1) & (number <= width // 4)
    is_high = number > width // 4
    low, high = (torch.fft.irfft(spectrum * kept, n=width, dim=-1) for kept in (is_low, is_high))
    return low, high


def signed_log(values: Tensor) -> Tensor:
    """sign(x)·log(1 + |x|)."""
    return values.sign() * values.abs().log1p()
