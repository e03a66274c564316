"""zarr-python on the arrays of dla's Zarr store, which are plain Zarr v3; image bytes are no array.

`rows` asks for the rows of each batch; `shards` reads a shard at once, as its guide advises to read what lies
together, and mixes within it.

Source: https://zarr.readthedocs.io/en/stable/user-guide/performance/
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import zarr
from serving import Batch, Epoch, Samples, serve


class ZarrReader:
    version = f"zarr {zarr.__version__}"

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def write(self, samples: Samples, folder: Path) -> None:
        """It reads what dla wrote."""

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        latents, codes = (zarr.open_array(folder / "latents" / name, mode="r") for name in ("shape", "audio"))

        def rows(number: int) -> Iterator[Batch]:
            order = np.random.default_rng(number).permutation(codes.shape[0])
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                yield Batch(torch.from_numpy(latents.oindex[chosen]), torch.from_numpy(codes.oindex[chosen]))

        def shards(number: int) -> Iterator[Batch]:
            rng = np.random.default_rng(number)
            size = latents.shards[0]
            for shard in rng.permutation(-(-codes.shape[0] // size)).tolist():
                part = slice(shard * size, (shard + 1) * size)
                read = latents[part], codes[part]
                order = rng.permutation(len(read[0]))
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    yield Batch(*(torch.from_numpy(values[chosen]) for values in read))

        return rows if self._variant == "rows" else shards


if __name__ == "__main__":
    serve(ZarrReader(sys.argv[1]))
