"""Stores of dla for the bench: the samples in either layout, or codes alone, as many as wanted."""

import hashlib
from pathlib import Path

import numpy as np
from serving import CODES, SHAPE, SIDE, Samples

from dla_cache.spec import ORIGINAL_IMAGES, LatentFormat, Modality, Recipe
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable, StoredImage

SHARD_SIZE = 512
VOCABULARY = 2048


def make_recipe(modality: Modality, latent_format: LatentFormat) -> Recipe:
    return Recipe(
        modality=modality,
        source="made",
        weights_sha256="",
        parameters={},
        seed=0,
        source_view_size=SIDE,
        format=latent_format,
    )


LATENTS_RECIPE = make_recipe(
    Modality.SHAPE, LatentFormat(kind="continuous", shape=SHAPE, axes=("token", "channel"), dtype="float16")
)
CODES_RECIPE = make_recipe(
    Modality.AUDIO,
    LatentFormat(kind="codes", shape=CODES, axes=("codebook", "time"), dtype="int16", vocabulary=VOCABULARY),
)


def write_store(samples: Samples, folder: Path, layout: str) -> None:
    """The samples with the bytes of their images."""
    images = list(samples.images())
    rows = make_rows([hashlib.sha256(image).hexdigest() for image in images])
    recipes = {"shape": LATENTS_RECIPE, "audio": CODES_RECIPE}
    store = create_store(folder, rows, [], SHARD_SIZE, recipes, layout=layout, images=ORIGINAL_IMAGES)
    for shard in store.shards:
        part = slice(shard.start, shard.stop)
        store.write_shard("shape", shard, samples.latents[part], seconds=0, device="cpu")
        store.write_shard("audio", shard, samples.codes[part], seconds=0, device="cpu")
        store.write_images(shard, images[part], seconds=0)
    for series in store.series:
        store.consolidate(series)


def write_codes(folder: Path, n_images: int) -> None:
    """Codes [4, 250] of images that exist nowhere, in the Zarr layout."""
    rows = make_rows(["0" * 64] * n_images)
    store = create_store(folder, rows, [], SHARD_SIZE, {"audio": CODES_RECIPE})
    rng = np.random.default_rng(0)
    for shard in store.shards:
        store.write_shard("audio", shard, rng.integers(0, VOCABULARY, (len(shard), *CODES)), seconds=0, device="cpu")
    store.consolidate("audio")


def make_rows(sha256s: list[str]) -> RowTable:
    return RowTable(
        [StoredImage(row, f"image-{row}", sha256, "train", None, f"{row}.jpg") for row, sha256 in enumerate(sha256s)]
    )
