"""Distillation of how images relate to one another: RKD, SP and PKT.

Relations of one model are compared with those of the other, so widths need not agree and nothing is trained beside the
student. They are those of the images that a process sees at a time: `loop.accumulation` and processes make them fewer.

Dimensions: B images, D width.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.features import Target
from trainer.objectives.distances import NO_NORM, unit
from trainer.objectives.layer_pairs import LayerPair
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.precision import at_least_float32

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Compare = Callable[[Tensor, Tensor], Tensor]
"""Features [B, D] of the student and [B, D'] of the reference, float32 or wider, to a loss []."""

NO_PROBABILITY = 1e-7
"""Added within PKT's logarithm, as published."""


class RkdConfig(TermConfig):
    """Distances and angles between images; the weights of the two are RepDistiller's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    distance: NotNegative = 25.0
    angle: NotNegative = 50.0
    pair: LayerPair = LayerPair()
    """Which blocks are compared, and what of them."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (self.pair.target(reference, "pooled", "rkd"),)

    def build(self, parties: Parties) -> Objective:
        def compare(student: Tensor, teacher: Tensor) -> Tensor:
            return rkd_loss(student, teacher, distance=self.distance, angle=self.angle)

        return Relations("rkd", self.pair, compare, parties)


class SpConfig(TermConfig):
    """Similarities of images; the weight is RepDistiller's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    weight: Positive = 3000.0
    pair: LayerPair = LayerPair()
    """Which blocks are compared, and what of them. The published code takes the whole last map, flattened; here it is
    the CLS or the mean."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (self.pair.target(reference, "pooled", "sp"),)

    def build(self, parties: Parties) -> Objective:
        return Relations("sp", self.pair, sp_loss, parties)


class PktConfig(TermConfig):
    """Cosines of images as probabilities; the weight is RepDistiller's."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    weight: Positive = 30000.0
    pair: LayerPair = LayerPair()
    """Which blocks are compared, and what of them."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (self.pair.target(reference, "pooled", "pkt"),)

    def build(self, parties: Parties) -> Objective:
        return Relations("pkt", self.pair, pkt_loss, parties)


class Relations(Objective):
    """The relations that `compare` is about, between a block of the student and one of the reference."""

    def __init__(self, name: str, pair: LayerPair, compare: Compare, parties: Parties) -> None:
        """
        Args:
            name: of the objective, for messages.
        """
        super().__init__()
        self.name, self.compare = name, compare
        self.pair = pair.fitted(parties, "pooled", name)

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        """
        Raises:
            SpecError: if it is shown one image alone.
        """
        student = self.pair.of_student(inputs.student)
        if len(student) < 2:
            raise SpecError(
                f"`{self.name}` compares images with one another, and is shown 1 at a time",
                hint="set `labelled_per_batch`, or what is left of it on each process, to 2 or more",
            )
        target = at_least_float32(inputs.targets[self.pair.target].detach())
        # Products of half precision overflow, and tell neighbours apart by three digits.
        with torch.autocast(student.device.type, enabled=False):
            return self.compare(student, target)


def gram(features: Tensor) -> Tensor:
    """f_i·f_j for all pairs of images, [B, B]."""
    return features @ features.T


def rkd_loss(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """25·Huber(distances of two, over their mean) + 50·Huber(cosines of the angles of three).

    d_ij = ‖f_i - f_j‖ over the mean of all that are not 0; a_ijk = cos of the angle at i between j and k. Huber is
    smooth L1 with its bend at 1, its mean over all pairs and triples, those of an image with itself included: their
    relation is 0 on both sides.

    Takes memory for [B, B, D] and [B, B, B].

    Source: Park et al., arXiv:1904.05068, as in `distiller_zoo/RKD.py` of HobbitLong/RepDistiller.
    """
    (distances_s, angles_s), (distances_t, angles_t) = distances_and_angles(student), distances_and_angles(teacher)
    of_distances = functional.smooth_l1_loss(distances_s, distances_t)
    return distance * of_distances + angle * functional.smooth_l1_loss(angles_s, angles_t)


def distances_and_angles(features: Tensor) -> tuple[Tensor, Tensor]:
    """d [B, B] and a [B, B, B] of `rkd_loss`; 0 of an image with itself."""
    towards = features[None] - features[:, None]  # [i, j] is f_j - f_i
    distances = torch.linalg.vector_norm(towards, dim=-1)
    apart = distances > 0
    mean = (distances.sum() / apart.sum().clamp_min(1)).clamp_min(NO_NORM)
    directions = unit(towards)
    return distances / mean, directions @ directions.transpose(1, 2)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖G_s - G_t‖²/B², G the Gram matrix of the batch with each row at length 1.

    Source: Tung and Mori, arXiv:1907.09682, as in `mdistiller/distillers/SP.py` of megvii-research/mdistiller.
    """
    return functional.mse_loss(unit(gram(student)), unit(gram(teacher)))


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_ij P_t·log(P_t/P_s), P the matrix of (cos(f_i, f_j) + 1)/2 over its rows' sums.

    The mean is over all B² pairs, an image with itself included; the divergence of a row is B times its mean.

    Source: Passalis and Tefas, arXiv:1803.10837, as in `mdistiller/distillers/PKT.py` of megvii-research/mdistiller.
    """
    of_student, of_teacher = (neighbours(features) for features in (student, teacher))
    return (of_teacher * ((of_teacher + NO_PROBABILITY) / (of_student + NO_PROBABILITY)).log()).mean()


def neighbours(features: Tensor) -> Tensor:
    """P of `pkt_loss`, [B, B]."""
    similarity = (gram(unit(features)) + 1) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)
