"""Small made images and a source of ten lines, shared by the tests of the cache."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe

SIDE = 8


class PixelSource:
    """Latents [3, 2, 2] that are a function of pixels and seeds and nothing else."""

    def __init__(self, spec: LatentSpec, device: str, seconds: float = 0.0) -> None:
        latent_format = LatentFormat(
            kind="continuous", shape=(3, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype
        )
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters=spec.parameters,
            seed=spec.seed,
            source_view_size=SIDE,
            format=latent_format,
        )
        self.seconds = seconds

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        time.sleep(self.seconds)
        corners = pixels[:, :, ::4, ::4].astype(np.float32) / 255
        noise = np.array([np.random.default_rng(seed).normal(size=corners.shape[1:]) for seed in seeds])
        return corners + noise.astype(np.float32)

    def close(self) -> None:
        pass


def make_manifest(folder: Path, n_images: int) -> Manifest:
    """Noise PNGs of 8 x 8 in three splits, `images/image-<n>.png`, every fourth unlabelled."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(n_images):
        path = folder / "images" / f"image-{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows.append(
            ManifestRow(
                image_id=f"image-{number}",
                uri=path.relative_to(folder).as_posix(),
                label=None if number % 4 == 3 else number % 2,
                split=("train", "validation", "test")[number % 3],
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                width=SIDE,
                height=SIDE,
            )
        )
    return write_manifest(folder / "manifest.parquet", rows, ["even", "odd"])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path / "data", 23)


@pytest.fixture
def spec() -> CacheSpec:
    return CacheSpec(latents=(LatentSpec(modality=Modality.DEPTH, source="pixels"),), shard_size=5)


@pytest.fixture
def open_source() -> Callable[[LatentSpec, str], PixelSource]:
    return PixelSource
