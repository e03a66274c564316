"""What the readers of the store bench have in common: the samples, and a process that answers one request a line.

Every reader runs in an interpreter of its own, with numpy, torch and the library it measures, and without dla. So
nothing here imports anything else.
"""

import io
import json
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

LATENTS, FILES, DOCUMENTED, SIMPLEJPEG = TASKS = ("latents", "files", "documented", "simplejpeg")
"""Latents and codes; with the bytes of the images; with decoded pixels, as the library's documentation decodes
them, or by simplejpeg."""

SHAPE, CODES = (256, 64), (4, 250)
"""Of one sample's latents, float16, and its codes, int16."""

SIDE = 224
"""Of the images, in pixels."""

MIN_SECONDS = 0.4
"""A measurement takes in as many epochs as it needs to last so long."""

MAX_SECONDS = 2.0
"""An epoch that takes longer is left there."""

SHUFFLE_BUFFER = 1000
"""Samples, for readers that mix in a buffer."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The raw samples on disk that every library writes into a format of its own."""

    folder: Path

    @property
    def latents(self) -> Any:
        """float16 [n, 256, 64], mapped."""
        return np.load(self.folder / "latents.npy", mmap_mode="r")

    @property
    def codes(self) -> Any:
        """int16 [n, 4, 250], mapped."""
        return np.load(self.folder / "codes.npy", mmap_mode="r")

    def images(self) -> Iterator[bytes]:
        """The JPEG files, 224 x 224 pixels each."""
        offsets = np.load(self.folder / "offsets.npy").tolist()
        content = (self.folder / "images.bin").read_bytes()
        for start, stop in pairwise(offsets):
            yield content[start:stop]


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples in memory."""

    latents: torch.Tensor
    """[B, 256, 64], float16 or wider."""
    codes: torch.Tensor
    """[B, 4, 250], int16 or wider."""
    files: Any = ()
    """B objects of bytes, for the task `files`."""
    pixels: Any = None
    """uint8 [B, 3, 224, 224] or [B, 224, 224, 3], for the tasks that decode."""


Epoch = Callable[[int], Iterator[Batch]]
"""All samples once, in an order that the epoch's number decides."""


def decode_with_simplejpeg(content: bytes) -> torch.Tensor:
    """uint8 [224, 224, 3]."""
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(content))


def decode_with_pillow(content: bytes) -> torch.Tensor:
    """uint8 [224, 224, 3]."""
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))


class Reader(Protocol):
    """A library at work."""

    version: str

    def write(self, samples: Samples, folder: Path) -> None:
        """Writes the samples in the library's format, once for all tasks."""

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        """The data set, ready for any number of epochs."""


def checksum(batch: Batch) -> np.ndarray:
    """Four numbers that add up over batches in any order: of the samples, latents, codes and images, int64."""
    assert batch.latents.shape[1:] == SHAPE, batch.latents.shape
    assert batch.codes.shape[1:] == CODES, batch.codes.shape
    # Whoever hands out wider numbers is timed with them.
    latents = batch.latents.to(torch.float16).contiguous().view(torch.int16).sum(dtype=torch.int64).item()
    images = sum(zlib.crc32(content) for content in batch.files)
    if batch.pixels is not None:
        assert batch.pixels.dtype == torch.uint8, batch.pixels.dtype
        assert batch.pixels[0].numel() == 3 * SIDE * SIDE, batch.pixels.shape
        images = batch.pixels.sum(dtype=torch.int64).item()
    return np.array([len(batch.codes), latents, batch.codes.sum(dtype=torch.int64).item(), images], np.int64)


def measure(epoch: Epoch, numbers: Iterator[int]) -> dict[str, float]:
    """Samples a second behind the first batch of each epoch, which starts workers and is not counted."""
    n, seconds = 0, 0.0
    while seconds < MIN_SECONDS:
        batches = iter(epoch(next(numbers)))
        next(batches)
        started = now = time.perf_counter()
        for batch in batches:
            n += len(batch.codes)
            now = time.perf_counter()
            if now - started > MAX_SECONDS:
                break
        seconds += now - started
        del batches  # ends worker processes
    return {"samples_per_s": n / seconds}


def serve(reader: Reader) -> None:
    """Answers requests, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    opened: dict[str, Epoch] = {}
    numbers = count(1)
    for line in sys.stdin:
        try:
            answer = _answer(reader, json.loads(line), opened, numbers)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    reader: Reader, request: dict[str, Any], opened: dict[str, Epoch], numbers: Iterator[int]
) -> dict[str, Any]:
    folder, task = Path(request["folder"]), request.get("task", "")
    if request["do"] == "write":
        reader.write(Samples(Path(request["samples"])), folder)
    if request["do"] in ("write", "version"):
        return {"version": reader.version}
    if request["do"] == "check":
        started = time.perf_counter()
        opened[task] = reader.open(folder, task, request["batch_size"], request["workers"])
        batches = iter(opened[task](0))
        first = next(batches)
        first_batch_s = time.perf_counter() - started
        total = sum((checksum(batch) for batch in batches), start=checksum(first))
        return {"version": reader.version, "first_batch_s": first_batch_s, "checksum": total.tolist()}
    return measure(opened[task], numbers)
