"""One number for how good answers are, and the interval it would lie in for other images.

Dimensions: N images, K classes, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

RESAMPLES = 1000
"""Of the bootstrap, at most."""

RANKED = 150_000_000
"""Images times classes times resamples, so that an interval takes seconds; never fewer than 100 resamples."""

V = TypeVar("V")


class Score(Protocol):
    """A fraction measured on `n` images."""

    @property
    def n(self) -> int:
        """Images."""

    @property
    def value(self) -> float:
        """In [0, 1]."""

    def interval(self) -> tuple[float, float]:
        """95 % interval: the spread of drawing `n` images, not of training again."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 as a fraction of `n` images."""

    correct: int
    n: int

    @property
    def value(self) -> float:
        """Fraction in [0, 1]."""
        return self.correct / self.n

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval.

        Source: Wilson (1927), as in Brown, Cai and DasGupta (2001), equation 4.
        """
        z = 1.959964
        centre = (self.value + z * z / (2 * self.n)) / (1 + z * z / self.n)
        spread = math.sqrt(self.value * (1 - self.value) / self.n + z * z / (4 * self.n * self.n))
        half = z / (1 + z * z / self.n) * spread
        return centre - half, centre + half


@dataclass(frozen=True, slots=True)
class MeanPrecision:
    """Mean average precision: the mean over classes of how well each class's images are ranked before all others.

    Classes without an image, among those measured, are left out of the mean.
    """

    logits: Tensor
    """float32 [N, K]."""
    labels: Tensor
    """int64 [N, K] of 0 and 1."""

    @property
    def n(self) -> int:
        """Images."""
        return len(self.labels)

    @property
    def value(self) -> float:
        """Fraction in [0, 1]; 0 if no image has any class."""
        return mean_of_classes(self.by_class())

    def by_class(self) -> Tensor:
        """The average precision of each class, float64 [K]; NaN for one without an image."""
        return Ranking.of(self.logits, self.labels).precision()

    def interval(self) -> tuple[float, float]:
        """95 % percentile interval over bootstrap resamples of the images, drawn from a fixed seed.

        Source: Efron and Tibshirani (1993), section 13.3.
        """
        generator = torch.Generator().manual_seed(0)
        ranking = Ranking.of(self.logits, self.labels)
        values = []
        for _ in range(min(RESAMPLES, max(100, RANKED // self.labels.numel()))):
            drawn = torch.randint(self.n, (self.n,), generator=generator)
            weights = torch.bincount(drawn, minlength=self.n).double()
            values.append(mean_of_classes(ranking.precision(weights)))
        low, high = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.025, 0.975], dtype=torch.float64)
        )
        return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The images of a set in the order of each class, the likeliest first."""

    order: Tensor
    """int64 [K, N]."""
    is_hit: Tensor
    """float64 [K, N], in that order: 1 for an image of the class."""
    last_tie: Tensor | None
    """int64 [K, N]: the place of the last image that is as likely; None if no two are."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "Ranking":
        """Of logits [N, K] and labels [N, K] of 0 and 1."""
        rising, order = (-logits.T.contiguous()).sort(dim=-1, stable=True)
        last_tie = torch.searchsorted(rising, rising, right=True) - 1
        has_ties = bool((last_tie != torch.arange(len(labels))).any())
        return cls(order, labels.T.gather(1, order).double(), last_tie if has_ties else None)

    def precision(self, weights: Tensor | None = None) -> Tensor:
        """Average precision [K]: the mean, over images of the class, of the share of hits among all ranked no lower.

        Images that are equally likely are taken in at once, so their order decides nothing. NaN without an image.

        Args:
            weights: how often each image counts, float64 [N]; once each when None.

        Source: scikit-learn, `average_precision_score`: Σ (R_n - R_{n-1}) P_n over distinct thresholds.
        """
        counts = torch.ones_like(self.is_hit) if weights is None else weights[self.order]
        hits = counts * self.is_hit
        precision = hits.cumsum(-1) / counts.cumsum(-1)
        if self.last_tie is not None:
            precision = precision.gather(1, self.last_tie)
        # Before the first image that counts, 0 / 0 stands; no hit is there.
        return (hits * precision.nan_to_num()).sum(-1) / hits.sum(-1)


def mean_of_classes(values: Tensor) -> float:
    """The mean of the values [K] that are there; 0 if none is."""
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else 0.0


class Tally(Protocol):
    """Answers counted batch by batch."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: logits [B, K], labels as in `Batch`."""

    def merged(self, parts: Sequence[Any]) -> "Tally":
        """What was counted of whole batches in turn, part 0 the first, as one that has counted them in their order.

        Args:
            parts: tallies of this class.
        """

    def score(self) -> Score:
        """Of all that was counted."""


class HitTally:
    """Counts right answers, one class an image."""

    def __init__(self) -> None:
        self.correct = 0
        self.n = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.correct += int((logits.argmax(dim=-1) == labels).sum())
        self.n += len(labels)

    def merged(self, parts: Sequence["HitTally"]) -> "HitTally":
        whole = HitTally()
        whole.correct, whole.n = sum(part.correct for part in parts), sum(part.n for part in parts)
        return whole

    def score(self) -> Accuracy:
        return Accuracy(self.correct, self.n)


class RankingTally:
    """Keeps all answers, since a ranking is one of all images."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.logits.append(logits.float().cpu())
        self.labels.append(labels.cpu())

    def merged(self, parts: Sequence["RankingTally"]) -> "RankingTally":
        whole = RankingTally()
        whole.logits = in_turn([part.logits for part in parts])
        whole.labels = in_turn([part.labels for part in parts])
        return whole

    def score(self) -> MeanPrecision:
        return MeanPrecision(torch.cat(self.logits), torch.cat(self.labels))


def in_turn(parts: Sequence[Sequence[V]]) -> list[V]:
    """The first of each part, the second of each, and so on."""
    return [one for turn in zip_longest(*parts) for one in turn if one is not None]


def new_tally(labels: Tensor) -> Tally:
    """For labels [B] or [B, K]."""
    return RankingTally() if labels.ndim == 2 else HitTally()
