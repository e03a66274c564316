"""What memory allows: the raw samples, mapped, copied batch after batch into the same memory, in order, unchecked."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from serving import CODES, SHAPE, Batch, Epoch, Samples, serve


class CeilingReader:
    version = f"numpy {np.__version__}"

    def write(self, samples: Samples, folder: Path) -> None:
        """It reads the raw samples."""

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        samples = Samples(folder)
        latents, codes = samples.latents, samples.codes
        copies = np.empty((batch_size, *SHAPE), np.float16), np.empty((batch_size, *CODES), np.int16)

        def epoch(number: int) -> Iterator[Batch]:
            for start in range(0, len(codes), batch_size):
                parts = [values[start : start + batch_size] for values in (latents, codes)]
                copied = [copy[: len(part)] for copy, part in zip(copies, parts, strict=True)]
                for copy, part in zip(copied, parts, strict=True):
                    np.copyto(copy, part)
                yield Batch(*map(torch.from_numpy, copied))

        return epoch


if __name__ == "__main__":
    serve(CeilingReader())
