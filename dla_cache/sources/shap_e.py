"""Shap-E takes the first of several images and says nothing; its latents are too large to be stored as they are."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.diffusers_source import FixUp
from dla_cache.sources.reductions import mean_of_groups


class EveryImage(FixUp):
    """All images as the pixel values that its image processor makes of them, of which the pipeline takes every one."""

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        self.pooled_tokens = int(settings["pooled_tokens"])

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        pictures = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
        values: torch.Tensor = self.pipeline.image_processor(pictures, return_tensors="pt").pixel_values
        return values

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        return mean_of_groups(latents, self.pooled_tokens)
