"""Tiny checkpoints of real pipelines, randomly initialised: they prove seeds, shapes and idle decoders, not quality."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Of the view that tiny pipelines see."""


CAPTIONER = "captioner"
"""Folder of a tiny captioner, beside the checkpoint that it is for."""


@dataclass(frozen=True, slots=True)
class Tiny:
    """How one row of the catalog is tried."""

    save: Callable[[Path], None]
    """Saves a tiny checkpoint of its own random weights into a new folder, as `save_pretrained` does."""
    stock: Callable[[Path, NDArray[np.uint8], Sequence[int]], NDArray[np.generic]]
    """What the library itself puts out for the checkpoint, pixels uint8 [B, 3, S, S] and seeds: latents [B, *shape] by
    its public arguments, all images in one call."""
    decoders: tuple[str, ...] = ("diffusers.AutoencoderKL.decode",)
    """Methods that decode, as `package.Class.method`: none may be called."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the spec, beside `model` and `view_size`."""
    view_size: int = SIDE
    takes_captions: bool = False
    """Whether the row's prompt needs a captioner: a tiny one is saved beside the checkpoint."""
    components: Mapping[str, str] = field(default_factory=dict)
    """Parameters of the spec that name weights, by the place at which `save` puts them beside the checkpoint."""
    same_checkpoint_as: str = ""
    """Another row that has the same `save`: it is saved once."""


def save_seeded(make: Callable[[], Any], folder: Path) -> None:
    """Saves what `make` builds; its random weights are the same each time, and the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder, safe_serialization=True)


def pictures(pixels: NDArray[np.uint8]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in pixels.transpose(0, 2, 3, 1)]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def tiny_vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": SIDE,
    }
    return AutoencoderKL(**settings | changes)


def tiny_unet(in_channels: int = 4, width: int = 16, **changes: Any) -> Any:
    """A UNet with cross-attention to texts of that width."""
    from diffusers import UNet2DConditionModel

    settings = {
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": SIDE // 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": width,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | changes)


def tiny_text_encoder(width: int = 16, **changes: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 100,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return CLIPTextModel(CLIPTextConfig(**settings | changes))


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters, small ones as it makes all of them; its files go into `folder`."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"!,.0123456789", *(chr(letter) for letter in range(97, 123))]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_vision(kind: Any, **changes: Any) -> Any:
    """A vision tower of CLIP of that class."""
    from transformers import CLIPVisionConfig

    settings = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    return kind(CLIPVisionConfig(**settings | changes))


def tiny_t5(width: int = 16, **changes: Any) -> tuple[Any, Any]:
    """A T5 tokenizer of single letters, and its text encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [chr(letter) for letter in range(33, 123)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    settings = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
    return T5Tokenizer(vocab=words, extra_ids=0), T5EncoderModel(T5Config(**settings | changes))
