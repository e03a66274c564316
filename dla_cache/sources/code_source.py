"""Sound as codes: MusicGen, asked with what a captioner says of an image, and stopped before its codec's decoder.

The library's own sampling draws from one generator for the whole batch, so that a sample's codes would depend on who
else is in it. Here each sample has its own: the code that is most likely after Gumbel noise was added is a draw from
the very distribution, and the library, told not to sample, takes it.

Source: Gumbel-max trick, Maddison et al., arXiv:1411.0030, section 2.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from dla_cache.errors import SourceError, SpecError
from dla_cache.sources import Encoded
from dla_cache.sources.captions import NumbersOnly, integer_for, open_captioner, require_no_caption_settings
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.audio import CodesRow
from dla_cache.sources.catalog.entry import CAPTION, TEXT_SETTINGS, Scalar
from dla_cache.sources.loading import (
    load_model,
    made_with,
    origin_of,
    parse_parameters,
    told_as_source_error,
)
from dla_cache.spec import LatentFormat, LatentSpec, Recipe
from dla_cache.weights import find_weights, joint_hash


class OwnDraws(LogitsProcessor):
    """Scores with Gumbel noise of each sample's own generator, so that the largest is a draw of the softmax."""

    def __init__(self, seeds: Sequence[int], temperature: float, top_k: int) -> None:
        """
        Args:
            temperature: 0 adds no noise: the most likely code.
            top_k: of so many codes one is drawn; 0 for all.
        """
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.temperature, self.top_k = temperature, top_k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B * codebooks, vocabulary] of scores of that shape, float32."""
        if self.temperature == 0:
            return scores
        n_codes = scores.shape[-1]
        if 0 < self.top_k < n_codes:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        of_sample = (len(scores) // len(self.generators), n_codes)
        # Of an exponential variable E, -log E is Gumbel.
        waits = torch.cat([torch.empty(of_sample).exponential_(generator=one) for one in self.generators])
        return scores / self.temperature - waits.clamp(min=torch.finfo(torch.float32).tiny).log().to(scores.device)


class LastOfAll(LogitsProcessorList):
    """A list whose last processor stays the last: `generate` appends guidance, and a draw comes after it."""

    def append(self, processor: Any) -> None:
        self.insert(len(self) - 1, processor)


class MusicGenSource:
    """Codes [codebooks, frames] that MusicGen would hand to its codec's decoder."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        entry = SOURCES[spec.source]
        row = self.row = entry.row
        assert isinstance(row, CodesRow)
        parameters, self.settings = parse_parameters(spec, {**TEXT_SETTINGS, **row.settings})
        self.prompt = str(self.settings["prompt"])
        weights = find_weights(parameters.model or entry.model, parameters.revision, variant=parameters.variant)
        hashes, origin = {"model": weights.sha256}, origin_of("model", weights)
        with told_as_source_error(spec.source):
            model, self.lacking = load_model("transformers.MusicgenForConditionalGeneration", weights.path, parameters)
            self.tokenizer = AutoTokenizer.from_pretrained(weights.path, local_files_only=True)
        decoder = model.decoder.config
        if decoder.audio_channels != 1:
            raise SourceError(
                f"`{spec.source}` is given a checkpoint that makes stereo", hint="take one that makes a single channel"
            )
        self.n_codebooks = decoder.num_codebooks
        _check(self.settings, self.n_codebooks)
        self.model = model.to(device)
        # What the codec's decoder is handed comes back as if it were sound.
        self.model.audio_encoder.decode = lambda codes, **_: SimpleNamespace(audio_values=codes)
        self.captioner = None
        if CAPTION in self.prompt:
            self.captioner, captioner_hashes, captioner_origin = open_captioner(
                parameters, int(self.settings["caption_tokens"]), device
            )
            hashes, origin = hashes | captioner_hashes, origin | captioner_origin
        else:
            del self.settings["caption_tokens"]
            require_no_caption_settings(spec.source, parameters)
        self.made_with = made_with(device, origin)
        self.tolerance = row.tolerance
        view_size = parameters.view_size or row.view_size
        told: dict[str, Scalar] = {**parameters.of_recipe(), **self.settings, "view_size": view_size}
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256=joint_hash(hashes),
            parameters=told,
            seed=spec.seed,
            source_view_size=view_size,
            format=LatentFormat(
                kind="codes",
                shape=(self.n_codebooks, int(self.settings["frames"])),
                axes=row.axes,
                dtype=integer_for(decoder.vocab_size),
                vocabulary=decoder.vocab_size,
                space=row.space,
            ),
        )

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> Encoded:
        """Codes [B, codebooks, frames], and the captions that they were made from."""
        captions = [] if self.captioner is None else self.captioner.describe(pixels)
        texts = [self.prompt.replace(CAPTION, caption) for caption in captions or [""] * len(pixels)]
        with torch.inference_mode(), kept_random_state():
            codes = self._codes(texts, seeds)
            if self.row.decodes:
                codes = self._encoded_again(codes)
        expected = (len(pixels), *self.recipe.format.shape)
        if tuple(codes.shape) != expected:
            raise SourceError(
                f"`{self.recipe.source}` put out codes {list(codes.shape)} in place of {list(expected)}",
                hint="install the version of transformers that dla's constraints name",
            )
        return Encoded(codes.cpu().numpy().astype(self.recipe.format.dtype), captions)

    def _codes(self, texts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """[B, codebooks, frames]"""
        inputs = self.tokenizer(
            list(texts),
            padding="max_length",  # and not as long as the longest of this batch
            truncation=True,
            max_length=int(self.settings["text_tokens"]),
            return_tensors="pt",
        ).to(self.model.device)
        draws = OwnDraws(seeds, float(self.settings["temperature"]), int(self.settings["top_k"]))
        handed_over: torch.Tensor = self.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=False,
            num_beams=1,
            guidance_scale=float(self.settings["guidance_scale"]),
            # Each codebook begins a step after the one before, so that the last steps are not whole frames.
            max_new_tokens=int(self.settings["frames"]) + self.n_codebooks - 1,
            logits_processor=LastOfAll([NumbersOnly(self.lacking), draws]),
        )
        return handed_over[0]

    def _encoded_again(self, codes: torch.Tensor) -> torch.Tensor:
        """[B, codebooks, frames], of the sound that codes of that shape stand for."""
        codec = self.model.audio_encoder
        sound = type(codec).decode(codec, codes[None], audio_scales=[None] * len(codes)).audio_values
        again: torch.Tensor = codec.encode(sound, bandwidth=codec.config.target_bandwidths[-1]).audio_codes[0]
        return again[..., : codes.shape[-1]]

    def close(self) -> None:
        """Frees the device."""
        del self.model, self.captioner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts Python's own generator back: the decoder draws from it in each layer, whether to drop it in training."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _check(settings: Mapping[str, Scalar], n_codebooks: int) -> None:
    """
    Raises:
        SpecError: if a setting cannot be.
    """
    least = {"frames": n_codebooks, "text_tokens": 1, "temperature": 0, "top_k": 0, "guidance_scale": 0}
    for name, bound in least.items():
        if float(settings[name]) < bound:
            raise SpecError(f"`{name}` is {settings[name]}, below {bound}", hint="raise it, or leave it out")
