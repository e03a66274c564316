"""Generators of videos: frames of a shape of their own, and latents too large to be stored as they are."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from dla_cache.errors import SourceError
from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.diffusers_source import FixUp
from dla_cache.sources.reductions import last_of_groups, mean_of_squares


class FewerFrames(FixUp):
    """Latents [B, F, C, H, W] with the frames and the places that a spec keeps."""

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        self.kept_frames, self.pooled_by = int(settings["kept_frames"]), int(settings["pooled_by"])

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        return mean_of_squares(last_of_groups(latents, self.kept_frames), self.pooled_by)


class FewerPackedFrames(FixUp):
    """Packed latents [B, F * H * W, C], the places of a frame in a row, with the frames that a spec keeps.

    A token is one place of one frame, as in every checkpoint of LTX-Video.
    """

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        self.kept_frames = int(settings["kept_frames"])
        self.n_frames = (int(settings["num_frames"]) - 1) // pipeline.vae_temporal_compression_ratio + 1

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        frames = latents.reshape(n_images, self.n_frames, -1, latents.shape[-1])
        return last_of_groups(frames, self.kept_frames).flatten(1, 2)


class InWideFrame(FewerFrames):
    """The square view in the middle of a frame of the one size that the checkpoint knows, its latent cut out again.

    What is left and right of it, or above and below, is its mirror image: the pipeline by itself would stretch it.
    """

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        super().__init__(pipeline, row, settings)
        config = pipeline.transformer.config
        if config.patch_size_t is not None:
            raise SourceError(
                "this is a checkpoint of CogVideoX 1.5, which puts out frames that are padding",
                hint="take one of CogVideoX 1.0, as THUDM/CogVideoX-5b-I2V",
            )
        self.height, self.width = config.sample_height, config.sample_width
        self.side = min(self.height, self.width)
        self.longest_text = config.max_text_seq_length

    def arguments(self, n_images: int) -> Mapping[str, Any]:
        return {"max_sequence_length": self.longest_text}

    def images(self, pixels: torch.Tensor) -> list[Image.Image]:
        across, down = (pixels.shape[-1] * (side - self.side) // (2 * self.side) for side in (self.width, self.height))
        # Pads float tensors alone.
        framed = torch.nn.functional.pad(pixels.float(), (across, across, down, down), mode="reflect").byte()
        return [Image.fromarray(image) for image in framed.permute(0, 2, 3, 1).contiguous().numpy()]

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        top, left = (self.height - self.side) // 2, (self.width - self.side) // 2
        return super().latents(latents[..., top : top + self.side, left : left + self.side], n_images)
