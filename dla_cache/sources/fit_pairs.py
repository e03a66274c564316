"""What the embedded sources are fitted on: an image and what belongs to it in another modality, as a picture.

Legend: N fitted images, H held-out images, B images of a batch. Pictures are float32 in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dla_cache.data.relief_digits import Rendering, render_split
from dla_cache.data.spoken_digits import load_spoken_digits
from dla_cache.errors import SpecError
from dla_cache.sources.networks import SIDE, to_model_range

HELD_OUT_RENDERS = 4
"""Every fourth picture of a held-out digit is scored: the eight renders of a digit tell nearly the same."""

HELD_OUT_VOICES = ("espeak-en-gb-x-rp+f2", "flite-slt")
"""No clip of theirs is fitted on."""

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Images [B, 3, 32, 32] and targets [B, 1, 32, 32]."""

    pixels: Tensor
    targets: Tensor


class FitPairs(Protocol):
    """The pairs of one modality."""

    fitted_pixels: Tensor
    """[N, 3, 32, 32]."""
    held_out_pixels: Tensor
    """[H, 3, 32, 32]."""

    def batch(self, seed: int, step: int, size: int) -> PairBatch:
        """A batch that depends on (seed, step) only."""

    def targets(self) -> Tensor:
        """Fitted targets [n, 1, 32, 32] whose latents have the mean and spread of all."""

    def mean_latents(self, encode: Map) -> Tensor:
        """The latent [N, 128] that the pairs make of each fitted image on average: what ridge regression aims at."""

    def score_autoencoder(self, encode: Map, decode: Map) -> dict[str, float]:
        """Held-out scores of the latent space itself."""

    def score_latents(self, latents: Tensor, encode: Map, decode: Map) -> dict[str, float]:
        """Scores of the latents [H, 8, 4, 4] that a source made of the held-out images."""


@dataclass(frozen=True, slots=True)
class SplitImages:
    """The generator's own split, some of its digits held out."""

    plan: list[Rendering]
    pixels: Tensor
    """[all, 3, 32, 32]."""
    depth: Tensor
    """[all, 1, 32, 32]."""
    is_held: np.ndarray
    scored: np.ndarray
    """Positions of the held-out images that are scored, [H]."""


