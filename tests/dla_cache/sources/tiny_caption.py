"""A tiny captioner: random words of a few, other ones for other images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.dla_cache.sources.tiny import SIDE, Tiny, pictures, save_seeded

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
WORDS = ("a", "the", "cat", "dog", "dogs", "hot", "polar", "bear", "bird", "on", "of", "red", "snow", "with", "two")
CAPTION_TOKENS = 8
END = 2.5
"""How much more likely than each word the end is: captions get several lengths."""


def save(folder: Path) -> None:
    """Its weights are drawn so that what it sees weighs as much as what it has said, and ends are frequent."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    vocabulary = {word: code for code, word in enumerate((*SPECIAL, *WORDS))}
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    codes = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(vocabulary), "encoder_hidden_size": 16, "max_position_embeddings": 64}

    def make() -> Any:
        model = BlipForConditionalGeneration(
            BlipConfig(
                text_config={**layer, **codes, **text}, vision_config={**layer, "image_size": SIDE, "patch_size": 8}
            )
        )
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=2.0 if "crossattention" in name or "patch" in name else 0.5)
        bias = model.text_decoder.cls.predictions.bias
        with torch.no_grad():
            bias[: len(SPECIAL)] = -100.0
            bias[codes["sep_token_id"]] = END
        return model

    save_seeded(make, folder)
    tokenizer = BertTokenizerFast(vocab=vocabulary, additional_special_tokens=["[DEC]", "[ENC]"])
    BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)


def describe(folder: Path, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], list[str]]:
    """What the library itself says of each image: codes [B, steps], with those of beginning and end, and words."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    inputs = processor(images=pictures(pixels), return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
    return said.numpy(), [processor.decode(row, skip_special_tokens=True).strip() for row in said]


def stock(folder: Path, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
    said = describe(folder, pixels)[0][:, 1:]
    codes = np.zeros((len(pixels), CAPTION_TOKENS), np.int16)
    codes[:, : said.shape[1]] = np.where(said == SPECIAL.index("[SEP]"), 0, said)
    return codes[:, None]


TINY = {"blip-caption": Tiny(save=save, stock=stock, decoders=(), parameters={"caption_tokens": CAPTION_TOKENS})}
