"""Runs a row of the catalog: a pipeline of diffusers, called as its users call it, whose decoder must not be."""

import importlib
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_dispatch import attention_backend
from numpy.typing import NDArray
from PIL import Image

from dla_cache.errors import SourceError, SpecError
from dla_cache.lacking import only_errors, require_finite
from dla_cache.sources import Encoded
from dla_cache.sources.captions import BlipCaptioner, open_captioner, require_no_caption_settings
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.entry import CAPTION, TEXT_SETTINGS, PipelineRow, Scalar
from dla_cache.sources.loading import (
    ATTENTION,
    COMPUTE_DTYPES,
    guarded,
    load_pipeline,
    made_with,
    parse_parameters,
    refuse_global_draws,
    told_as_source_error,
)
from dla_cache.sources.presets import preset_of, preset_settings
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import joint_hash


class FixUp:
    """What a row of data cannot say; the base class says nothing."""

    view_size = 0
    """Side of the view in pixels, once the source is open."""

    @classmethod
    def check(cls, source: str, settings: Mapping[str, Any]) -> None:
        """Raises a `SourceError` for settings that cannot be, before anything is loaded."""

    def __init__(self, pipeline: Any, row: PipelineRow, settings: Mapping[str, Any]) -> None:
        """Changes the pipeline where it has to be changed, once, after it was loaded."""
        self.pipeline, self.text_argument = pipeline, row.text_argument

    def images(self, pixels: torch.Tensor) -> Any:
        """What the call takes in place of the images, of pixels uint8 [B, 3, S, S]; for the form `fix-up`."""
        raise NotImplementedError

    def texts(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """The arguments that tell a call the texts, one an image."""
        return {self.text_argument: list(texts)}

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
        texts = TEXT_SETTINGS if row.text_argument else {}
        self.parameters, self.settings = parse_parameters(
            spec, {**texts, **row.settings, **row.fix_up_settings, **preset_settings(row)}, row
        )
        preset = preset_of(row, {name: self.settings.pop(name) for name in preset_settings(row)})
        fix_up = _class_of(row.fix_up) if row.fix_up else FixUp
        fix_up.check(spec.source, self.settings)
        self.view_size = self.parameters.view_size or row.view_size
        self.texts = {name: self.settings.pop(name) for name in texts}
        self.prompt = str(self.texts.get("prompt", ""))
        if CAPTION not in self.prompt:
            self.texts.pop("caption_tokens", None)
            require_no_caption_settings(spec.source, self.parameters)
        with told_as_source_error(spec.source):
            self.pipeline, hashes, origin, self.lacking = load_pipeline(entry, row, self.parameters, preset, device)
            if row.text_argument:
                require_prompt_fits(spec.source, self.pipeline, self.prompt, self.settings)
            self.fix_up: FixUp = fix_up(self.pipeline, row, self.settings)
        self.fix_up.view_size = self.view_size
        self.settings |= preset.of_recipe()
        self.captioner: BlipCaptioner | None = None
        if CAPTION in self.prompt:
            self.captioner, captioner_hashes, captioner_origin = open_captioner(
                self.parameters, int(self.texts["caption_tokens"]), device
            )
            hashes, origin = hashes | captioner_hashes, origin | captioner_origin
        self.tolerance = row.tolerance
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
            **dict.fromkeys(row.side_arguments, self.view_size),
            **{name: self.settings[name] for name in row.settings if name in self.settings},
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            **self.fix_up.arguments(n_images),
        }
        if row.image_form != "none":
            arguments[row.image_argument] = self._images(torch.from_numpy(pixels))
        if row.text_argument:
            described = captions or [""] * n_images
            arguments |= self.fix_up.texts([self.prompt.replace(CAPTION, caption) for caption in described])
        if row.batch_argument:
            arguments[row.batch_argument] = n_images
        with torch.inference_mode(), only_errors(), attention_backend(ATTENTION), guarded(self.pipeline, row.guard):
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
        with told_as_source_error(spec.source), refuse_global_draws(spec.source, self.pipeline.device):
            latents = self.encode(grey, [0]).latents
        require_finite(spec.source, latents, self.parameters.compute_dtype, self.lacking)
        shape = latents.shape[1:]
        scheduler = getattr(self.pipeline, "scheduler", None)
        told: dict[str, Scalar] = {"view_size": self.view_size}
        if scheduler is not None:
            told["scheduler"] = type(scheduler).__name__
        if len(shape) != len(self.row.axes):
            raise SourceError(
                f"`{spec.source}` puts out {list(shape)}, its row says the axes {', '.join(self.row.axes)}",
                hint="install the version of diffusers that dla's constraints name",
            )
        return Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=joint_hash(dict(hashes)),
            parameters={**self.parameters.of_recipe(), **self.settings, **self.texts, **told},
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


def require_prompt_fits(source: str, pipeline: Any, prompt: str, settings: Mapping[str, Any]) -> None:
    """A prompt whose own words, those around the caption, go through one of the tokenizers whole.

    Raises:
        SpecError: if all cut it off: what stands behind, maybe the caption, would be lost without a word.
    """
    most = float(settings.get("max_sequence_length", "inf"))
    found = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    with only_errors():
        lengths = [
            (len(tokenizer(prompt.replace(CAPTION, "")).input_ids), min(tokenizer.model_max_length, most))
            for tokenizer in found
            if tokenizer is not None
        ]
    if lengths and all(length > longest for length, longest in lengths):
        length, longest = max(lengths, key=lambda pair: pair[1])
        raise SpecError(
            f"the prompt of `{source}` has {length} tokens, and {longest:g} are read: the rest would be lost",
            hint="make it shorter",
        )


def _class_of(location: str) -> Any:
    module, name = location.split(":")
    return getattr(importlib.import_module(module), name)


assert diffusers  # imported first, so that a missing library is told as such
