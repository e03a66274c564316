"""relief-digits as files: PNGs, the manifest a build reads, and the truth that no trainer may open."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from dla_cache.data.relief_digits import CLASS_NAMES, SIDE, SPLITS, plan_renderings, render_split
from dla_cache.durable import write_durably, writing_to
from dla_cache.errors import StoreError
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.parquet import from_parquet, to_parquet

MANIFEST_NAME = "manifest.parquet"
TRUTH_NAME = "truth.parquet"


@dataclass(frozen=True, slots=True)
class Truth:
    """What `truth.parquet` holds of one image: its label, hidden or not, and its depth uint8 [32, 32]."""

    label: int
    depth: NDArray[np.uint8]


def write_relief_digits(
    folder: Path, *, with_pairs: bool = False, on_progress: Callable[[str, int], None] = lambda _split, _n: None
) -> Manifest:
    """Renders every split but the generator's own into `folder`.

    Writes `images/*.png`, `truth.parquet` and last `manifest.parquet`, so a manifest is never
    without its images. Running it again writes the same bytes.

    Args:
        with_pairs: also the generator's own split, labelled: for a control that is given what the generator saw.

    Raises:
        StoreError: if the folder cannot be written, or holds a manifest or a truth of other images.
    """
    splits = [split for split in SPLITS if with_pairs or split != "generator"]
    check_files_are_ours(folder, splits)
    rows: list[ManifestRow] = []
    truth: dict[str, list[object]] = {"image_id": [], "label": [], "depth": []}
    with writing_to(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for split in splits:
            plan, pixels, depth = render_split(split)
            for rendering, image, relief in zip(plan, pixels, depth, strict=True):
                data = encode_png(image)
                uri = f"images/{rendering.image_id}.png"
                (folder / uri).write_bytes(data)
                label = rendering.label if is_labelled(split) else None
                digest = hashlib.sha256(data).hexdigest()
                rows.append(ManifestRow(rendering.image_id, uri, label, split, digest, SIDE, SIDE))
                truth["image_id"].append(rendering.image_id)
                truth["label"].append(rendering.label)
                truth["depth"].append(relief.tobytes())
            on_progress(split, len(plan))
        write_durably(folder / TRUTH_NAME, to_parquet(pa.table(truth)))
    return write_manifest(folder / MANIFEST_NAME, rows, CLASS_NAMES)


def is_labelled(split: str) -> bool:
    """Whether a manifest tells the labels of a split; where it lists the generator's own, that is what for."""
    return SPLITS[split].labelled or split == "generator"


def check_files_are_ours(folder: Path, splits: Sequence[str]) -> None:
    """Passes a folder whose manifest and truth, where there are any, list our images, labels and `splits`.

    Raises:
        StoreError: if writing would destroy the lists of another data set.
    """
    plan = [rendering for split in splits for rendering in plan_renderings(split)]
    ours: dict[str, dict[str, list[object]]] = {
        MANIFEST_NAME: {
            "image_id": [rendering.image_id for rendering in plan],
            "label": [rendering.label if is_labelled(rendering.split) else None for rendering in plan],
            "split": [rendering.split for rendering in plan],
        },
        TRUTH_NAME: {
            "image_id": [rendering.image_id for rendering in plan],
            "label": [rendering.label for rendering in plan],
        },
    }
    for name, columns in ours.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            table = from_parquet(path.read_bytes())
            is_ours = all(table[column].to_pylist() == values for column, values in columns.items())
        except (OSError, ValueError, KeyError):
            is_ours = False
        if not is_ours:
            raise StoreError(
                f"`{path}` lists other images than relief-digits", hint="choose another folder, or move that file away"
            )


def read_truth(path: Path) -> dict[str, Truth]:
    """`truth.parquet` by image ID: for pictures and for scoring generators, never for training.

    Raises:
        StoreError: if there is no such file.
    """
    try:
        table = from_parquet(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"`{path}` holds no truth: {error}", hint="make it with `dla data relief-digits`") from error
    return {
        row["image_id"]: Truth(row["label"], np.frombuffer(row["depth"], np.uint8).reshape(SIDE, SIDE))
        for row in table.to_pylist()
    }


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of pixels uint8 [3, H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="PNG")
    return buffer.getvalue()
