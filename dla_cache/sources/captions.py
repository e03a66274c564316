"""Images described in words, which pipelines that take text are asked with; and a modality of its own: what was said.

The captioner is BLIP, and always takes the most likely word: nothing is drawn, and what it says of an image depends on
the image alone. What a caption gives away is the subject of `dla_cache.leaks`.
"""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from dla_cache.errors import SourceError, SpecError, name_some
from dla_cache.leaks import mask_captions
from dla_cache.sources import Encoded
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.entry import CAPTION, CAPTIONER, Scalar
from dla_cache.sources.loading import (
    CommonParameters,
    load_model,
    made_with,
    origin_of,
    parse_parameters,
    told_as_source_error,
)
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import find_weights

SMALLEST_INTEGER = (("uint8", 2**8), ("int16", 2**15), ("int32", 2**31))
"""What holds codes, and how many different ones."""


class NumbersOnly(LogitsProcessor):
    """Passes scores on as they are. Among NaN some code would be the most likely, and give a text like any other."""

    def __init__(self, lacking: Sequence[str]) -> None:
        self.lacking = lacking

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            SourceError: if one is no number.
        """
        if scores.isnan().any():
            why = f": the checkpoint has no {name_some(self.lacking)}" if self.lacking else ""
            raise SourceError(
                f"a model of texts or sounds put out scores that are no numbers{why}",
                hint="take a checkpoint of this very model, or another `compute_dtype`",
            )
        return scores


class BlipCaptioner:
    """BLIP, greedy: of an image the same words whatever else is in the batch."""

    def __init__(self, folder: Path, device: str, parameters: CommonParameters, caption_tokens: int) -> None:
        from transformers import BlipImageProcessorPil  # here, as not every version of the library has it

        if caption_tokens < 1:
            raise SpecError(f"`caption_tokens` is {caption_tokens}, below 1", hint="raise it, or leave it out")
        model, self.lacking = load_model("transformers.BlipForConditionalGeneration", folder, parameters)
        self.model = model.to(device)
        # By name: the other one, of torchvision, makes other pixels, and is taken wherever that is installed.
        self.processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.caption_tokens, self.masked_words = caption_tokens, parameters.masked_words

    def describe(self, pixels: NDArray[np.uint8]) -> list[str]:
        """One text an image, of pixels uint8 [B, 3, S, S], without the masked words."""
        return self._without_masked(texts_of(self.say(pixels), self.tokenizer))

    def describe_in_codes(self, pixels: NDArray[np.uint8]) -> tuple[list[str], NDArray[np.int64]]:
        """The same and, for each text, codes [B, caption_tokens] of the tokenizer's vocabulary."""
        codes = self.say(pixels)
        captions = texts_of(codes, self.tokenizer)
        if not self.masked_words:
            return captions, codes
        captions = self._without_masked(captions)
        encoded = self.tokenizer(captions, add_special_tokens=False).input_ids
        return captions, self._filled_up([tokens[: self.caption_tokens] for tokens in encoded])

    @property
    def vocabulary(self) -> int:
        """How many codes a caption may hold: a model may know more than its tokenizer has words for."""
        return max(len(self.tokenizer), int(self.model.config.text_config.vocab_size))

    def say(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes [B, caption_tokens] of what is in each image, without those of beginning and end, filled up with that
        of padding: a batch's own padding, which reaches as far as its longest caption, is not to be seen."""
        pictures = [Image.fromarray(image) for image in np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))]
        inputs = self.processor(pictures, return_tensors="pt").pixel_values
        with torch.inference_mode():
            said: torch.Tensor = self.model.generate(
                pixel_values=inputs.to(self.model.device, self.model.dtype),
                max_new_tokens=self.caption_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([NumbersOnly(self.lacking)]),
            )
        text = self.model.config.text_config
        ends = {text.sep_token_id, text.pad_token_id}
        return self._filled_up([list(takewhile(lambda token: token not in ends, row)) for row in said[:, 1:].tolist()])

    def _filled_up(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        codes = np.full((len(rows), self.caption_tokens), self.tokenizer.pad_token_id, np.int64)
        for place, row in enumerate(rows):
            codes[place, : len(row)] = row
        return codes

    def _without_masked(self, captions: list[str]) -> list[str]:
        return mask_captions(captions, self.masked_words) if self.masked_words else captions


def texts_of(codes: NDArray[np.integer[Any]], tokenizer: Any) -> list[str]:
    """What codes [B, steps] of a captioner's vocabulary say; the way back from the modality `caption`."""
    return [text.strip() for text in tokenizer.batch_decode(codes.tolist(), skip_special_tokens=True)]


def open_captioner(
    parameters: CommonParameters, caption_tokens: int, device: str
) -> tuple[BlipCaptioner, dict[str, str], dict[str, str]]:
    """The captioner that parameters name, its weights' hash by name, and where they came from.

    Raises:
        SourceError: if its weights are not there.
    """
    weights = find_weights(parameters.captioner or CAPTIONER, parameters.captioner_revision)
    of_captioner = parameters.model_copy(update={"variant": ""})  # which is of the generator's files
    with told_as_source_error(parameters.captioner or CAPTIONER):
        captioner = BlipCaptioner(weights.path, device, of_captioner, caption_tokens)
    return captioner, {"captioner": weights.sha256}, origin_of("captioner", weights)


def require_no_caption_settings(source: str, parameters: CommonParameters) -> None:
    """For a prompt without a caption.

    Raises:
        SpecError: if there are settings of captions: they would be part of the recipe and change nothing.
    """
    for name in ("captioner", "captioner_revision", "masked_words"):
        if getattr(parameters, name):
            raise SpecError(
                f"`{source}` is given `{name}`, and its prompt has no caption in it",
                hint=f"leave `{name}` out, or set a `prompt` with `{CAPTION}`, if it takes one",
            )


class CaptionSource:
    """The modality `caption`: the words themselves, as codes of the captioner's vocabulary."""

    tolerance = 0.0

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = entry.row
        parameters, settings = parse_parameters(spec, row.settings)
        if parameters.captioner or parameters.captioner_revision:
            raise SpecError(f"`{spec.source}` is itself a captioner", hint="name its weights by `model` and `revision`")
        weights = find_weights(parameters.model or entry.model, parameters.revision, variant=parameters.variant)
        caption_tokens = int(settings["caption_tokens"])
        with told_as_source_error(spec.source):
            self.captioner = BlipCaptioner(weights.path, device, parameters, caption_tokens)
        view_size = parameters.view_size or row.view_size
        self.made_with = made_with(device, origin_of("model", weights))
        told: dict[str, Scalar] = {**parameters.of_recipe(), **settings, "view_size": view_size}
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=weights.sha256,
            parameters=told,
            seed=spec.seed,
            source_view_size=view_size,
            format=LatentFormat(
                kind="codes",
                shape=(1, caption_tokens),
                axes=row.axes,
                dtype=integer_for(self.captioner.vocabulary),
                vocabulary=self.captioner.vocabulary,
                space=row.space,
            ),
        )

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> Encoded:
        """Codes [B, 1, caption_tokens] of what is said of each image, and the captions."""
        captions, codes = self.captioner.describe_in_codes(pixels)
        return Encoded(codes[:, None].astype(self.recipe.format.dtype), captions)

    def close(self) -> None:
        """Frees the device."""
        del self.captioner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def integer_for(vocabulary: int) -> Any:
    """The smallest stored dtype for so many codes.

    Raises:
        SourceError: if none is large enough.
    """
    for dtype, many in SMALLEST_INTEGER:
        if vocabulary <= many:
            return dtype
    raise SourceError(f"a vocabulary of {vocabulary:,} codes is too large", hint="take another model")
