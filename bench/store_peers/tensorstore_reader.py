"""tensorstore on the arrays of dla's Zarr store: a batch of rows is one asynchronous read, four of them under way.

What is open is not looked at anew, and the cache holds shard indices but not the data.

Source: https://google.github.io/tensorstore/python/tutorial.html; https://google.github.io/tensorstore/context.html
"""

from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
from serving import Batch, Epoch, Samples, serve

AHEAD = 4
CACHE_BYTES = 2**23


class TensorstoreReader:
    version = f"tensorstore {version('tensorstore')}"

    def write(self, samples: Samples, folder: Path) -> None:
        """It reads what dla wrote."""

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        latents, codes = (
            tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / 'latents' / name}/"}},
                context=context,
                open=True,
                recheck_cached_metadata="open",
                recheck_cached_data="open",
            ).result()
            for name in ("shape", "audio")
        )

        def epoch(number: int) -> Iterator[Batch]:
            order = np.random.default_rng(number).permutation(codes.shape[0])
            ahead: deque[list[Any]] = deque()
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                ahead.append([latents[chosen].read(), codes[chosen].read()])
                if len(ahead) > AHEAD:
                    yield finish(ahead.popleft())
            while ahead:
                yield finish(ahead.popleft())

        return epoch


def finish(reads: list[Any]) -> Batch:
    return Batch(*(torch.from_numpy(read.result()) for read in reads))


if __name__ == "__main__":
    serve(TensorstoreReader())
