"""Marigold puts its latent out when asked, and decodes it nevertheless."""

from collections.abc import Mapping
from typing import Any

import torch

from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.diffusers_source import FixUp


class WithoutDecoding(FixUp):
    """Decoding replaced by blank pictures, which nobody looks at: the latent is to the bit the one it was before.

    Latents of intrinsics lie one after another in the batch, all of the first image first: they become channels.
    """

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        pipeline.decode_prediction = blank

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        return latents.reshape(n_images, -1, *latents.shape[-2:])


def blank(latents: torch.Tensor) -> torch.Tensor:
    """A picture of nothing in the place of each latent."""
    return latents.new_zeros(len(latents), 3, 8 * latents.shape[-2], 8 * latents.shape[-1])
