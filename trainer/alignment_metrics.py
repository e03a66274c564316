"""How alike two sets of features of the same images are: CKA, RSA, mutual nearest neighbours.

Each side is prepared once and compared with many: `Grams`, `Ranks` and `neighbours` are of one set of features. Every
measure comes with the influence of each image on it, from which intervals over images are drawn.

Dimensions: N images, D width of the features, b minibatches, n images of the largest one, P pairs of images.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

CKA_BATCH = 128
"""Images of a minibatch, about: memory grows with N times this, not with N times N."""

RSA_IMAGES = 512
"""At most, drawn from a fixed seed: all of their pairs are ranked."""

NEIGHBOURS = 10
BLOCK = 1024
"""Images compared with all others at once."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A number, and how far each image pulls it."""

    value: float
    influence: Tensor
    """float64 [N], mean 0: weighting the images by w (mean 1) moves the value by about mean(w · influence).

    Source: Efron, The Jackknife, the Bootstrap and Other Resampling Plans (1982), chapter 6."""


def of_mean(per_image: Tensor) -> Measured:
    """The mean of one number an image, [N]."""
    value = per_image.double().mean()
    return Measured(float(value), per_image.double() - value)


def jackknifed(value: Tensor, without: Tensor) -> Measured:
    """A value [] and what it would be without each image, [N]."""
    return Measured(float(value), (len(without) - 1) * (without.mean() - without))


@dataclass(frozen=True, slots=True)
class Sums:
    """Of two kernel matrices with diagonals of 0, minibatch by minibatch, and of them without each image.

    All [b] or, without an image, [b, n].
    """

    n: Tensor
    trace: Tensor
    """tr(KL)."""
    totals: Tensor
    """1ᵀK1 · 1ᵀL1."""
    rows: Tensor
    """1ᵀKL1."""

    def hsic(self) -> Tensor:
        """HSIC₁ of each: [tr(KL) + 1ᵀK1·1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) · 1ᵀKL1] / (n(n-3)), unbiased.

        Source: Song et al., Feature selection via dependence maximization, JMLR 13 (2012), its unbiased estimator.
        """
        n = self.n
        inner = self.trace + self.totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * self.rows
        return inner / (n * (n - 3))


