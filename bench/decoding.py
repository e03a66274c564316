"""What decoding costs: a build of the undecoded latents, of the decoded pictures, and of pictures encoded again.

    python bench/decoding.py [--rounds 5] [--images 1024] [--modality depth]

Real builds on one thread, into a store, of the same images, one source after the other, round after round in random
order. A rate is all images over the `seconds` of the commit records, from the first image read to the latents in hand.
Beside it the processor's time of a whole build, which other work on the machine changes little; the ratio is the median
of the rounds' ratios of that.
"""

import argparse
import hashlib
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from cli.render import print_table
from dla_cache.build import build_cache
from dla_cache.data.export import encode_png
from dla_cache.data.relief_digits import render_split
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.sources import open_source
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store

WAYS = ("", "-decoded", "-reencoded")
"""After the name of the plain source."""


def main() -> None:
    """Builds all three round after round and prints their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--modality", choices=["depth", "audio"], default="depth")
    options = parser.parse_args()
    sources = [f"embedded-{options.modality}{way}" for way in WAYS]
    folder = Path(tempfile.mkdtemp(prefix="bench-decoding-"))
    try:
        manifest = write_images(folder / "data", options.images)
        rates: dict[str, list[float]] = {source: [] for source in sources}
        cpu_ms: dict[str, list[float]] = {source: [] for source in sources}
        sizes: dict[str, float] = {}
        for number in range(options.rounds):
            for source in random.Random(number).sample(sources, len(sources)):
                began = time.process_time()
                rate, sizes[source] = build(manifest, source, Modality(options.modality), folder / "store")
                cpu_ms[source].append(1000 * (time.process_time() - began) / len(manifest))
                rates[source].append(rate)
    finally:
        shutil.rmtree(folder)
    load = " ".join(f"{average:.1f}" for average in os.getloadavg())
    print(f"{options.images} images of 32 pixels, one thread, {options.rounds} rounds; load average {load}")
    rows = []
    for source in sources:
        ratios = [spent / plain for spent, plain in zip(cpu_ms[source], cpu_ms[sources[0]], strict=True)]
        speeds = (f"{of(rates[source]):.0f}" for of in (statistics.median, min, max))
        cost = (f"{statistics.median(cpu_ms[source]):.2f}", f"{statistics.median(ratios):.2f}")
        rows.append((source, *speeds, *cost, f"{sizes[source]:.0f}"))
    headers = ("source", "images/s", "slowest", "fastest", "CPU ms/image", "times the plain one's", "bytes/image")
    print_table(headers, rows)


def write_images(folder: Path, n_images: int) -> Manifest:
    """So many images of relief-digits and their list."""
    folder.mkdir()
    _, pixels, _ = render_split("validation")
    rows = []
    for number, image in zip(range(n_images), itertools.cycle(pixels), strict=False):
        content = encode_png(np.asarray(image))
        (folder / f"image-{number}.png").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        rows.append(ManifestRow(f"image-{number}", f"image-{number}.png", None, "train", digest, 32, 32))
    return write_manifest(folder / "manifest.parquet", rows, [])


def build(manifest: Manifest, source: str, modality: Modality, path: Path) -> tuple[float, float]:
    """Images a second of a whole build, and bytes an image in the store, which is removed again."""
    spec = CacheSpec(latents=(LatentSpec(modality=modality, source=source),))
    build_cache(manifest, spec, path, open_source=open_source, batch_size=64)
    records = open_store(path).committed(modality.value).values()
    seconds, size_bytes = sum(record.seconds for record in records), sum(record.size_bytes for record in records)
    shutil.rmtree(path)
    return len(manifest) / seconds, size_bytes / len(manifest)


if __name__ == "__main__":
    main()
