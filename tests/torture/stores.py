"""The small stores that are tortured: 24 images of 8 x 8 pixels, two modalities and the images' own bytes.

`python -m tests.torture.stores MANIFEST STORE LAYOUT SHARD_SIZE` builds one in a process of its own.
"""

import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dla_cache.build import build_cache
from dla_cache.card import write_card
from dla_cache.manifest import Manifest, ManifestRow, read_manifest, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from dla_cache.store import create_store, open_store
from dla_cache.store.layout import IMAGES
from dla_cache.takedown import take_down

SIDE = 8
N_IMAGES = 24
SHARD_SIZE = 5
SOURCE = "tests.torture.stores:SmallSource"
REMOVED = "image-7"
"""Taken out of the stores whose records are consolidated: its row lies between others of its shard."""


class SmallSource:
    """Depth latents [4, 2, 2] of pixels and seeds, and audio codes [2, 8] of seeds alone."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.is_audio = spec.modality == Modality.AUDIO
        self.seconds = float(spec.parameters.get("seconds", 0))
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters=spec.parameters,
            seed=spec.seed,
            source_view_size=SIDE,
            format=LatentFormat(kind="codes", shape=(2, 8), axes=("codebook", "step"), dtype="int16", vocabulary=999)
            if self.is_audio
            else LatentFormat(
                kind="continuous", shape=(4, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype
            ),
        )

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        time.sleep(self.seconds)
        generators = [np.random.default_rng(seed) for seed in seeds]
        if self.is_audio:
            return np.array([generator.integers(0, 999, (2, 8)) for generator in generators], np.int16)
        colours = pixels[:, [0, 1, 2, 0], ::4, ::4].astype(np.float32) / 255
        return colours + np.array([generator.normal(size=(4, 2, 2)) for generator in generators], np.float32)

    def close(self) -> None:
        pass


def make_manifest(folder: Path, n_images: int = N_IMAGES) -> Manifest:
    """Noise PNGs in two splits, every fourth without a label, and `manifest.parquet`."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(n_images):
        path = folder / "images" / f"image-{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
        rows.append(
            ManifestRow(
                image_id=path.stem,
                uri=f"images/{path.name}",
                label=None if number % 4 == 3 else number % 2,
                split=("train", "test")[number % 3 == 2],
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                width=SIDE,
                height=SIDE,
            )
        )
    return write_manifest(folder / "manifest.parquet", rows, ["even", "odd"])


def make_spec(layout: str, *, seed: int = 0, seconds: float = 0.0, shard_size: int = SHARD_SIZE) -> CacheSpec:
    """Depth, audio and the images; another seed is another spec."""
    latents = tuple(
        LatentSpec(modality=modality, source=SOURCE, seed=seed, parameters={"seconds": seconds})
        for modality in (Modality.DEPTH, Modality.AUDIO)
    )
    return CacheSpec(latents=latents, layout=layout, images="original", shard_size=shard_size)


def build(
    manifest: Manifest, path: Path, layout: str, *, seed: int = 0, seconds: float = 0.0, shard_size: int = SHARD_SIZE
) -> Path:
    spec = make_spec(layout, seed=seed, seconds=seconds, shard_size=shard_size)
    build_cache(manifest, spec, path, open_source=SmallSource)
    return path


def make_stores(folder: Path) -> dict[str, Path]:
    """A whole store of each layout and kind of commit records, by name; each time the same bytes."""
    manifest = make_manifest(folder / "data")
    stores = {}
    for layout in ("zarr", "webdataset"):
        built = build(manifest, folder / f"{layout}-built", layout)
        loose = copy_with_loose_records(built, folder / f"{layout}-loose")
        consolidated = shutil.copytree(loose, folder / layout)
        take_down([consolidated], [REMOVED])
        stores |= {f"{layout}, loose": loose, f"{layout}, consolidated": consolidated}
    return stores


def copy_with_loose_records(path: Path, target: Path) -> Path:
    """The same store, each shard's record in a file of its own, as a build leaves it that is not through.

    Records say how long a build took; these say the same each time, so that a case is the same each time.
    """
    store = open_store(path)
    meta = store.metadata
    recipes = {name: store.recipe(name) for name in store.modalities}
    copy = create_store(
        target, store.rows, store.class_names, store.shard_size, recipes, layout=store.layout_name, images=meta.images
    )
    for shard in store.shards:
        rows = store.kept_rows(shard)
        for modality in store.modalities:
            copy.write_shard(modality, shard, store.read(modality, rows), seconds=0.5, device="cpu")
        copy.write_images(shard, store.read_images(rows), seconds=0.5)
    write_card(copy)
    assert all(len(list((target / "commits" / name).glob("*.json"))) == len(copy.shards) for name in (*recipes, IMAGES))
    return target


def read_all(path: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path: two equal ones say that nothing was touched."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


if __name__ == "__main__":
    build(read_manifest(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3], shard_size=int(sys.argv[4]))
