"""How fast a store's images are read and decoded, by how it holds them, and what a scaled decode saves.

    python bench/image_encodings.py [--folder bench-out/image-encodings] [--images 400] [--rounds 7]

Made-up photos, JPEGs of 500 x 375 pixels and 90 kB, in three stores on a local disk with a WARM page
cache. `PairStream` reads them in shuffled order, decodes every image every time and does nothing else; its one thread
decodes. The stores take turns in random order, round after round; figures are medians of the rounds.
"""

import argparse
import hashlib
import random
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from store_samples import make_grain

from cli.render import print_table
from dla_cache.images import Pixels, centre_square, decode_image
from dla_cache.pairs import PairStream
from dla_cache.spec import ORIGINAL_IMAGES, CacheSpec, ImageRecipe
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.stored_images import encode_image, image_recipe

HEIGHT, WIDTH = 375, 500
VIEW = 224
BATCH_SIZE = 50

Decode = Callable[[bytes, str], Pixels]


def view(content: bytes, image_id: str, *, is_scaled: bool = False) -> Pixels:
    """What a model of 224 pixels sees."""
    return centre_square(decode_image(content, image_id, min_side=VIEW if is_scaled else None), VIEW)


TASKS: dict[str, Decode] = {"decoded": decode_image, f"view of {VIEW} px": view}


def make_photo(number: int, grain: NDArray[np.float32], height: int, width: int) -> bytes:
    """Smooth shapes under grain, as a JPEG."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    tiled = np.tile(grain, (-(-height // 1024), -(-width // 1024), 1))[:height, :width]
    pixels = np.asarray(coarse) + rng.uniform(11, 17) * np.roll(tiled, tuple(rng.integers(0, 1024, 2)), (0, 1))
    return simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), 90, colorsubsampling="420")


def recipes() -> dict[str, ImageRecipe]:
    small = {"latents": [{"modality": "depth", "source": "none"}]}
    made = {name: image_recipe(CacheSpec.model_validate({**small, "images": name})) for name in ("jpeg", "raw")}
    return {"original": ORIGINAL_IMAGES} | {name: recipe for name, recipe in made.items() if recipe is not None}


def write_store(folder: Path, photos: list[bytes], recipe: ImageRecipe) -> LatentStore:
    ids = [f"image-{number}" for number in range(len(photos))]
    rows = [
        StoredImage(row, image_id, hashlib.sha256(photo).hexdigest(), "train", None, f"{image_id}.jpg")
        for row, (image_id, photo) in enumerate(zip(ids, photos, strict=True))
    ]
    store = create_store(folder, RowTable(rows), [], len(rows), {}, images=recipe)
    pictures = [encode_image(photo, image_id, recipe) for photo, image_id in zip(photos, ids, strict=True)]
    store.write_images(store.shards[0], pictures, seconds=0)
    return open_store(folder)


def images_per_s(store: LatentStore, decode: Decode, epoch: int) -> float:
    stream = PairStream(store, None, None, BATCH_SIZE, seed=0, decode=decode, modalities=(), keep_decoded_bytes=0)
    start = time.perf_counter()
    n_images = sum(len(batch.image_ids) for batch in stream.epoch_once(epoch))
    return n_images / (time.perf_counter() - start)


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast a store's images are decoded, by how it holds them.")
    parser.add_argument("--folder", type=Path, default=Path("bench-out/image-encodings"))
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    grain = make_grain()
    photos = [make_photo(number, grain, HEIGHT, WIDTH) for number in range(options.images)]
    stores = {name: write_store(options.folder / name, photos, recipe) for name, recipe in recipes().items()}
    rates: dict[tuple[str, str], list[float]] = {(name, task): [] for name in stores for task in TASKS}
    for number in range(options.rounds + 1):
        turns = list(rates)
        random.Random(number).shuffle(turns)
        for name, task in turns:
            rate = images_per_s(stores[name], TASKS[task], number)
            if number:  # the first round warms the page cache
                rates[name, task].append(rate)
    sizes = {name: store.committed("images")[0].size_bytes / options.images for name, store in stores.items()}
    print_table(
        ["images", "bytes/image", *(f"{task}, images/s" for task in TASKS)],
        [
            [name, f"{sizes[name]:,.0f}", *(f"{statistics.median(rates[name, task]):,.0f}" for task in TASKS)]
            for name in stores
        ],
    )

    print()
    times: dict[tuple[str, bool], list[float]] = {}
    large = {
        f"{height} x {width}": make_photo(0, grain, height, width) for height, width in ((768, 1024), (3000, 4000))
    }
    for _ in range(options.rounds):
        for name, photo in large.items():
            for is_scaled in (False, True):
                work = partial(view, photo, name, is_scaled=is_scaled)
                times.setdefault((name, is_scaled), []).append(milliseconds(work))
    print_table(
        [f"one JPEG to {VIEW} px", "bytes", "whole, ms", "scaled, ms"],
        [
            [name, f"{len(photo):,}", *(f"{statistics.median(times[name, scaled]):.1f}" for scaled in (False, True))]
            for name, photo in large.items()
        ],
    )


if __name__ == "__main__":
    main()
