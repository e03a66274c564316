"""Hugging Face datasets: Arrow files on the local disk, mapped, in a full permutation.

`torch` is the guide's way: the torch format under torch's DataLoader, a batch of indices at a time. Columns are lists
of fixed length, which came out five times as fast as `Array2D`. `arrow` takes each batch as an Arrow table and hands
its buffers to numpy: more than the guide asks of a user, and the fastest that was found.

Source: https://huggingface.co/docs/datasets/use_with_pytorch; https://huggingface.co/docs/datasets/use_with_numpy;
https://huggingface.co/docs/datasets/about_mapstyle_vs_iterable
"""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from serving import (
    CODES,
    DOCUMENTED,
    LATENTS,
    SHAPE,
    SIMPLEJPEG,
    Batch,
    Epoch,
    Samples,
    decode_with_simplejpeg,
    serve,
)
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

FEATURES = {
    "latents": datasets.List(datasets.Value("float16"), length=SHAPE[0] * SHAPE[1]),
    "codes": datasets.List(datasets.Value("int16"), length=CODES[0] * CODES[1]),
}


class DatasetsReader:
    version = f"datasets {datasets.__version__}"

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def write(self, samples: Samples, folder: Path) -> None:
        folder.mkdir()
        datasets.disable_progress_bars()
        features = datasets.Features({**FEATURES, "image": datasets.Value("binary")})
        written = datasets.Dataset.from_generator(
            _rows, features=features, gen_kwargs={"samples": samples}, cache_dir=str(folder / "cache")
        )
        written.save_to_disk(folder / "samples")

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        dataset = datasets.load_from_disk(folder / "samples")
        if task == LATENTS:
            dataset = dataset.select_columns(list(FEATURES))
        if task == DOCUMENTED:
            dataset = dataset.cast_column("image", datasets.Image())
        dataset = dataset.with_format(self._variant)
        make = (_from_arrow if self._variant == "arrow" else _from_torch)(task)

        def epoch(number: int) -> Iterator[Any]:
            sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(number))
            batches = BatchSampler(sampler, batch_size, drop_last=False)
            return iter(DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers, collate_fn=make))

        return epoch


def _rows(samples: Samples) -> Iterator[dict[str, Any]]:
    for latents, codes, image in zip(samples.latents, samples.codes, samples.images(), strict=True):
        yield {"latents": np.array(latents).ravel(), "codes": np.array(codes).ravel(), "image": image}


def _batch(task: str, latents: torch.Tensor, codes: torch.Tensor, images: Any) -> Batch:
    latents, codes = latents.reshape(-1, *SHAPE), codes.reshape(-1, *CODES)
    if task == SIMPLEJPEG:
        return Batch(latents, codes, pixels=torch.stack([decode_with_simplejpeg(image) for image in images]))
    if task == DOCUMENTED:
        return Batch(latents, codes, pixels=images)
    return Batch(latents, codes, images)


def _from_torch(task: str) -> Callable[[dict[str, Any]], Batch]:
    return lambda rows: _batch(task, rows["latents"], rows["codes"], rows.get("image", ()))


def _from_arrow(task: str) -> Callable[[Any], Batch]:
    def make(table: Any) -> Batch:
        columns = [table.column(name).combine_chunks().flatten().to_numpy() for name in FEATURES]
        images = () if task == LATENTS else table.column("image").to_pylist()
        if task == DOCUMENTED:  # an Arrow table holds files: the decoding is the user's
            from PIL import Image

            files = [image["bytes"] for image in images]
            pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))) for file in files]
            images = torch.stack(pixels)
        return _batch(task, *[torch.from_numpy(column) for column in columns], images)

    return make


if __name__ == "__main__":
    serve(DatasetsReader(sys.argv[1]))
