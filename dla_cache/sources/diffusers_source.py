"""Runs a row of the catalog: a pipeline of diffusers, called as its users call it, whose decoder must not be."""

import importlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dla_cache.errors import SourceError
from dla_cache.sources import Encoded
from dla_cache.sources.captions import CAPTION, Captioner, open_captioner
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.entry import PipelineRow, Scalar
from dla_cache.sources.loading import (
    COMPUTE_DTYPES,
    guarded,
    load_pipeline,
    made_with,
    parse_parameters,
    told_as_source_error,
)
from dla_cache.sources.weights import joint_hash
from dla_cache.spec import LatentFormat, LatentSpec, Recipe


class FixUp:
    """What a row of data cannot say; the base class says nothing."""

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        """Changes the pipeline where it has to be changed, once, after it was loaded."""
        self.pipeline = pipeline

    def images(self, pixels: torch.Tensor) -> Any:
        """What the call takes in place of the images, of pixels uint8 [B, 3, S, S]; for the form `fix-up`."""
        raise NotImplementedError

    def arguments(self, n_images: int) -> Mapping[str, Any]:
        """Further arguments of a call with so many images."""
        return {}

    def latents(self, latents: torch.Tensor, n_images: int) -> torch.Tensor:
        """[B, *shape] of what the pipeline put out for so many images."""
        return latents


class DiffusersSource:
    """A pipeline with image input, stopped before its decoder."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = self.row = entry.row
        assert isinstance(row, PipelineRow)
        texts = {"prompt": CAPTION} if row.text_argument else {}
        self.parameters, self.settings = parse_parameters(spec, {**texts, **row.settings}, row)
        with told_as_source_error(spec.source):
            self.pipeline, hashes, origin = load_pipeline(entry, row, self.parameters, device)
            fix_up = _class_of(row.fix_up) if row.fix_up else FixUp
            self.fix_up: FixUp = fix_up(self.pipeline, row, self.settings)
        self.prompt = str(self.settings.pop("prompt", ""))
        self.captioner: Captioner | None = None
        if CAPTION in self.prompt:
            self.captioner, captioner_hashes, captioner_origin = open_captioner(self.parameters, device)
            hashes, origin = hashes | captioner_hashes, origin | captioner_origin
        self.tolerance = row.tolerance
        self.view_size = self.parameters.view_size or row.view_size
        self.made_with = made_with(device, origin)
        self.recipe = self._recipe(spec, hashes)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> Encoded:
        """Raw latents [B, *shape], as the pipeline puts them out in float32, and the captions if there are any."""
        captions = self.captioner.describe(pixels) if self.captioner is not None else []
        size = self.row.largest_batch or len(pixels)
        parts = [
            self._call(pixels[start : start + size], seeds[start : start + size], captions[start : start + size])
            for start in range(0, len(pixels), size)
        ]
        return Encoded(np.concatenate(parts), captions)

    def _call(self, pixels: NDArray[np.uint8], seeds: Sequence[int], captions: Sequence[str]) -> NDArray[np.float32]:
        row, n_images = self.row, len(pixels)
        arguments = {
            **row.call,
            **self.settings,
            row.image_argument: self._images(torch.from_numpy(pixels)),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **self.fix_up.arguments(n_images),
        }
        if row.text_argument:
            described = captions or [""] * n_images
            arguments[row.text_argument] = [self.prompt.replace(CAPTION, caption) for caption in described]
        if row.batch_argument:
            arguments[row.batch_argument] = n_images
        with torch.inference_mode(), guarded(self.pipeline, row.guard):
            put_out = self.pipeline(**arguments)
        try:
            latents = reduce(getattr, row.output.split("."), put_out)
        except AttributeError as error:
            raise SourceError(
                f"`{row.pipeline}` put out no `{row.output}`: it has {', '.join(f'`{name}`' for name in put_out)}",
                hint="install the version of diffusers that dla's constraints name",
            ) from error
        latents = self.fix_up.latents(latents, n_images)
        if not isinstance(latents, torch.Tensor) or len(latents) != n_images:
            found = list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
            raise SourceError(
                f"`{row.pipeline}` put out `{row.output}` {found} for {n_images} images",
                hint="the pipeline does not take a batch of images: its row needs a fix-up",
            )
        array: NDArray[np.float32] = latents.float().cpu().numpy()
        return array

    def _images(self, pixels: torch.Tensor) -> Any:
        if self.row.image_form == "fix-up":
            return self.fix_up.images(pixels)
        if self.row.image_form == "pil":
            return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
        unit = pixels.to(self.pipeline.device, COMPUTE_DTYPES[self.parameters.compute_dtype]) / 255
        return unit if self.row.image_form == "unit" else 2 * unit - 1

    def _recipe(self, spec: LatentSpec, hashes: Mapping[str, str]) -> Recipe:
        """The recipe; a grey image tells the shape, which depends on the checkpoint and on the view."""
        grey = np.full((1, 3, self.view_size, self.view_size), 127, np.uint8)
        with told_as_source_error(spec.source):
            shape = self.encode(grey, [0]).latents.shape[1:]
        scheduler = getattr(self.pipeline, "scheduler", None)
        told: dict[str, Scalar] = {"view_size": self.view_size}
        if scheduler is not None:
            told["scheduler"] = type(scheduler).__name__
        if self.row.text_argument:
            told["prompt"] = self.prompt
        if len(shape) != len(self.row.axes):
            raise SourceError(
                f"`{spec.source}` puts out {list(shape)}, its row says the axes {', '.join(self.row.axes)}",
                hint="install the version of diffusers that dla's constraints name",
            )
        return Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=joint_hash(dict(hashes)),
            parameters={**self.parameters.of_recipe(), **self.settings, **told},
            seed=spec.seed,
            source_view_size=self.view_size,
            format=LatentFormat(
                kind="continuous", shape=shape, axes=self.row.axes, dtype=spec.dtype, space=self.row.space
            ),
        )

    def close(self) -> None:
        """Frees the device."""
        del self.pipeline, self.fix_up, self.captioner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _class_of(location: str) -> Any:
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)


assert diffusers  # imported first, so that a missing library is told as such
