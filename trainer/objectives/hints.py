"""A block of the student is brought to say what a block of the reference says: FitNets, VID; or to look where it looks:
attention transfer.

Dimensions: B images, N tokens (places) of a block, D its width.
"""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainer.features import Target
from trainer.objectives.distances import distance_between, unit
from trainer.objectives.layer_pairs import LayerPair, What, fit_pairs
from trainer.objectives.messy import resize_tokens
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.objectives.projectors import Projector, make_projector
from trainer.precision import at_least_float32

Pairs = Annotated[tuple[LayerPair, ...], Field(min_length=1)]

EACH_THIRD = tuple(LayerPair(student=third / 3, teacher=third / 3) for third in (1, 2, 3))

VID_VARIANCE = 5.0
"""Before training; of each channel."""

LEAST_VARIANCE = 1e-5


class PairsConfig(TermConfig):
    """What objectives share that compare blocks pair by pair."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    pairs: Pairs = EACH_THIRD
    """Blocks that are compared; pairs that fall together in a shallow model count once."""


class FitnetsConfig(PairsConfig):
    """Weight of the hint loss, which blocks, and what of them; the weight is that of the published comparisons."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    pairs: Pairs = (LayerPair(student=0.5, teacher=0.5),)
    """Blocks that are compared: the paper's is one, in the middle."""
    what: What = "tokens"
    """Each image token, or the mean over a span (`pooled`): a span of latents has no places in the image."""
    projector: Projector = "linear"
    """The regressor from the student's width to the reference's."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(pair.target(reference, self.what, "fitnets") for pair in self.pairs))

    def build(self, parties: Parties) -> Objective:
        return Fitnets(self, parties)


class Fitnets(Objective):
    """Σ over pairs of the MSE between regressor(f_s) and f_t, its mean over images, tokens and D.

    The regressor is affine, without the ReLU and batch norm of convolutional versions: what a transformer's block puts
    out has both signs. Where the grids of tokens differ, the regressed one is resized to the reference's.

    Source: Romero et al., arXiv:1412.6550, equation 3, without its half; as a mean with weight 100 in the published
    comparisons (HobbitLong/RepDistiller, `distiller_zoo/FitNet.py`; megvii-research/mdistiller).
    """

    def __init__(self, config: FitnetsConfig, parties: Parties) -> None:
        super().__init__()
        self.pairs = fit_pairs(config.pairs, parties, config.what, "fitnets")
        self.regressors = nn.ModuleList(
            make_projector(pair.student_width, pair.target_width, config.projector) for pair in self.pairs
        )

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        losses = []
        for pair, regressor in zip(self.pairs, self.regressors, strict=True):
            target, regressed = inputs.targets[pair.target], regressor(pair.of_student(inputs.student))
            if pair.target.what == "tokens":
                regressed = resize_tokens(regressed, target.shape[1])
            losses.append(distance_between(regressed, target))
        return torch.stack(losses).sum()


class AttentionConfig(PairsConfig):
    """Weight of attention transfer and which blocks; the weight is that of the published comparisons."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1000.0

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(pair.target(reference, "tokens", "attention") for pair in self.pairs))

    def build(self, parties: Parties) -> Objective:
        return AttentionTransfer(self, parties)


class AttentionTransfer(Objective):
    """Σ over pairs of `attention_loss`: where a block's image tokens are loud, whatever they say."""

    def __init__(self, config: AttentionConfig, parties: Parties) -> None:
        super().__init__()
        self.pairs = fit_pairs(config.pairs, parties, "tokens", "attention")

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        losses = [attention_loss(pair.of_student(inputs.student), inputs.targets[pair.target]) for pair in self.pairs]
        return torch.stack(losses).sum()


def attention_loss(student: Tensor, reference: Tensor) -> Tensor:
    """Mean over images and places of (n(mean_d s²) - n(mean_d t²))², where n makes the map of an image one of length 1.

    Of two grids the finer one is pooled to the other first, as in the published code.

    Args:
        student: tokens [B, N, D] of a square grid, any float dtype.
        reference: [B, N', D'], likewise; detached here.

    Returns:
        [], float32 or wider.

    Source: Zagoruyko and Komodakis, arXiv:1612.03928, equation 2 with p = 2, as a mean over places instead of a norm:
    HobbitLong/RepDistiller, `distiller_zoo/AT.py`.
    """
    n_places = min(student.shape[1], reference.shape[1])
    of_student, of_reference = (
        unit(pool_tokens(tokens, n_places).square().mean(dim=2)) for tokens in (student, reference.detach())
    )
    return functional.mse_loss(of_student, of_reference)


def pool_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """Tokens [B, N, D] of a square grid as means over the cells of a coarser one, [B, n_tokens, D]; at least float32.

    Raises:
        ValueError: if one of the grids is no square.
    """
    tokens = at_least_float32(tokens)
    if tokens.shape[1] == n_tokens:
        return tokens
    sides = math.isqrt(tokens.shape[1]), math.isqrt(n_tokens)
    if sides[0] ** 2 != tokens.shape[1] or sides[1] ** 2 != n_tokens:
        raise ValueError(f"{tokens.shape[1]} or {n_tokens} tokens are no square grid")
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, sides[0], sides[0])
    return functional.adaptive_avg_pool2d(grid, sides[1]).flatten(2).transpose(1, 2)


class VidConfig(PairsConfig):
    """Weight of variational information distillation, which blocks, and what of them."""

    what: What = "tokens"
    """Each image token, or the mean over a span (`pooled`)."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(pair.target(reference, self.what, "vid") for pair in self.pairs))

    def build(self, parties: Parties) -> Objective:
        return Vid(self, parties)


class Vid(Objective):
    """Σ over pairs of `vid_loss` between an MLP μ of the student's block and the reference's.

    The variance of each channel is learned: v = softplus(scale) + 1e-5, 5 before training.
    """

    def __init__(self, config: VidConfig, parties: Parties) -> None:
        super().__init__()
        self.pairs = fit_pairs(config.pairs, parties, config.what, "vid")
        self.means = nn.ModuleList(make_projector(pair.student_width, pair.target_width, "mlp") for pair in self.pairs)
        start = math.log(math.expm1(VID_VARIANCE - LEAST_VARIANCE))
        self.scales = nn.ParameterList(torch.full((pair.target_width,), start) for pair in self.pairs)

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        losses = []
        for pair, mean, scale in zip(self.pairs, self.means, self.scales, strict=True):
            seen, target = pair.of_student(inputs.student), inputs.targets[pair.target]
            if pair.target.what == "tokens":
                n_places = min(seen.shape[1], target.shape[1])
                seen, target = pool_tokens(seen, n_places), pool_tokens(target, n_places)
            losses.append(vid_loss(mean(seen), target, functional.softplus(scale) + LEAST_VARIANCE))
        return torch.stack(losses).sum()


def vid_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Mean over all numbers of ½[(t - μ)²/v + log v]: a Gaussian's -log q(t | s) without its constant.

    Args:
        mean: μ(f_s), [..., D], any float dtype.
        target: [..., D]; detached here.
        variance: [D], above 0.

    Returns:
        [], float32 or wider.

    Source: Ahn et al., arXiv:1904.05835, its Gaussian model of q, as a mean instead of a sum: HobbitLong/RepDistiller,
    `distiller_zoo/VID.py`, whose v reaches the optimiser as it does here.
    """
    variance = at_least_float32(variance)
    errors = (at_least_float32(target.detach()) - at_least_float32(mean)).square()
    return 0.5 * (errors / variance + variance.log()).mean()
