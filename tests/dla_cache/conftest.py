"""Small made images and a source of ten lines, shared by the tests of the cache."""

import functools
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from dla_cache.store import LatentStore, create_store
from dla_cache.store.rows import RowTable, StoredImage

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


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
                sha256=sha256_of(path),
                width=SIDE,
                height=SIDE,
            )
        )
    return write_manifest(folder / "manifest.parquet", rows, ["even", "odd"])


def make_recipe(
    shape: tuple[int, ...] = (3, 2, 2), dtype: str = "float16", modality: Modality = Modality.DEPTH, seed: int = 0
) -> Recipe:
    """A recipe of continuous latents, channels first, or of codes where `dtype` is an integer."""
    is_continuous = dtype.startswith("float")
    latent_format = LatentFormat(
        kind="continuous" if is_continuous else "codes",
        shape=shape,
        axes=("channel" if is_continuous else "codebook", "height", "width")[: len(shape)],
        dtype=dtype,
        vocabulary=None if is_continuous else 100,
    )
    return Recipe(
        modality=modality,
        source="made",
        weights_sha256="",
        parameters={},
        seed=seed,
        source_view_size=SIDE,
        format=latent_format,
    )


def make_rows(n_images: int) -> RowTable:
    """Images `image-0`, `image-1`, … that exist nowhere, in turn of two splits."""
    return RowTable(
        [
            StoredImage(row, f"image-{row}", "0" * 64, ("train", "test")[row % 2], None, f"{row}.png")
            for row in range(n_images)
        ]
    )


def make_latents(recipe: Recipe, n_images: int, seed: int = 0) -> NDArray[np.generic]:
    """Normal values or codes, [n, *shape] in the recipe's dtype."""
    rng = np.random.default_rng(seed)
    shape = (n_images, *recipe.format.shape)
    if recipe.format.vocabulary is None:
        return rng.normal(3, 2, shape).astype(recipe.format.dtype)
    return rng.integers(0, recipe.format.vocabulary, shape).astype(recipe.format.dtype)


def fill_store(
    path: Path, recipe: Recipe, latents: NDArray[np.generic], shard_size: int, layout: str = "zarr"
) -> LatentStore:
    """A whole store of these latents under the images of `make_rows`."""
    recipes = {recipe.modality.value: recipe}
    store = create_store(path, make_rows(len(latents)), [], shard_size, recipes, layout=layout)
    for shard in store.shards:
        store.write_shard(recipe.modality.value, shard, latents[shard.start : shard.stop], seconds=0.1, device="cpu")
    return store


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of a store runs on each layout, unless it or its module's `LAYOUTS` says which."""
    chosen = any("layout" in marker.args[0] for marker in metafunc.definition.iter_markers("parametrize"))
    if "layout" in metafunc.fixturenames and not chosen:
        layouts = getattr(metafunc.module, "LAYOUTS", ["zarr", "webdataset"])
        metafunc.parametrize("layout", layouts, indirect=True, scope="session")


@pytest.fixture(scope="session")
def layout(request: pytest.FixtureRequest) -> str:
    """How the stores of this test lie on disk."""
    return request.param


@pytest.fixture(scope="session")
def made(layout: str) -> SimpleNamespace:
    """The makers above: with importlib mode a test cannot import its conftest."""
    return SimpleNamespace(
        manifest=make_manifest,
        recipe=make_recipe,
        rows=make_rows,
        latents=make_latents,
        store=functools.partial(fill_store, layout=layout),
        create=functools.partial(create_store, layout=layout),
        sha256=sha256_of,
        sha256_of_bytes=lambda content: hashlib.sha256(content).hexdigest(),
    )


class Death(BaseException):
    """Ends the process as far as our code can see: no handler of ours catches it."""


@pytest.fixture
def dies_before(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], bool]:
    """`dies_before(step, work)`: whether `work` died, which it does before that step to disk, counted from 0."""

    def run(step: int, work: Callable[[], object]) -> bool:
        steps_left = step

        def mortal(call: Callable) -> Callable:
            def call_or_die(*arguments: object, **options: object) -> object:
                nonlocal steps_left
                if steps_left == 0:
                    raise Death
                steps_left -= 1
                return call(*arguments, **options)

            return call_or_die

        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, mortal(getattr(os, name)))
            patch.setattr(os, "fsync", mortal(lambda _descriptor: None))  # no power cut is played here
            try:
                work()
            except Death:
                return True
        return False

    return run


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_manifest(tmp_path / "data", 23)


@pytest.fixture
def spec(layout: str) -> CacheSpec:
    return CacheSpec(latents=(LatentSpec(modality=Modality.DEPTH, source="pixels"),), shard_size=5, layout=layout)


@pytest.fixture
def open_source() -> Callable[[LatentSpec, str], PixelSource]:
    return PixelSource
