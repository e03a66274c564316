"""Whether the features of an image-only student know the latents of a modality that it never sees.

Every measure is taken twice, as it is and with the mean of each class removed from both sides, for all of them rise
with nothing but how well classes are told apart. Its null is the same measure with latents shuffled within each class.

Dimensions: n images that probes are fitted on, N images measured, D width of features, F numbers of a latent,
R resamples, S shuffles.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor

from trainer.alignment_metrics import (
    NEIGHBOURS,
    Grams,
    Measured,
    Ranks,
    cka,
    cka_value,
    mutual_neighbours,
    neighbours,
    rsa,
    rsa_value,
    shuffled_neighbours,
)
from trainer.alignment_probes import RidgeFeatures, noise_ceiling, r_squared, recall, retrieval_ranks

Metric = Literal["cka", "rsa", "mutual-knn", "r2-pooled", "r2-flattened", "retrieval@1", "retrieval@5"]
METRICS: tuple[Metric, ...] = ("cka", "rsa", "mutual-knn", "r2-pooled", "r2-flattened", "retrieval@1", "retrieval@5")

Variant = Literal["raw", "within-class"]
VARIANTS: tuple[Variant, ...] = ("raw", "within-class")
"""As it is, and with class means removed."""

RESAMPLES = 1000
"""Of the bootstrap."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which images are which: those that probes are fitted on and those that are measured."""

    fit_labels: Tensor
    """int64 [n]."""
    labels: Tensor
    """int64 [N]."""


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers of both parts."""

    fit: Tensor
    """float32 [n, F]."""
    held: Tensor
    """float32 [N, F]."""

    def as_variant(self, variant: Variant, parts: Parts) -> "Table":
        """As it is, or each part without the mean of each class among its own images."""
        if variant == "raw":
            return self
        return Table(remove_class_means(self.fit, parts.fit_labels), remove_class_means(self.held, parts.labels))


@dataclass(frozen=True, slots=True)
class Target:
    """What features are compared with: the latents of a modality, or what another model says of the images."""

    name: str
    modalities: frozenset[str]
    """Whose latents are in it."""
    flattened: Table
    pooled: Table | None = None
    other_draw: Tensor | None = None
    """`flattened` of the measured images in a second draw, float32 [N, F]."""
    other_draw_pooled: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shuffle:
    """An order of the images within each class, of both parts and of the images that RSA samples."""

    fit: Tensor
    held: Tensor
    sample: Tensor

    @classmethod
    def of(cls, parts: Parts, sample: Tensor, seed: int) -> Self:
        generator = torch.Generator().manual_seed(seed)
        labels = (parts.fit_labels, parts.labels, parts.labels[sample])
        return cls(*(shuffle_within_class(one, generator) for one in labels))


@dataclass(frozen=True)
class PreparedTarget:
    """A target in one variant with all that does not depend on the features it is compared with."""

    target: Target
    variant: Variant
    parts: Parts

    @cached_property
    def flattened(self) -> Table:
        return self.target.flattened.as_variant(self.variant, self.parts)

    @cached_property
    def pooled(self) -> Table | None:
        return None if self.target.pooled is None else self.target.pooled.as_variant(self.variant, self.parts)

    @cached_property
    def grams(self) -> Grams:
        return Grams.of(self.flattened.held)

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks.of(self.flattened.held)

    @cached_property
    def neighbours(self) -> Tensor:
        return neighbours(self.flattened.held)

    @cached_property
    def ceilings(self) -> dict[Metric, float]:
        """The largest R² of each kind; empty where there is one draw."""
        target, found = self.target, dict[Metric, float]()
        draws = {
            "r2-flattened": (self.flattened, target.other_draw),
            "r2-pooled": (self.pooled, target.other_draw_pooled),
        }
        for metric, (table, other) in draws.items():
            if table is not None and other is not None:
                again = Table(other, other).as_variant(self.variant, Parts(self.parts.labels, self.parts.labels)).held
                found[metric] = noise_ceiling(table.held, again)  # type: ignore[index]
        return found


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number of one block of one run."""

    value: float
    deviations: Tensor
    """float32 [R]: how far it moves in each resample of the images."""
    nulls: Tensor
    """float64 [S]: what it is with latents shuffled within each class."""


Key = tuple[str, Variant, Metric]
"""Target, variant, metric."""


