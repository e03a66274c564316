"""webdataset: its own pipeline over tars, shards in random order, a buffer of 1000 samples, batches made inside.

`own` reads tars that webdataset's writer made, with all of a sample side by side; `ours` reads a store of dla in the
WebDataset layout, whose series it takes side by side, with one seed, since it knows no join.

Source: https://webdataset.github.io/webdataset/sharding/; https://github.com/webdataset/webdataset, README
"""

import sys
from collections.abc import Callable, Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from serving import (
    DOCUMENTED,
    LATENTS,
    SHUFFLE_BUFFER,
    SIMPLEJPEG,
    Batch,
    Epoch,
    Samples,
    decode_with_simplejpeg,
    serve,
)

SHARD_SIZE = 512
DECODERS: dict[str, tuple[Any, ...]] = {DOCUMENTED: ("torchrgb8",)}


class WebdatasetReader:
    version = f"webdataset {wds.__version__}"

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def write(self, samples: Samples, folder: Path) -> None:
        folder.mkdir()
        for with_images in (False, True):
            pattern = str(folder / ("files" if with_images else "latents")) + "-%06d.tar"
            with wds.ShardWriter(pattern, maxcount=SHARD_SIZE, verbose=0) as writer:
                for number, (latents, codes, image) in enumerate(
                    zip(samples.latents, samples.codes, samples.images(), strict=True)
                ):
                    image_field = {"jpg": image} if with_images else {}
                    writer.write(
                        {"__key__": f"image-{number}", "latents.npy": np.array(latents), "codes.npy": np.array(codes)}
                        | image_field
                    )

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        open_pipeline = self._open_own if self._variant == "own" else self._open_ours

        def epoch(number: int) -> Iterator[Any]:
            return open_pipeline(folder, task, batch_size, workers, number)

        return epoch

    def _open_own(self, folder: Path, task: str, batch_size: int, workers: int, seed: int) -> Iterator[Batch]:
        kind = "latents" if task == LATENTS else "files"
        fields = ["latents.npy", "codes.npy", *([] if task == LATENTS else ["jpg"])]
        pipeline = _pipeline(sorted(map(str, folder.glob(f"{kind}-*.tar"))), task, fields, batch_size, seed)
        return starmap(partial_batch(task), wds.WebLoader(pipeline, batch_size=None, num_workers=workers))

    def _open_ours(self, folder: Path, task: str, batch_size: int, workers: int, seed: int) -> Iterator[Batch]:
        names = {"shape": "shape.npy", "audio": "audio.npy", **({} if task == LATENTS else {"images": "jpg"})}
        series = [
            wds.WebLoader(
                _pipeline(sorted(map(str, (folder / name).glob("*.tar"))), task, [field], batch_size, seed),
                batch_size=None,
                num_workers=workers,
            )
            for name, field in names.items()
        ]
        make = partial_batch(task)
        return (make(*(part[0] for part in parts)) for parts in zip(*series, strict=True))


def _pipeline(shards: list[str], task: str, fields: list[str], batch_size: int, seed: int) -> Any:
    # The bytes of images are left alone, unless webdataset decodes them itself: then its decoder gives uint8 tensors.
    return (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=seed)
        .shuffle(SHUFFLE_BUFFER, seed=seed)
        .decode(*DECODERS.get(task, ()))
        .to_tuple(*fields)
        .map_tuple(*[decode_with_simplejpeg if task == SIMPLEJPEG and field == "jpg" else keep for field in fields])
        .batched(batch_size)
    )


def keep(value: Any) -> Any:
    return value


def partial_batch(task: str) -> Callable[..., Batch]:
    """From the parts of a batch to a `Batch`."""

    def make(latents: Any, codes: Any, images: Any = ()) -> Batch:
        latents, codes = torch.as_tensor(latents), torch.as_tensor(codes)
        if task in (DOCUMENTED, SIMPLEJPEG):
            return Batch(latents, codes, pixels=torch.as_tensor(images))
        return Batch(latents, codes, images)

    return make


if __name__ == "__main__":
    serve(WebdatasetReader(sys.argv[1]))
