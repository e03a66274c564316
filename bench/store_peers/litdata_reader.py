"""litdata: optimised chunks on the local disk, its own StreamingDataset and StreamingDataLoader.

Samples are tensors, which it hands out without a copy; chunks have the 64 MB of its examples. Images that it decodes
itself are stored as JPEG, as it advises. Its shuffle mixes within windows of 256 samples. `tuned` unpacks such a window
at once, and single samples where images are decoded behind it: its documentation offers both. `defaults` takes 32 for
latents of this size and throws most of them away again, which is ten times as slow.

Source: https://github.com/Lightning-AI/litData, README: `Optimize for maximum performance`, `Optimize images as JPEG`,
`StreamingDataset & StreamingDataLoader knobs`; docstring of `StreamingDataset`, `batch_decode`, `item_shuffle_window`
"""

import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from PIL import Image
from serving import DOCUMENTED, FILES, LATENTS, SIMPLEJPEG, Batch, Epoch, Samples, decode_with_simplejpeg, serve
from torch.utils.data import default_collate

SHUFFLE_WINDOW = 256
"""Its default."""

FOLDERS = {LATENTS: "latents", FILES: "files", SIMPLEJPEG: "files", DOCUMENTED: "jpeg"}


def make_sample(index: int, samples: Samples, images: list[bytes], task: str) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "latents": torch.from_numpy(np.array(samples.latents[index])),
        "codes": torch.from_numpy(np.array(samples.codes[index])),
    }
    if task == FILES:
        sample["image"] = images[index]
    if task == DOCUMENTED:  # it takes the bytes of a file as they are, and encodes anything else anew
        with tempfile.NamedTemporaryFile(suffix=".jpg", delete=False) as file:
            file.write(images[index])
        sample["image"] = Image.open(file.name)
    return sample


class LitdataReader:
    version = f"litdata {version('litdata')}"

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def write(self, samples: Samples, folder: Path) -> None:
        folder.mkdir()
        images = list(samples.images())
        for task in (LATENTS, FILES, DOCUMENTED):
            with tempfile.TemporaryDirectory() as tempfile.tempdir:
                litdata.optimize(
                    fn=partial(make_sample, samples=samples, images=images, task=task),
                    inputs=list(range(len(images))),
                    output_dir=str(folder / FOLDERS[task]),
                    num_workers=1,
                    chunk_bytes="64MB",
                )
            tempfile.tempdir = None

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        tuned = {LATENTS: SHUFFLE_WINDOW, FILES: SHUFFLE_WINDOW, SIMPLEJPEG: 0}
        dataset = litdata.StreamingDataset(
            str(folder / FOLDERS[task]),
            shuffle=True,
            transform=decode if task == SIMPLEJPEG else None,
            batch_decode=tuned.get(task, "auto") if self._variant == "tuned" else "auto",
        )
        loader = litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
        return lambda number: iter(loader)


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "image": decode_with_simplejpeg(sample["image"])}


def collate(samples: list[dict[str, Any]]) -> Batch:
    """With torch's own collating, but for files."""
    latents, codes = (default_collate([sample[name] for sample in samples]) for name in ("latents", "codes"))
    images = [sample["image"] for sample in samples if "image" in sample]
    if images and isinstance(images[0], torch.Tensor):
        return Batch(latents, codes, pixels=torch.stack(images))
    return Batch(latents, codes, images)


if __name__ == "__main__":
    serve(LitdataReader(sys.argv[1]))
