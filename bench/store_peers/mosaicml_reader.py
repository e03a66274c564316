"""MosaicML Streaming: MDS shards on the local disk, its own shuffling, torch's DataLoader.

Its guide says that the defaults are the fast settings, and that the data set must know the batch size.

Source: https://docs.mosaicml.com/projects/streaming/en/stable/distributed_training/performance_tuning.html;
https://docs.mosaicml.com/projects/streaming/en/stable/preparing_datasets/basic_dataset_conversion.html;
https://docs.mosaicml.com/projects/streaming/en/stable/dataset_configuration/shuffling.html
"""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from serving import DOCUMENTED, FILES, LATENTS, SIMPLEJPEG, Batch, Epoch, Samples, decode_with_simplejpeg, serve
from streaming import MDSWriter, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.utils.data import DataLoader, default_collate

COLUMNS = {"latents": "ndarray:float16:256,64", "codes": "ndarray:int16:4,250"}
IMAGE_COLUMN = {LATENTS: {}, FILES: {"image": "bytes"}, SIMPLEJPEG: {"image": "bytes"}, DOCUMENTED: {"image": "jpeg"}}
FOLDERS = {LATENTS: "latents", FILES: "files", SIMPLEJPEG: "files", DOCUMENTED: "jpeg"}


class Decoded(StreamingDataset):
    """Pixels in place of the image: a custom `__getitem__`, as the documentation transforms samples."""

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        if isinstance(sample["image"], bytes):
            sample["image"] = decode_with_simplejpeg(sample["image"])
        else:
            sample["image"] = torch.from_numpy(np.array(sample["image"].convert("RGB")))
        return sample


class MosaicReader:
    version = f"mosaicml-streaming {version('mosaicml-streaming')}"

    def write(self, samples: Samples, folder: Path) -> None:
        folder.mkdir()
        for task in (LATENTS, FILES, DOCUMENTED):
            with (
                MDSWriter(out=str(folder / FOLDERS[task]), columns={**COLUMNS, **IMAGE_COLUMN[task]}) as writer,
                tempfile.NamedTemporaryFile(suffix=".jpg") as file,
            ):
                for latents, codes, image in zip(samples.latents, samples.codes, samples.images(), strict=True):
                    sample: dict[str, Any] = {"latents": np.array(latents), "codes": np.array(codes)}
                    if task == FILES:
                        sample["image"] = image
                    if task == DOCUMENTED:  # it takes the bytes of a file as they are, and encodes anything else anew
                        Path(file.name).write_bytes(image)
                        sample["image"] = Image.open(file.name)
                    writer.write(sample)

    def open(self, folder: Path, task: str, batch_size: int, workers: int) -> Epoch:
        clean_stale_shared_memory()
        kind = Decoded if task in (DOCUMENTED, SIMPLEJPEG) else StreamingDataset
        dataset = kind(local=str(folder / FOLDERS[task]), shuffle=True, batch_size=batch_size)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
        return lambda number: iter(loader)


def collate(samples: list[dict[str, Any]]) -> Batch:
    """With torch's own collating."""
    fields = default_collate(samples)
    image = fields.get("image", ())
    return (
        Batch(fields["latents"], fields["codes"], pixels=image)
        if isinstance(image, torch.Tensor)
        else Batch(fields["latents"], fields["codes"], image)
    )


if __name__ == "__main__":
    serve(MosaicReader())