def split_images(held_out_digits: int) -> SplitImages:
    """Renders the generator's split.

    Raises:
        SpecError: if holding out so many digits leaves none to fit on.
    """
    plan, pixels, depth = render_split("generator")
    names = [rendering.image_id.rsplit("-render-", 1)[0] for rendering in plan]
    digits = sorted(set(names))
    if held_out_digits >= len(digits):
        raise SpecError(
            f"`held_out_digits` is {held_out_digits}, the generator's split has {len(digits)} digits in all",
            hint=f"hold out at most {len(digits) - 1}",
        )
    held = set(digits[:: len(digits) // held_out_digits][:held_out_digits])
    is_held = np.array([name in held for name in names])
    scored = np.flatnonzero(is_held)[::HELD_OUT_RENDERS]
    return SplitImages(plan, to_model_range(pixels), to_model_range(depth)[:, None], is_held, scored)


def shifted(pictures: Tensor, rng: np.random.Generator, shift: int) -> Tensor:
    """Pictures [B, C, 32, 32], each moved by up to `shift` pixels, its border repeated."""
    if not shift:
        return pictures
    padded = functional.pad(pictures, (shift,) * 4, mode="replicate")
    corners = rng.integers(2 * shift + 1, size=(len(pictures), 2)).tolist()
    return torch.stack([p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, corners, strict=True)])


class DepthPairs:
    """An image and its true depth. No label is seen."""

    def __init__(self, images: SplitImages, shift: int) -> None:
        self.shift = shift
        self.fitted_pixels = images.pixels[~images.is_held]
        self.fitted_depth = images.depth[~images.is_held]
        self.held_out_pixels = images.pixels[images.scored].contiguous()
        self.held_out_depth = images.depth[images.scored].contiguous()

    def batch(self, seed: int, step: int, size: int) -> PairBatch:
        """Image and depth are shifted together."""
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        rows = torch.from_numpy(rng.integers(len(self.fitted_pixels), size=size))
        both = shifted(torch.cat([self.fitted_pixels[rows], self.fitted_depth[rows]], dim=1), rng, self.shift)
        return PairBatch(both[:, :3].contiguous(), both[:, 3:].contiguous())

    def targets(self) -> Tensor:
        return self.fitted_depth[::8]

    def mean_latents(self, encode: Map) -> Tensor:
        return torch.cat([encode(depth) for depth in torch.split(self.fitted_depth, 512)]).flatten(1)

    def score_autoencoder(self, encode: Map, decode: Map) -> dict[str, float]:
        scores = self.score_latents(encode(self.held_out_depth), encode, decode)
        return scores | {"selection": scores["depth_correlation"]}

    def score_latents(self, latents: Tensor, encode: Map, decode: Map) -> dict[str, float]:
        """Mean correlation of decoded and true depth per image, and R² of the latents over the held-out pairs."""
        truth = encode(self.held_out_depth)
        residual = (latents - truth).square().sum()
        spread = (truth - truth.mean(dim=0)).square().sum()
        pairs = torch.stack([decode(latents).flatten(1), self.held_out_depth.flatten(1)])
        centred = pairs - pairs.mean(dim=2, keepdim=True)
        correlation = functional.cosine_similarity(centred[0], centred[1], dim=1).mean()
        r2 = float(1 - residual / spread)
        return {"depth_correlation": float(correlation), "latent_r2": r2, "selection": r2}


class AudioPairs:
    """An image of a digit and, drawn anew for every batch, a clip of that digit: pairing goes by label."""

    def __init__(self, images: SplitImages, shift: int) -> None:
        self.shift = shift
        labels = torch.tensor([rendering.label for rendering in images.plan])
        self.fitted_pixels = images.pixels[~images.is_held]
        self.fitted_labels = labels[~images.is_held]
        self.held_out_pixels = images.pixels[images.scored].contiguous()
        self.held_out_labels = labels[images.scored]
        spoken = load_spoken_digits()
        is_held = np.isin(spoken.voices, HELD_OUT_VOICES)
        clips = to_model_range(spoken.clips)[:, None]
        self.clips, self.held_out_clips = clips[~is_held], clips[is_held]
        self.clip_labels = torch.from_numpy(spoken.labels[~is_held]).long()
        self.clips_of = [torch.nonzero(self.clip_labels == label)[:, 0] for label in range(10)]

    def batch(self, seed: int, step: int, size: int) -> PairBatch:
        """The image is shifted, and apart from it the clip."""
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        rows = torch.from_numpy(rng.integers(len(self.fitted_pixels), size=size))
        of_label = [self.clips_of[label] for label in self.fitted_labels[rows].tolist()]
        chosen = torch.stack([clips[int(rng.integers(len(clips)))] for clips in of_label])
        pixels = shifted(self.fitted_pixels[rows], rng, self.shift)
        return PairBatch(pixels, shifted(self.clips[chosen], rng, self.shift))

    def targets(self) -> Tensor:
        return self.clips

    def mean_latents(self, encode: Map) -> Tensor:
        latents = encode(self.clips).flatten(1)
        of_label = torch.stack([latents[clips].mean(dim=0) for clips in self.clips_of])
        return of_label[self.fitted_labels]

    def score_autoencoder(self, encode: Map, decode: Map) -> dict[str, float]:
        """R² of the pictures of voices that were not fitted on."""
        clips = self.held_out_clips
        residual = (decode(encode(clips)) - clips).square().sum()
        r2 = float(1 - residual / (clips - clips.mean(dim=0)).square().sum())
        return {"picture_r2": r2, "selection": r2}

    def score_latents(self, latents: Tensor, encode: Map, decode: Map) -> dict[str, float]:
        """How often the fitted clip nearest to the decoded picture says the digit in the image."""
        nearest = torch.cdist(decode(latents).flatten(1), self.clips.flatten(1)).argmin(dim=1)
        right = float((self.clip_labels[nearest] == self.held_out_labels).float().mean())
        return {"right_digit": right, "selection": right}
