"""What would make of captions and of their sounds something else than they are, without a word."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from dla_cache.errors import MissingDependencyError, SourceError, SpecError
from dla_cache.leaks import audit_captions
from dla_cache.sources import LatentSource, open_source
from dla_cache.sources.captions import BlipCaptioner, texts_of
from dla_cache.sources.code_source import OwnDraws
from dla_cache.sources.loading import CommonParameters
from tests.dla_cache.sources import tiny_audio, tiny_caption
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import CAPTIONER, SIDE, generators

Checkpoint = Callable[[str], Path]
Opened = Callable[[str], LatentSource]

PIXELS = some_pixels(SIDE, 8)
SEEDS = tuple(range(20, 28))


@pytest.fixture(scope="module")
def captioner(checkpoint: Checkpoint) -> BlipCaptioner:
    return BlipCaptioner(checkpoint("blip-caption"), "cpu", CommonParameters(), tiny_caption.CAPTION_TOKENS)


def opened_with(name: str, folder: Path, **parameters: Any) -> LatentSource:
    spec = spec_of(name, folder)
    return open_source(spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}), "cpu")


def test_a_caption_is_the_same_alone_and_beside_longer_ones(captioner: BlipCaptioner) -> None:
    together = captioner.describe(PIXELS)
    assert len({len(caption.split()) for caption in together}) > 2
    assert [captioner.describe(image[None])[0] for image in PIXELS] == together
    codes = captioner.say(PIXELS)
    np.testing.assert_array_equal(np.concatenate([captioner.say(image[None]) for image in PIXELS]), codes)


def test_the_codes_of_captions_say_what_the_captions_say(checkpoint: Checkpoint, captioner: BlipCaptioner) -> None:
    with closing(opened_with("blip-caption", checkpoint("blip-caption"))) as source:
        encoded = source.encode(PIXELS, SEEDS)
    assert texts_of(encoded.latents[:, 0], captioner.tokenizer) == encoded.captions == captioner.describe(PIXELS)


@pytest.mark.parametrize("name", ["musicgen", "stable-audio", "blip-caption"])
def test_masked_words_are_in_no_caption_and_in_the_recipe(name: str, checkpoint: Checkpoint, opened: Opened) -> None:
    plain = opened(name)
    captions = plain.encode(PIXELS, SEEDS).captions
    with closing(opened_with(name, checkpoint(name), masked_words="hot|RED")) as source:
        masked = source.encode(PIXELS, SEEDS)
        assert source.recipe.parameters["masked_words"] == "hot|RED"
        assert source.recipe.hash != plain.recipe.hash
    unknown = [None] * len(PIXELS)
    assert audit_captions(captions, ["red", "hot"], unknown)["named"] > 4
    assert audit_captions(masked.captions, ["red", "hot"], unknown)["named"] == 0
    assert masked.captions == [" ".join(w for w in text.split() if w not in ("hot", "red")) for text in captions]
    assert not np.array_equal(masked.latents, plain.encode(PIXELS, SEEDS).latents)


def test_a_prompt_has_the_caption_where_it_says_so(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    call = diffusers.StableAudioPipeline.__call__

    def listen(self: Any, **arguments: Any) -> Any:
        told.append(arguments["prompt"])
        return call(self, **arguments)

    monkeypatch.setattr(diffusers.StableAudioPipeline, "__call__", listen)
    with closing(opened_with("stable-audio", checkpoint("stable-audio"), prompt="the sound of {caption}")) as source:
        captions = source.encode(PIXELS[:2], SEEDS[:2]).captions
    assert told[-1] == [f"the sound of {caption}" for caption in captions]


@pytest.mark.parametrize("name", ["musicgen", "stable-audio"])
def test_settings_of_captions_without_a_caption_are_refused(name: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(SpecError, match="its prompt has no caption in it"):
        opened_with(name, checkpoint(name), prompt="rain", masked_words="cat")


def test_a_text_through_audioldm2_is_the_same_beside_a_longer_one(checkpoint: Checkpoint, opened: Opened) -> None:
    """What the library makes of it is not: its language model counts what the text was filled up with."""
    folder = checkpoint("audioldm2")
    texts = tiny_audio.prompts(folder, PIXELS[:3])
    settings = {"num_inference_steps": 2, "guidance_scale": 3.5, "audio_length_in_s": 0.064, "output_type": "latent"}
    alone = tiny_audio.TINY["audioldm2"].stock(folder, PIXELS[:3], SEEDS[:3])
    library = opened("audioldm2").pipeline(texts, generator=generators(SEEDS[:3]), **settings).audios.numpy()
    ours = opened("audioldm2").encode(PIXELS[:3], SEEDS[:3]).latents
    assert np.abs(library - alone).max() > 0.01
    assert np.abs(ours - alone).max() < 1e-5


def test_a_checkpoint_of_stable_audio_needs_the_package_of_its_scheduler(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_arguments: Any, **_settings: Any) -> Any:
        raise ImportError("CosineDPMSolverMultistepScheduler requires the torchsde library")

    monkeypatch.setattr(diffusers.CosineDPMSolverMultistepScheduler, "from_pretrained", lacking)
    with pytest.raises(MissingDependencyError, match="torchsde"):
        opened_with("stable-audio", checkpoint("stable-audio"))


def test_stable_audio_keeps_the_scheduler_that_counts_time_as_its_model_does(checkpoint: Checkpoint) -> None:
    with pytest.raises(SourceError, match="keeps the scheduler of its checkpoint"):
        opened_with("stable-audio", checkpoint("stable-audio"), scheduler="EDMDPMSolverMultistepScheduler")


def codes_of_library(folder: Path, n_texts: int, **settings: Any) -> torch.Tensor:
    """[B, codebooks, frames] that the library hands to the decoder, of one text again and again."""
    model = MusicgenForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    handed_over = []
    decode = model.audio_encoder.decode
    model.audio_encoder.decode = lambda codes, **rest: (handed_over.append(codes[0]), decode(codes, **rest))[1]
    inputs = AutoTokenizer.from_pretrained(folder)(["a red bird"] * n_texts, return_tensors="pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.generate(**inputs, guidance_scale=3.0, **settings)
    return handed_over[0]


def test_a_sample_of_musicgen_is_the_same_in_any_batch(checkpoint: Checkpoint, opened: Opened) -> None:
    """The library draws the codes of a batch from one generator, and a sample's change with the batch."""
    folder = checkpoint("musicgen")
    alone, among_four = (codes_of_library(folder, n, do_sample=True, max_new_tokens=40)[0] for n in (1, 4))
    assert (alone == among_four).float().mean() < 0.5
    together = opened("musicgen").encode(PIXELS, SEEDS).latents
    one_by_one = [opened("musicgen").encode(PIXELS[n : n + 1], SEEDS[n : n + 1]).latents for n in range(8)]
    np.testing.assert_array_equal(np.concatenate(one_by_one), together)


