"""safetensors: a file for every 512 samples; rows in a full permutation.

It knows no data set, no shuffling and no decoder, so these are the shortest loops that its documented calls allow:
`mapped` keeps the tensors of all files, which `get_tensor` maps without copying, and gathers a batch from them;
`slices` asks `get_slice` for each sample. Files are opened once.

Source: https://huggingface.co/docs/safetensors/index
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from serving import (
    DOCUMENTED,
    LATENTS,
    SIMPLEJPEG,
    Batch,
    Epoch,
    Samples,
    decode_with_pillow,
    decode_with_simplejpeg,
    serve,
)
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.data.sampler import BatchSampler

SHARD_SIZE = 512


class Shards(Dataset[Batch]):
    """Batches by their indices."""

    def __init__(self, folder: Path, task: str, variant: str) -> None:
        self._files = [safetensors.safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._tensors = [{name: file.get_tensor(name) for name in file.keys()} for file in self._files]  # noqa: SIM118
        self._slices = [{name: file.get_slice(name) for name in ("latents", "codes")} for file in self._files]
        self._task, self._variant = task, variant

    def __len__(self) -> int:
        return sum(len(tensors["codes"]) for tensors in self._tensors)

    def __getitem__(self, indices: list[int]) -> Batch:
        latents, codes = (self._gather if self._variant == "mapped" else self._slice_each)(indices)
        if self._task == LATENTS:
            return Batch(latents, codes)
        files = [self._file(index) for index in indices]
        if self._task == DOCUMENTED:
            return Batch(latents, codes, pixels=torch.stack([decode_with_pillow(file) for file in files]))
        if self._task == SIMPLEJPEG:
            return Batch(latents, codes, pixels=torch.stack([decode_with_simplejpeg(file) for file in files]))
        return Batch(latents, codes, files)

    def _gather(self, indices: list[int]) -> list[torch.Tensor]:
        # In the order of the shards, as dla has them in the order of its batch: no peer is asked for a second copy.
        shards, rows = np.divmod(np.sort(np.array(indices)), SHARD_SIZE)
        parts: dict[str, list[torch.Tensor]] = {"latents": [], "codes": []}
        for shard in np.unique(shards).tolist():
            chosen = torch.from_numpy(rows[shards == shard])
            for name, part in parts.items():
                part.append(self._tensors[shard][name].index_select(0, chosen))
        return [torch.cat(part) for part in parts.values()]

    def _slice_each(self, indices: list[int]) -> list[torch.Tensor]:
        places = [divmod(index, SHARD_SIZE) for index in indices]
        return [
            torch.cat([self._slices[shard][name][row : row + 1] for shard, row in places])
            for name in ("latents", "codes")
        ]

    def _file(self, index: int) -> bytes:
        shard, row = divmod(index, SHARD_SIZE)
        start, stop = self._tensors[shard]["offsets"][row : row + 2].tolist()
        return bytes(self._tensors[shard]["images"][start:stop].numpy())


class SafetensorsReader:
    version = f"safetensors {safetensors.__version__}"

    def __init__(self, variant: str) -> None:
        self._variant = variant

    def write(self, samples: Samples, folder: Path) -> None:
        folder.mkdir()
        images = list(samples.images())
        for start in range(0, len(images), SHARD_SIZE):
            part = slice(start, start + SHARD_SIZE)
            content = b"".join(images[part])
            save_file(
                {
                    "latents": torch.from_numpy(np.array(samples.latents[part])),
                    "codes": torch.from_numpy(np.array(samples.codes[part])),
                    "images": torch.frombuffer(bytearray(content), dtype=torch.uint8),
                    "offsets": torch.from_numpy(np.cumsum([0, *(len(image) for image in images[part])])),
                },
                folder / f"{start:08d}.safetensors",
            )

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        shards = Shards(folder, task, self._variant)

        def epoch(number: int) -> Iterator[Any]:
            sampler = RandomSampler(shards, generator=torch.Generator().manual_seed(number))
            batches = BatchSampler(sampler, batch_size, drop_last=False)
            return iter(DataLoader(shards, sampler=batches, batch_size=None, num_workers=workers))

        return epoch


if __name__ == "__main__":
    serve(SafetensorsReader(sys.argv[1]))
