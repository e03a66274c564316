"""How fast samples come out of the store in each layout, shuffled, beside webdataset's own reader.

    python bench/stores.py [--images 4000] [--rounds 5]

Latents [256, 64] float16 (32 KiB) and codes [4, 250] int16, made up, on a local disk with a WARM page cache: what a
second epoch sees. All readers in turn, round after round; the median of the rounds. Ours checks the CRC32C of every
byte that it hands over and reads in a full permutation; webdataset checks nothing and shuffles within 1000 samples.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.rows import RowTable, StoredImage

BATCH_SIZE = 256
SHARD_SIZE = 512


def make_recipe(modality: Modality, latent_format: LatentFormat) -> Recipe:
    return Recipe(
        modality=modality,
        source="made",
        weights_sha256="",
        parameters={},
        seed=0,
        source_view_size=224,
        format=latent_format,
    )


RECIPES = {
    "shape": make_recipe(
        Modality.SHAPE,
        LatentFormat(kind="continuous", shape=(256, 64), axes=("token", "channel"), dtype="float16"),
    ),
    "audio": make_recipe(
        Modality.AUDIO,
        LatentFormat(kind="codes", shape=(4, 250), axes=("codebook", "time"), dtype="int16", vocabulary=2048),
    ),
}


def make_stores(folder: Path, n_images: int) -> dict[str, LatentStore]:
    """The same made-up latents in both layouts."""
    rng = np.random.default_rng(0)
    rows = RowTable(
        [StoredImage(row, f"image-{row}", "0" * 64, "train", None, f"{row}.jpg") for row in range(n_images)]
    )
    stores = {
        layout: create_store(folder / layout, rows, [], SHARD_SIZE, RECIPES, layout=layout)
        for layout in ("zarr", "webdataset")
    }
    for shard in stores["zarr"].shards:
        latents = {
            "shape": rng.standard_normal((len(shard), 256, 64), np.float32),
            "audio": rng.integers(0, 2048, (len(shard), 4, 250)),
        }
        for store in stores.values():
            for modality, values in latents.items():
                store.write_shard(modality, shard, values, seconds=0, device="cpu")
    return {layout: open_store(folder / layout) for layout in stores}


def read_ours(path: Path, seed: int) -> int:
    """One epoch in random order, in batches."""
    store = open_store(path)
    order = np.random.default_rng(seed).permutation(len(store.rows))
    n_read = 0
    for start in range(0, len(order), BATCH_SIZE):
        batch = {modality: store.read(modality, order[start : start + BATCH_SIZE]) for modality in store.modalities}
        n_read += len(batch["shape"])
    return n_read


def read_with_webdataset(path: Path, seed: int) -> int:
    """One epoch as webdataset's documentation has it: a tar at a time, a shuffle buffer, then batches.

    Its series are read side by side, since it knows no join; each with the same seed.

    Source: https://webdataset.github.io/webdataset/gettingstarted
    """
    import webdataset

    store = open_store(path)
    streams = [
        webdataset.WebDataset(
            [str(store.shard_path(modality, shard.index)) for shard in store.shards], shardshuffle=False
        )
        .shuffle(1000, seed=seed)
        .decode()
        .to_tuple(f"{modality}.npy")
        .batched(BATCH_SIZE)
        for modality in store.modalities
    ]
    return sum(len(parts[0][0]) for parts in zip(*streams, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(Path(folder), arguments.images)
        readers: dict[str, Callable[[int], int]] = {
            "dla, zarr": lambda seed: read_ours(stores["zarr"].path, seed),
            "dla, webdataset": lambda seed: read_ours(stores["webdataset"].path, seed),
            "webdataset's own": lambda seed: read_with_webdataset(stores["webdataset"].path, seed),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for seed in range(-1, arguments.rounds):
            for name, read in readers.items():
                started = time.perf_counter()
                assert read(seed + 1) == arguments.images
                if seed >= 0:  # the first round only warms the page cache
                    rates[name].append(arguments.images / (time.perf_counter() - started))
        sizes = {
            layout: sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
            for layout, store in stores.items()
        }
    payload = arguments.images * (256 * 64 * 2 + 4 * 250 * 2)
    print(f"{arguments.images} images, {payload / 1e6:.0f} MB of payload, warm page cache, opening the store included")
    print(f"{'reader':<18}{'samples/s':>10}{'slowest':>10}{'fastest':>10}{'of zarr':>9}")
    zarr = statistics.median(rates["dla, zarr"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<18}{median:>10.0f}{min(values):>10.0f}{max(values):>10.0f}{median / zarr:>9.2f}")
    for layout, size in sizes.items():
        print(f"{layout}: {100 * (size / payload - 1):.2f} % over the payload")


if __name__ == "__main__":
    main()
