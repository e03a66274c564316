"""Tiny generators of sound. They take texts alone, so a tiny captioner lies beside each."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, LogitsProcessorList

from tests.dla_cache.sources import tiny_caption
from tests.dla_cache.sources.tiny import CAPTIONER, Tiny, generators, save_seeded, tiny_t5, tiny_vae

CODES, FRAMES, CODEBOOKS = 64, 6, 4
LONGEST_TEXT = 48
GUIDANCE, TEMPERATURE, TOP_K = 3.0, 1.5, 20


def prompts(folder: Path, pixels: NDArray[np.uint8]) -> list[str]:
    """What the library itself says of each image, as the row's prompt has it."""
    return tiny_caption.describe(folder.parent / CAPTIONER, pixels)[1]


def save_musicgen(folder: Path) -> None:
    from transformers import EncodecConfig, MusicgenConfig, MusicgenDecoderConfig, MusicgenForConditionalGeneration

    tokenizer, text_encoder = tiny_t5()
    codec = EncodecConfig(
        target_bandwidths=[1.2],
        sampling_rate=400,
        num_filters=4,
        hidden_size=8,
        codebook_dim=8,
        upsampling_ratios=[4, 2],
        codebook_size=CODES,
        num_lstm_layers=1,
        use_causal_conv=False,
    )
    decoder = MusicgenDecoderConfig(
        vocab_size=CODES,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_codebooks=CODEBOOKS,
        max_position_embeddings=64,
        pad_token_id=CODES,
        bos_token_id=CODES,
    )

    def make() -> Any:
        parts = {"text_encoder": text_encoder.config, "audio_encoder": codec, "decoder": decoder}
        model = MusicgenForConditionalGeneration(MusicgenConfig(**{name: one.to_dict() for name, one in parts.items()}))
        for name, weight in model.decoder.named_parameters():
            if weight.ndim > 1 and ("encoder_attn" in name or "lm_heads" in name):
                # So that the text weighs as much as the draw.
                torch.nn.init.normal_(weight, std=0.2 if "lm_heads" in name else 1.0)
        for name, weight in model.audio_encoder.named_parameters():
            weight.data.normal_() if "bias" not in name else weight.data.zero_()
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.normal_()
        return model

    save_seeded(make, folder)
    tokenizer.save_pretrained(folder)


class Drawn(LogitsProcessor):
    """Guided scores with noise of one generator a sample, in the field's own words: scores, Gumbel, the largest."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = generators(seeds)

    def __call__(self, _codes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        text, empty = scores.chunk(2)
        scores = empty + (text - empty) * GUIDANCE
        drawn = []
        for rows, generator in zip(scores.split(CODEBOOKS), self.generators, strict=True):
            gumbel = -torch.empty(rows.shape).exponential_(generator=generator).log()
            least = rows.sort(descending=True).values[:, TOP_K - 1, None]
            drawn.append(torch.where(rows >= least, rows / TEMPERATURE + gumbel, -1e9))
        return torch.cat(drawn * 2)  # the library guides once more, from a score to itself


def stock_musicgen(
    folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int], *, reencoded: bool = False
) -> NDArray[np.generic]:
    """What the codec's decoder is handed, one image after another and without any padding."""
    from transformers import AutoTokenizer, MusicgenForConditionalGeneration

    model = MusicgenForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    decode, handed_over = model.audio_encoder.decode, []

    def listen(codes: torch.Tensor, **settings: Any) -> Any:
        handed_over.append(codes[0])
        return decode(codes, **settings)

    model.audio_encoder.decode = listen
    for text, seed in zip(prompts(folder, pixels), seeds, strict=True):
        sound = model.generate(
            **tokenizer([text], return_tensors="pt"),
            do_sample=False,
            guidance_scale=GUIDANCE,
            max_new_tokens=FRAMES + CODEBOOKS - 1,
            logits_processor=LogitsProcessorList([Drawn([seed])]),
        )
        if reencoded:
            handed_over[-1] = model.audio_encoder.encode(sound).audio_codes[0]
    return torch.cat(handed_over).numpy()