def test_musicgen_makes_as_many_frames_as_were_asked_for(checkpoint: Checkpoint, opened: Opened) -> None:
    """The library makes three fewer: each codebook begins a step after the one before."""
    assert codes_of_library(checkpoint("musicgen"), 1, do_sample=False, max_new_tokens=12).shape[-1] == 9
    with closing(opened_with("musicgen", checkpoint("musicgen"), frames=12)) as source:
        assert source.recipe.format.shape == (4, 12)
        assert source.encode(PIXELS[:2], SEEDS[:2]).latents.shape == (2, 4, 12)
    with pytest.raises(SpecError, match="`frames` is 3, below 4"):
        opened_with("musicgen", checkpoint("musicgen"), frames=3)


def test_codes_are_drawn_as_often_as_their_scores_say() -> None:
    """By the softmax at the temperature, of the highest `top_k`; three standard errors of 40,000 draws."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    n_draws, temperature = 40_000, 1.5
    drawn = OwnDraws([3], temperature, top_k=4)(torch.empty(0), scores.expand(n_draws, -1)).argmax(-1)
    expected = torch.cat([(scores[:4] / temperature).softmax(0), torch.zeros(1)])
    share = torch.bincount(drawn, minlength=5) / n_draws
    assert (share - expected).abs().max() < 3 * 0.5 / n_draws**0.5
    assert share[4] == 0


def test_without_temperature_the_most_likely_code_is_taken_whatever_the_seed(checkpoint: Checkpoint) -> None:
    with closing(opened_with("musicgen", checkpoint("musicgen"), temperature=0.0)) as source:
        first, other = (source.encode(PIXELS[:2], seeds).latents for seeds in ((1, 2), (3, 4)))
    np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("musicgen", "decoder.lm_heads.1.weight"),
        ("blip-caption", "text_decoder.cls.predictions.transform.dense.weight"),
    ],
)
def test_weights_that_a_checkpoint_lacks_make_no_codes(
    name: str, weight: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The library draws them anew, with a warning."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoint(name).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tiny_caption.save(tmp_path / CAPTIONER)
    weights = load_file(folder / "model.safetensors")
    del weights[weight]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with closing(opened_with(name, folder)) as source, pytest.raises(SourceError, match=weight.replace(".", r"\.")):
        source.encode(PIXELS[:1], SEEDS[:1])


def test_the_detour_through_sound_is_another_latent_and_says_that_it_decodes(opened: Opened) -> None:
    straight = opened("musicgen").encode(PIXELS, SEEDS)
    around = opened("musicgen-reencoded").encode(PIXELS, SEEDS)
    assert around.captions == straight.captions
    assert around.latents.shape == straight.latents.shape
    assert (around.latents != straight.latents).mean() > 0.1
    assert opened("musicgen-reencoded").row.decodes
