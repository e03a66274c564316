"""What can be read off features by a linear map: ridge regression to latents, and finding the right latent by it.

Dimensions: n images that a probe is fitted on, N others, D width of the features, F numbers of a latent.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from trainer.alignment_metrics import BLOCK, Measured, of_mean

PENALTIES = torch.logspace(-5, 5, 21, dtype=torch.float64)
"""Tried, in units of the mean eigenvalue of the features."""


@dataclass(frozen=True, slots=True)
class RidgeFeatures:
    """Features that many latents are predicted from: all of ridge regression that does not depend on the latents."""

    mean: Tensor
    """float64 [1, D]."""
    scale: Tensor
    """float64 [1, D]."""
    directions: Tensor
    """float64 [D, r]: eigenvectors of the standardised features, divided by their singular values."""
    eigenvalues: Tensor
    """float64 [r]."""
    basis: Tensor
    """float64 [n, r]: the fitted images in orthonormal coordinates."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of the features [n, D] that probes are fitted on; those that do not vary are left out."""
        values = features.double()
        mean, std = values.mean(dim=0, keepdim=True), values.std(dim=0, correction=0, keepdim=True)
        scale = torch.where(std > 0, std, 1.0)
        standardised = (values - mean) / scale
        eigenvalues, vectors = torch.linalg.eigh(standardised.T @ standardised)
        is_there = eigenvalues > 1e-10 * eigenvalues.max().clamp_min(1e-300)
        eigenvalues, vectors = eigenvalues[is_there], vectors[:, is_there]
        directions = vectors / eigenvalues.sqrt()
        return cls(mean, scale, directions, eigenvalues, standardised @ directions)

    def coordinates(self, features: Tensor) -> Tensor:
        """Other features [N, D] in the coordinates of the fitted ones, [N, r]."""
        return (features.double() - self.mean) / self.scale @ self.directions

    def fit(self, latents: Tensor) -> "RidgeProbe":
        """The probe to latents [n, F] with the penalty that generalised cross-validation chooses.

        GCV(λ) = ‖Y - Ŷ‖² / (n - 1 - Σ f)² with f = s² / (s² + λ), s² the eigenvalues; the intercept takes the 1.

        Source: Golub, Heath and Wahba, Technometrics 21 (1979).
        """
        centre = latents.double().mean(dim=0)
        residual = latents.double() - centre
        weights = self.basis.T @ residual
        shrunk = self.eigenvalues / (self.eigenvalues + PENALTIES[:, None] * self.eigenvalues.mean())
        explained = weights.square().sum(dim=1)
        squares = residual.square().sum() - ((2 * shrunk - shrunk.square()) * explained).sum(dim=1)
        freedom = (len(latents) - 1 - shrunk.sum(dim=1)).clamp_min(1e-9)
        scores = squares.clamp_min(0) / freedom.square()
        best = int(scores.argmin())
        total = residual.square().mean(dim=0).sum().clamp_min(1e-300)
        expected = 1 - float(scores[best] * len(latents) / total)
        return RidgeProbe(shrunk[best][:, None] * weights, centre, expected)


@dataclass(frozen=True, slots=True)
class RidgeProbe:
    """A linear map from the coordinates of `RidgeFeatures` to latents."""

    weights: Tensor
    """float64 [r, F]."""
    centre: Tensor
    """float64 [F]."""
    expected_r2: float
    """What generalised cross-validation expects on other images, from the fitted ones alone."""

    def predict(self, coordinates: Tensor) -> Tensor:
        """Latents [N, F] of images in coordinates [N, r]."""
        return coordinates @ self.weights + self.centre


def r_squared(predicted: Tensor, latents: Tensor) -> Measured:
    """R² = 1 - Σ‖y - ŷ‖² / Σ‖y - ȳ‖² of predicted latents [N, F], at most 1; 0 or less where the mean does as well.

    Numbers of a latent count by their variance. ȳ is the mean of these very images.
    """
    errors = (latents.double() - predicted).square().sum(dim=1)
    around = (latents.double() - latents.double().mean(dim=0)).square().sum(dim=1)
    scale = around.mean().clamp_min(1e-300)
    missed = errors.mean() / scale
    return Measured(float(1 - missed), -(errors - missed * around) / scale)


def retrieval_ranks(predicted: Tensor, latents: Tensor) -> Tensor:
    """For each image how many latents of others are at least as near to its predicted latent as its own, int64 [N].

    Near by the cosine around the mean of the latents, since ridge regression predicts too small a length. Latents that
    are equal count against the image. Blockwise, as `neighbours`.
    """
    centre = latents.float().mean(dim=0)
    asked = functional.normalize(predicted.float() - centre, dim=1)
    known = functional.normalize(latents.float() - centre, dim=1)
    ranks = []
    for start in range(0, len(asked), BLOCK):
        alike = asked[start : start + BLOCK] @ known.T
        places = torch.arange(len(alike))
        own = alike[places, start + places]
        ranks.append((alike >= own[:, None]).sum(dim=1) - 1)
    return torch.cat(ranks)


def recall(ranks: Tensor, guesses: int) -> Measured:
    """R@k: the share of images whose own latent is among the k nearest to the predicted one, by chance k / N."""
    return of_mean((ranks < guesses).double())


def noise_ceiling(latents: Tensor, other_draw: Tensor) -> float:
    """The largest R² that any function of the image can reach: the share of the latents' variance that two draws share.

    Σ cov(y, y') / Σ (var y + var y')/2 over the numbers of a latent, [N, F] each. Given the image the draws are
    independent, so their covariance is the variance of E[y | image], the best prediction there is. To predict one draw
    by the other gives R² = 2·ceiling - 1 only, for then the other's noise is added.

    Source: Schoppe et al., Frontiers in Computational Neuroscience 10:10 (2016), signal power; for two repeats.
    """
    one, two = (values.double() - values.double().mean(dim=0) for values in (latents, other_draw))
    return float(2 * (one * two).sum() / (one.square().sum() + two.square().sum()).clamp_min(1e-300))