def save_audioldm2(folder: Path, *, language_model: str = "GPT2Model") -> None:
    """Its language model is saved as the class that real checkpoints name."""
    import transformers
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapTextConfig,
        GPT2Config,
        RobertaTokenizer,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clap_text = ClapTextConfig(**text, vocab_size=300, max_position_embeddings=64, projection_dim=16)
    clap_audio = ClapAudioConfig(
        **{**text, "num_hidden_layers": 2, "num_attention_heads": [1, 1]},
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        depths=[1, 1],
        patch_embeds_hidden_size=8,
        projection_dim=16,
    )
    letters = [chr(letter) for letter in range(33, 127)]
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "\u0120", *letters]
    tokenizer, text_encoder = tiny_t5()
    tokenizer.model_max_length = LONGEST_TEXT

    def make() -> Any:
        return diffusers.AudioLDM2Pipeline(
            vae=tiny_vae(in_channels=1, out_channels=1),
            text_encoder=ClapModel(
                ClapConfig(text_config=clap_text.to_dict(), audio_config=clap_audio.to_dict(), projection_dim=16)
            ),
            text_encoder_2=text_encoder,
            projection_model=diffusers.AudioLDM2ProjectionModel(16, 16, 16),
            language_model=getattr(transformers, language_model)(
                GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=10, n_positions=128, max_new_tokens=8)
            ),
            tokenizer=RobertaTokenizer(
                {word: code for code, word in enumerate(words)}, [], model_max_length=LONGEST_TEXT
            ),
            tokenizer_2=tokenizer,
            feature_extractor=ClapFeatureExtractor(),
            unet=diffusers.AudioLDM2UNet2DConditionModel(
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=16,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=([None, 16, 16], [None, 16, 16]),
                attention_head_dim=8,
            ),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear"),
            vocoder=SpeechT5HifiGan(
                SpeechT5HifiGanConfig(
                    model_in_dim=8,
                    sampling_rate=1000,
                    upsample_initial_channel=4,
                    upsample_rates=[2, 2],
                    upsample_kernel_sizes=[4, 4],
                    resblock_kernel_sizes=[3],
                    resblock_dilation_sizes=[[1]],
                )
            ),
        )

    save_seeded(make, folder)


def save_stable_audio(folder: Path) -> None:
    tokenizer, text_encoder = tiny_t5()
    tokenizer.model_max_length = LONGEST_TEXT

    def make() -> Any:
        return diffusers.StableAudioPipeline(
            vae=diffusers.AutoencoderOobleck(
                encoder_hidden_size=4,
                downsampling_ratios=[1, 2],
                decoder_channels=4,
                decoder_input_channels=4,
                channel_multiples=[1, 2],
                sampling_rate=4,
            ),
            text_encoder=text_encoder,
            projection_model=diffusers.StableAudioProjectionModel(16, 8, min_value=0, max_value=32),
            tokenizer=tokenizer,
            transformer=diffusers.StableAudioDiTModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                num_key_value_attention_heads=1,
                cross_attention_dim=16,
                cross_attention_input_dim=8,
                time_proj_dim=8,
                global_states_input_dim=16,
            ),
            scheduler=diffusers.CosineDPMSolverMultistepScheduler(
                sigma_min=0.3,
                sigma_max=500,
                sigma_data=1.0,
                prediction_type="v_prediction",
                sigma_schedule="exponential",
            ),
        )

    save_seeded(make, folder)


def stock_pipeline(
    folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int], *, pipeline: str, settings: Mapping[str, Any]
) -> NDArray[np.generic]:
    """What the library puts out for each image's own caption, one after another: nothing is filled up."""
    loaded = getattr(diffusers, pipeline).from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    able = getattr(loaded, "language_model", None)
    if able is not None and not hasattr(able, "_update_model_kwargs_for_generation"):
        from transformers import GPT2LMHeadModel

        loaded.language_model = GPT2LMHeadModel.from_pretrained(folder / "language_model", local_files_only=True)
    latents = [
        loaded(text, generator=generators([seed]), output_type="latent", **settings).audios
        for text, seed in zip(prompts(folder, pixels), seeds, strict=True)
    ]
    return torch.cat(latents).numpy()


def pipeline(name: str, save: Callable[[Path], None], decoder: str, **settings: Any) -> Tiny:
    return Tiny(
        save=save,
        stock=partial(stock_pipeline, pipeline=name, settings=settings),
        decoders=(f"diffusers.{decoder}.decode",),
        parameters={**settings, "caption_tokens": tiny_caption.CAPTION_TOKENS},
        takes_captions=True,
    )


MUSICGEN = {
    "frames": FRAMES,
    "guidance_scale": GUIDANCE,
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "caption_tokens": tiny_caption.CAPTION_TOKENS,
}

TINY = {
    "musicgen": Tiny(
        save=save_musicgen,
        stock=stock_musicgen,
        decoders=("transformers.EncodecModel.decode",),
        parameters=MUSICGEN,
        takes_captions=True,
    ),
    "musicgen-reencoded": Tiny(
        save=save_musicgen,
        stock=partial(stock_musicgen, reencoded=True),
        decoders=(),
        parameters=MUSICGEN,
        takes_captions=True,
        same_checkpoint_as="musicgen",
    ),
    "audioldm2": pipeline(
        "AudioLDM2Pipeline",
        save_audioldm2,
        "AutoencoderKL",
        num_inference_steps=2,
        guidance_scale=3.5,
        audio_length_in_s=0.064,
    ),
    "stable-audio": pipeline(
        "StableAudioPipeline",
        save_stable_audio,
        "AutoencoderOobleck",
        num_inference_steps=3,
        guidance_scale=7.0,
        audio_end_in_s=2.0,
    ),
}