@dataclass(frozen=True, slots=True)
class Grams:
    """Linear kernels of the images of each minibatch, diagonals 0; float64."""

    order: Tensor
    """int64 [N]: the images in the order in which the minibatches take them."""
    is_image: Tensor
    """bool [b, n]: the last place of a smaller minibatch is empty."""
    kernels: Tensor
    """[b, n, n]; 0 at empty places, so that they add nothing to any sum."""

    @classmethod
    def of(cls, features: Tensor, batch_size: int = CKA_BATCH) -> Self:
        """Of features [N, D], N at least 5, in minibatches of equal size but for one image, drawn from a fixed seed."""
        n_images = len(features)
        n_batches = max(1, n_images // batch_size)
        order = torch.randperm(n_images, generator=torch.Generator().manual_seed(0))
        longest = math.ceil(n_images / n_batches)
        sizes = torch.tensor([len(part) for part in order.tensor_split(n_batches)])
        is_image = torch.arange(longest) < sizes[:, None]
        # The kernel with its rows centred is the same wherever the origin is; near the mean nothing is rounded away.
        centred = features.double() - features.double().mean(dim=0)
        rows = torch.zeros(n_batches, longest, features.shape[1], dtype=torch.float64)
        rows[is_image] = centred[order]
        kernels = rows @ rows.transpose(1, 2)
        kernels.diagonal(dim1=1, dim2=2).zero_()
        return cls(order, is_image, kernels)

    def sums(self, other: "Grams") -> Sums:
        """Of both kernels in each minibatch."""
        k, l = self.kernels.sum(dim=2), other.kernels.sum(dim=2)  # noqa: E741  # as in the equation
        trace = (self.kernels * other.kernels).sum(dim=(1, 2))
        return Sums(self.is_image.sum(dim=1).double(), trace, k.sum(dim=1) * l.sum(dim=1), (k * l).sum(dim=1))

    def sums_without(self, other: "Grams") -> Sums:
        """The same without each image in turn, from the row sums: no kernel is made again."""
        k, l = self.kernels.sum(dim=2), other.kernels.sum(dim=2)  # noqa: E741
        both = (self.kernels * other.kernels).sum(dim=2)
        k_of_l = (self.kernels @ l[..., None])[..., 0]
        l_of_k = (other.kernels @ k[..., None])[..., 0]
        whole = self.sums(other)
        return Sums(
            n=(whole.n - 1)[:, None].expand_as(k),
            trace=whole.trace[:, None] - 2 * both,
            totals=(k.sum(dim=1, keepdim=True) - 2 * k) * (l.sum(dim=1, keepdim=True) - 2 * l),
            rows=whole.rows[:, None] - k * l - k_of_l - l_of_k + both,
        )


def cka_value(one: Grams, other: Grams) -> float:
    """Linear CKA, about 0 of independent features whatever their width, 1 with itself; unbiased, so a little below 0
    at times.

    Σ HSIC₁(K, L) / √(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)) with sums over minibatches, taken before the division. It does not
    see rotations, shifts or the scale of either side. 0 of features that do not vary.

    Source: Nguyen, Raghu and Kornblith, arXiv:2010.15327, its minibatch CKA; Kornblith et al., arXiv:1905.00414.
    """
    return float(_ratio(*(a.sums(b).hsic().sum() for a, b in ((one, other), (one, one), (other, other)))))


def cka(one: Grams, other: Grams) -> Measured:
    """`cka_value` with the influence of each image."""
    wholes = [a.sums(b).hsic() for a, b in ((one, other), (one, one), (other, other))]
    parts = [a.sums_without(b).hsic() for a, b in ((one, other), (one, one), (other, other))]
    # Without an image its own minibatch is another, the rest is as it was.
    without = _ratio(*(whole.sum() - whole[:, None] + part for whole, part in zip(wholes, parts, strict=True)))
    in_order = torch.empty(len(one.order), dtype=torch.float64)
    in_order[one.order] = without[one.is_image]
    return jackknifed(_ratio(*(whole.sum() for whole in wholes)), in_order)


def _ratio(cross: Tensor, own: Tensor, others: Tensor) -> Tensor:
    scale = (own.clamp_min(0) * others.clamp_min(0)).sqrt()
    return torch.where(scale > 0, cross / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def sample_images(n_images: int, at_most: int) -> Tensor:
    """Places of images, rising, int64; all, or so many drawn from a fixed seed."""
    if n_images <= at_most:
        return torch.arange(n_images)
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(1))[:at_most].sort().values


@dataclass(frozen=True, slots=True)
class Ranks:
    """How far apart any two images are, as ranks: float64 [M, M] for M of N images, symmetric, diagonal 0."""

    n_images: int
    """N."""
    sample: Tensor
    """int64 [M]."""
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor, at_most: int = RSA_IMAGES) -> Self:
        """Of squared Euclidean distances between rows of features [N, D]; equal distances share their mean rank."""
        sample = sample_images(len(features), at_most)
        rows = features[sample].double()
        rows = rows - rows.mean(dim=0)
        squares = (rows * rows).sum(dim=1)
        distances = squares[:, None] + squares - 2 * rows @ rows.T
        upper = torch.triu_indices(len(rows), len(rows), 1)
        matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        matrix[upper[0], upper[1]] = average_ranks(distances[upper[0], upper[1]])
        return cls(len(features), sample, matrix + matrix.T)

    def shuffled(self, order: Tensor) -> "Ranks":
        """Of the images in another order, int64 [M], without ranking again."""
        return Ranks(self.n_images, self.sample, self.matrix[order][:, order])


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on, float64 [P]; equal values share the mean of theirs."""
    ordered, order = values.sort()
    starts = torch.ones(len(values), dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    group = starts.cumsum(0) - 1
    counts = torch.bincount(group)
    last = counts.cumsum(0).double()
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = (last - (counts - 1) / 2)[group]
    return ranks


def rsa_value(one: Ranks, other: Ranks) -> float:
    """Spearman's correlation of the distances between images, in [-1, 1], over all pairs of the sampled images.

    It does not see rotations, shifts or the scale of either side. 0 where all distances of a side are equal.

    Source: Kriegeskorte, Mur and Bandettini, Representational similarity analysis (2008).
    """
    moments = _row_moments(one, other).sum(dim=1) / 2
    return float(_pearson(moments, torch.tensor(_n_pairs(len(one.sample)))))


def rsa(one: Ranks, other: Ranks) -> Measured:
    """`rsa_value` with the influence of each image, 0 of those that were not sampled; ranks are held as they are."""
    rows = _row_moments(one, other)
    whole = rows.sum(dim=1) / 2
    n = len(one.sample)
    of_sample = jackknifed(
        _pearson(whole, torch.tensor(_n_pairs(n))), _pearson(whole[:, None] - rows, torch.tensor(_n_pairs(n - 1)))
    )
    influence = torch.zeros(one.n_images, dtype=torch.float64)
    influence[one.sample] = of_sample.influence * one.n_images / n
    return Measured(of_sample.value, influence)


def _n_pairs(n: int) -> float:
    return n * (n - 1) / 2


def _row_moments(one: Ranks, other: Ranks) -> Tensor:
    """Sums over each image's pairs of a, b, a², b² and ab, [5, M]."""
    a, b = one.matrix, other.matrix
    return torch.stack([part.sum(dim=1) for part in (a, b, a * a, b * b, a * b)])


def _pearson(moments: Tensor, n_pairs: Tensor) -> Tensor:
    a, b, aa, bb, ab = moments / n_pairs
    scale = ((aa - a * a).clamp_min(0) * (bb - b * b).clamp_min(0)).sqrt()
    return torch.where(scale > 0, (ab - a * b) / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def neighbours(features: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """The k most alike other images of each by the cosine of features [N, D], int64 [N, k]; N above k.

    Blockwise: `BLOCK` rows of the N x N similarities are there at a time.
    """
    directions = functional.normalize(features.float(), dim=1)
    found = []
    for start in range(0, len(features), BLOCK):
        alike = directions[start : start + BLOCK] @ directions.T
        places = torch.arange(len(alike))
        alike[places, start + places] = -math.inf
        found.append(alike.topk(k, dim=1).indices)
    return torch.cat(found)


def shuffled_neighbours(found: Tensor, order: Tensor) -> Tensor:
    """The `neighbours` of features in another `order`, int64 [N]: row i is now what row `order[i]` was."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places[found[order]]


def mutual_neighbours(one: Tensor, other: Tensor) -> Measured:
    """The mean share of an image's k `neighbours` [N, k] that it has on both sides, in [0, 1]; by chance k / (N - 1).

    It falls as N grows: compare numbers of the same images only.

    Source: Huh et al., The Platonic Representation Hypothesis, arXiv:2405.07987, appendix A.
    """
    shared = (one[:, :, None] == other[:, None, :]).sum(dim=(1, 2))
    return of_mean(shared.double() / one.shape[1])
