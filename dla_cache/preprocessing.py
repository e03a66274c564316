"""Pixels as a checkpoint's own image processor hands them to its model, but for size: the view is cut already."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dla_cache.errors import SourceError
from dla_cache.lacking import only_errors

FILES = ("preprocessor_config.json", "processor_config.json")
"""The second is of a processor for several kinds of data, and holds that of images as `image_processor`."""

OF_SIZE = frozenset({"do_resize", "do_center_crop", "do_pad", "do_convert_rgb"})
"""What our square RGB view stands for."""
ARITHMETIC = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_flip_channel_order")
KNOWN = OF_SIZE | {"do_rescale", "do_normalize", "do_flip_channel_order", "do_reduce_labels"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What becomes of pixels: `(pixels * scale - mean) / std`, channel by channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_bgr: bool = False
    """Whether the model wants blue first."""
    side: int = 0
    """Of the square that the processor makes, in pixels; 0 if it does not say."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Float32 [B, 3, S, S] on the same device, of pixels uint8 [B, 3, S, S]."""
        values = pixels.to(torch.float32) * self.scale
        if self.is_bgr:
            values = values.flip(1)
        mean, std = (values.new_tensor(numbers).reshape(1, -1, 1, 1) for numbers in (self.mean, self.std))
        return (values - mean) / std


TOLERANCE = 1e-4
"""Of a number that a model is handed; libraries round the same arithmetic otherwise."""

SYMMETRIC = Preprocessing(1 / 255, (0.5,), (0.5,))
"""Pixels in [-1, 1], as autoencoders take them."""


def read_preprocessing(folder: Path) -> Preprocessing:
    """What the image processor that lies beside a checkpoint does, checked against the library's own.

    A file leaves out what its class takes for granted, and a class may do what no file says. Where the library's own
    cannot be had, as for want of torchvision, the file must say everything.

    Raises:
        SourceError: if there is none, or it does something that dla does not.
    """
    said = _processor_in(folder)
    stock = _stock_processor(folder)
    if stock is None and not {"do_rescale", "do_normalize"} <= set(said):
        raise SourceError(
            "the checkpoint's image processor cannot be loaded, and its file does not say all that it does",
            hint="install torchvision, or write `do_rescale` and `do_normalize` into its `preprocessor_config.json`",
        )
    preprocessing = _said({**said, **{name: getattr(stock, name) for name in ARITHMETIC if hasattr(stock, name)}})
    if stock is not None:
        side = preprocessing.side or 224
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, side, side), np.uint8))
        made = stock(list(pixels.numpy()), do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        own = preprocessing(pixels)
        if own.shape != made.shape or float((own - made).abs().max()) > TOLERANCE:
            raise SourceError(
                f"the checkpoint's image processor, a `{type(stock).__name__}`, makes more of pixels than its settings"
                " say",
                hint="write it as a source of your own, docs/guides/own-source.md",
            )
    return preprocessing


def _stock_processor(folder: Path) -> Any:
    """The library's own image processor, or None where it cannot be loaded."""
    import transformers

    library: Any = transformers
    with only_errors():
        try:
            return library.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (ImportError, ValueError):
            return None


def _said(said: Mapping[str, Any]) -> Preprocessing:
    """What settings amount to."""
    strange = sorted(name for name, on in said.items() if name.startswith("do_") and on and name not in KNOWN)
    if strange or said.get("rescale_offset"):
        raise SourceError(
            f"the checkpoint's image processor wants `{strange[0] if strange else 'rescale_offset'}`,"
            " which dla does not do",
            hint="write it as a source of your own, docs/guides/own-source.md",
        )
    normalises = said.get("do_normalize", True)
    if normalises and not (said.get("image_mean") and said.get("image_std")):
        raise SourceError(
            "the checkpoint's image processor does not say the mean and the standard deviation of pixels",
            hint="add `image_mean` and `image_std` to its `preprocessor_config.json`",
        )
    return Preprocessing(
        scale=float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
        mean=_channels(said["image_mean"]) if normalises else (0.0,),
        std=_channels(said["image_std"]) if normalises else (1.0,),
        is_bgr=bool(said.get("do_flip_channel_order", False)),
        side=_side(said),
    )


def _processor_in(folder: Path) -> Mapping[str, Any]:
    for name in FILES:
        if (folder / name).is_file():
            try:
                said = json.loads((folder / name).read_bytes())
                said = said if name == FILES[0] else said["image_processor"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise SourceError(
                    f"`{name}` of the checkpoint cannot be read: {error}", hint="fetch it again"
                ) from error
            if isinstance(said, dict):
                return said
    raise SourceError(
        f"the checkpoint has no `{FILES[0]}`, so nothing says how its model wants pixels",
        hint="save its image processor beside it: `AutoImageProcessor.from_pretrained(...).save_pretrained(folder)`",
    )


def _channels(numbers: Any) -> tuple[float, ...]:
    return tuple(map(float, numbers)) if isinstance(numbers, list | tuple) else (float(numbers),)


def _side(said: Mapping[str, Any]) -> int:
    """Of the crop if there is one, else of the resized image."""
    size = said.get("crop_size") if said.get("do_center_crop", "crop_size" in said) else None
    size = size or said.get("size") or 0
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge") or 0
    return int(size)
