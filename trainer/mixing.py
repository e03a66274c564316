"""Mixup and CutMix: two images as one, and their labels in the same shares.

Neighbours (2i, 2i + 1) of the labelled part are mixed with one another. Shares and boxes are a pure function of the
seed, both image IDs and the number of the view, so that it does not matter how a batch is cut for processes, as long
as no pair is.

Dimensions: B images, S side of a view, K classes.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dla_cache.errors import SpecError
from dla_cache.spec import StrictModel
from trainer.objectives.cross_entropy import MixedLabels

if TYPE_CHECKING:
    from trainer.config import RunConfig

Alpha = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MixingConfig(StrictModel):
    """How often and how labelled images are mixed in pairs; the defaults are DeiT's. With both alphas above 0 each pair
    is mixed in one way or the other, by even chance.

    Source: mixup arXiv:1710.09412, CutMix arXiv:1905.04899, both as in DeiT, arXiv:2012.12877.
    """

    mixup_alpha: Alpha = 0.8
    """Of the Beta(alpha, alpha) that the share of the first image is drawn from; 0 for no mixup."""
    cutmix_alpha: Alpha = 1.0
    """Of the Beta(alpha, alpha) that the area left to the first image is drawn from; 0 for no CutMix."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of a pair to be mixed."""

    @model_validator(mode="after")
    def _mixes_in_a_way(self) -> Self:
        if not self.mixup_alpha and not self.cutmix_alpha:
            raise ValueError("`mixup_alpha` and `cutmix_alpha` are both 0: leave `mixing` out")
        return self


def refuse_mixing(config: "RunConfig", *, reference_sees_latents: bool, has_stored_targets: bool) -> None:
    """Passes runs without mixing, and those whose targets stay right under it.

    Args:
        reference_sees_latents: whether the run's own model, or the one it learns from, reads latents.
        has_stored_targets: whether it learns from targets that were stored.

    Raises:
        SpecError: with the reason.
    """
    if config.mixing is None:
        return
    reason = None
    active = {} if config.objective is None else config.objective.active
    one_class = [name for name, term in active.items() if term.wants_one_class]
    if config.kind == "probe":
        reason = "a probe sees no image"
    elif has_stored_targets:
        reason = "targets are stored for single images, and no sum of two is what the teacher says of both mixed"
    elif one_class:
        reason = f"`{one_class[0]}` asks for the class of an image, and one of two mixed has two"
    elif reference_sees_latents:
        of_objective = config.objective is not None and config.objective.modalities
        whose = "the teacher" if config.kind == "teacher" else f"the model in `{config.teacher}`"
        whose = "`objective.latents`" if of_objective else whose
        reason = f"{whose} reads latents, and there are none of two images mixed"
    elif config.objective is not None and config.objective.crd is not None:
        reason = "`crd` remembers what each image looks like, and two mixed look like neither"
    if reason is not None:
        raise SpecError(
            f"`mixing` would teach something wrong: {reason}",
            hint="--set mixing=null; it fits students of labels alone, and of an image-only model",
        )
    check_pairs(config.labelled_per_batch)


def check_pairs(n_labelled: int) -> None:
    """Passes an even number of labelled images, of a batch or of the part of it that one process sees at a time.

    Raises:
        SpecError: if one would be left over.
    """
    if n_labelled % 2:
        raise SpecError(
            f"`mixing` takes labelled images in pairs, and {n_labelled} of them are seen at a time",
            hint="choose `labelled_per_batch` so that every process and every accumulated part gets an even number",
        )


def mix_pairs(
    config: MixingConfig, seed: int, draw: int, image_ids: Sequence[str], pixels: Tensor, labels: Tensor
) -> tuple[Tensor, MixedLabels]:
    """Views of which the first, labelled ones are mixed in pairs; the others stay as they are.

    Args:
        seed: of the views.
        draw: the number of the view.
        image_ids: of the labelled images, an even number of them.
        pixels: [B, 3, S, S], normalised.
        labels: [B] or [B, K], as in `Batch`.
    """
    check_pairs(len(image_ids))
    mixed, partner = pixels.clone(), labels.clone()
    shares = torch.ones(len(labels))
    for first in range(0, len(image_ids), 2):
        pair, turned = slice(first, first + 2), [first + 1, first]
        mixed[pair], shares[pair] = _mix(_generator(seed, draw, image_ids[pair]), config, pixels[pair], pixels[turned])
        partner[pair] = labels[turned]
    return mixed, MixedLabels(partner, shares.to(pixels.device))


def _mix(generator: np.random.Generator, config: MixingConfig, pixels: Tensor, others: Tensor) -> tuple[Tensor, float]:
    """A pair of views, mixed with its other order, and the share that each keeps."""
    if generator.random() >= config.probability:
        return pixels, 1.0
    both = bool(config.mixup_alpha and config.cutmix_alpha)
    if config.mixup_alpha and not (both and generator.random() < 0.5):
        share = float(generator.beta(config.mixup_alpha, config.mixup_alpha))
        return share * pixels + (1 - share) * others, share
    side = math.sqrt(1 - float(generator.beta(config.cutmix_alpha, config.cutmix_alpha)))
    size = pixels.shape[-1]
    (top, bottom), (left, right) = (_cut(centre, side, size) for centre in generator.random(2))
    mixed = pixels.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    # What of the box lies in the image, not what was drawn.
    return mixed, 1 - (bottom - top) * (right - left) / size**2


def _cut(centre: float, side: float, size: int) -> tuple[int, int]:
    """Where the part of a box that lies in the image begins and ends; centre and side in fractions of it."""
    half, middle = int(side * size) // 2, int(centre * size)
    return max(0, middle - half), min(size, middle + half)


def _generator(seed: int, draw: int, image_ids: Sequence[str]) -> np.random.Generator:
    """A counter-based generator of this pair's own."""
    text = "\0".join([str(draw), *image_ids]).encode()
    key = hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little"), person=b"mixing").digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
