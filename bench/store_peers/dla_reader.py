"""dla: a store in either layout, its images within; every byte is checked, in a full permutation.

Where images are decoded, several threads take the batches of one stream in turn, or with `processes` the workers of
torch's DataLoader do.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dla_stores import write_store
from serving import FILES, LATENTS, Batch, Epoch, Samples, serve
from torch.utils.data import DataLoader

import dla_cache
from dla_cache.images import decode_image
from dla_cache.loading import PairDataset
from dla_cache.pairs import PairBatch, PairStream
from dla_cache.store import open_store

SEED = 0


class DlaReader:
    version = f"dla {dla_cache.__version__}"

    def __init__(self, layout: str, *options: str) -> None:
        self._layout = layout
        self._by_processes = "processes" in options

    def write(self, samples: Samples, folder: Path) -> None:
        write_store(samples, folder, self._layout)

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        store = open_store(folder)
        stream = PairStream(
            store,
            None,
            None,
            batch_size,
            seed=SEED,
            decode=None if task in (LATENTS, FILES) else decode_image,
            images=task != LATENTS,
            keep_decoded_bytes=0,  # peers decode each image every time
            threads=max(workers, 1),
        )
        if task == LATENTS:
            return partial(alone, stream)
        return partial(by_processes, stream, workers) if self._by_processes else partial(by_threads, stream)


def by_processes(stream: PairStream, workers: int, number: int) -> Iterator[Any]:
    pairs = PairDataset(stream, epochs=number + 1, start_batch=number * len(stream))
    return iter(DataLoader(pairs, batch_size=None, num_workers=workers, collate_fn=to_batch))


def by_threads(stream: PairStream, number: int) -> Iterator[Batch]:
    return map(to_batch, stream.epoch_once(number))


def alone(stream: PairStream, number: int) -> Iterator[Batch]:
    """Without a thread: what peers are given no worker for."""
    return map(to_batch, map(stream.batch, range(number * len(stream), (number + 1) * len(stream))))


def to_batch(pairs: PairBatch) -> Batch:
    pixels = torch.from_numpy(np.stack(pairs.pixels)) if pairs.pixels else None
    return Batch(pairs.latents["shape"], pairs.latents["audio"], pairs.images, pixels)


if __name__ == "__main__":
    serve(DlaReader(*sys.argv[1].split()))