class ImageBootstrap:
    """Resamples of the measured images, the same for every number, so that differences are of the same images.

    A number moves by the mean of its influences over the drawn images: the bootstrap of its linear part, which never
    pairs an image with itself, as drawing rows twice would.

    Source: Efron and Tibshirani (1993), section 20.4; Efron (1982), chapter 6.
    """

    def __init__(self, n_images: int, resamples: int = RESAMPLES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.empty(resamples, n_images, dtype=torch.uint8)
        for row in self.weights:
            drawn = torch.randint(n_images, (n_images,), generator=generator)
            row.copy_(torch.bincount(drawn, minlength=n_images))

    def deviations(self, measured: Sequence[Measured]) -> Tensor:
        """Of each number in each resample, float32 [len(measured), R]."""
        influences = torch.stack([one.influence for one in measured]).float()
        moved = [influences @ part.float().T for part in torch.split(self.weights, 100)]
        return torch.cat(moved, dim=1) / influences.shape[1]


def remove_class_means(values: Tensor, labels: Tensor) -> Tensor:
    """Each row of values [N, F] minus the mean of the rows that share its label, int64 [N]."""
    counts = torch.bincount(labels).clamp_min(1).to(values.dtype)
    sums = torch.zeros(len(counts), values.shape[1], dtype=values.dtype).index_add_(0, labels, values)
    return values - (sums / counts[:, None])[labels]


def shuffle_within_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """An order of the images, int64 [N], that puts at each place an image of the same label; drawn uniformly."""
    by_class = labels.argsort(stable=True)
    shuffled = torch.randperm(len(labels), generator=generator)
    order = torch.empty_like(by_class)
    order[by_class] = shuffled[labels[shuffled].argsort(stable=True)]
    return order


def prepare_targets(targets: Sequence[Target], parts: Parts) -> list[PreparedTarget]:
    """Each target in each variant."""
    return [PreparedTarget(target, variant, parts) for target in targets for variant in VARIANTS]


def measure_block(
    features: Table, prepared: Sequence[PreparedTarget], parts: Parts, bootstrap: ImageBootstrap, n_shuffles: int
) -> dict[Key, Measurement]:
    """Every metric of a block's features against every target, with its null."""
    found: dict[Key, Measurement] = {}
    for variant in VARIANTS:
        side = FeatureSide(features.as_variant(variant, parts))
        for target in prepared:
            if target.variant == variant:
                measured = side.measure(target)
                nulls = list(side.nulls(target, parts, n_shuffles))
                deviations = bootstrap.deviations(list(measured.values()))
                for (metric, one), moved in zip(measured.items(), deviations, strict=True):
                    shuffled = torch.tensor([null[metric] for null in nulls], dtype=torch.float64)
                    found[target.target.name, variant, metric] = Measurement(one.value, moved, shuffled)
    return found


class FeatureSide:
    """The features of a block with all that does not depend on the target."""

    def __init__(self, features: Table) -> None:
        self.grams = Grams.of(features.held)
        self.ranks = Ranks.of(features.held)
        self.neighbours = neighbours(features.held)
        self.ridge = RidgeFeatures.of(features.fit)
        self.coordinates = self.ridge.coordinates(features.held)

    def measure(self, target: PreparedTarget) -> dict[Metric, Measured]:
        """All metrics with their influences."""
        return {
            "cka": cka(self.grams, target.grams),
            "rsa": rsa(self.ranks, target.ranks),
            "mutual-knn": mutual_neighbours(self.neighbours, target.neighbours),
            **self._probes(target.flattened, target.pooled),
        }

    def nulls(self, target: PreparedTarget, parts: Parts, n_shuffles: int) -> Iterator[Mapping[Metric, float]]:
        """All metrics for latents shuffled within each class; the probes are fitted to shuffled ones as well."""
        for seed in range(n_shuffles):
            order = Shuffle.of(parts, self.ranks.sample, seed)
            flattened = _shuffled(target.flattened, order)
            pooled = None if target.pooled is None else _shuffled(target.pooled, order)
            found: dict[Metric, float] = {
                "cka": cka_value(self.grams, Grams.of(flattened.held)),
                "rsa": rsa_value(self.ranks, target.ranks.shuffled(order.sample)),
                "mutual-knn": mutual_neighbours(
                    self.neighbours, shuffled_neighbours(target.neighbours, order.held)
                ).value,
            }
            yield found | {metric: one.value for metric, one in self._probes(flattened, pooled).items()}

    def _probes(self, flattened: Table, pooled: Table | None) -> dict[Metric, Measured]:
        predicted = self.ridge.fit(flattened.fit).predict(self.coordinates)
        ranks = retrieval_ranks(predicted, flattened.held)
        found: dict[Metric, Measured] = {
            "r2-flattened": r_squared(predicted, flattened.held),
            "retrieval@1": recall(ranks, 1),
            "retrieval@5": recall(ranks, 5),
        }
        if pooled is not None:
            of_pooled = self.ridge.fit(pooled.fit).predict(self.coordinates)
            found["r2-pooled"] = r_squared(of_pooled, pooled.held)
        return found


def _shuffled(table: Table, order: Shuffle) -> Table:
    return Table(table.fit[order.fit], table.held[order.held])


def chance(metric: Metric, n_images: int) -> float:
    """What a metric is for features that know nothing: of N images, or 0 where their number does not matter."""
    by_chance = {"mutual-knn": NEIGHBOURS / (n_images - 1), "retrieval@1": 1 / n_images, "retrieval@5": 5 / n_images}
    return by_chance.get(metric, 0.0)
