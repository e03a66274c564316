"""One figure of dla by itself: `python dla_alone.py FIGURE STORE [N ...]` prints JSON."""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dla_stores import write_codes

from dla_cache.order import order_of
from dla_cache.pairs import BlockShuffle, PairStream
from dla_cache.store import open_store

BATCH_SIZE = 256
N_LOOKUPS = 2000
N_ROUNDS = 5
MIN_SECONDS = 0.5
SHUFFLES = {"permuted": True, "blocks": BlockShuffle()}


def first_latents(folder: Path) -> None:
    """Opens a store and reads its first batch of latents."""
    store = open_store(folder)
    rows = order_of(len(store.rows), True, 0).positions(0, 0, BATCH_SIZE)
    for modality in store.modalities:
        torch.from_numpy(store.read(modality, rows))


def first_pairs(folder: Path) -> None:
    """Opens a store that holds its images and reads its first batch of pairs."""
    PairStream(open_store(folder), None, None, BATCH_SIZE, seed=0, decode=None).batch(0)


def median_cost(work: Callable[[Path], None], folder: Path) -> dict[str, float]:
    """Medians of what the work costs in fresh processes."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        costs = [pool.apply(cost, (work, folder)) for _ in range(N_ROUNDS)]
    return {name: statistics.median(each[name] for each in costs) for name in costs[0]}


def cost(work: Callable[[Path], None], folder: Path) -> dict[str, float]:
    """Seconds, and by how many MB the memory of the process, which has imported all it needs, grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    work(folder)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3}


def lookup(folder: Path) -> dict[str, float]:
    """Microseconds from an image ID to its latent [256, 64], in random order: median and 99th percentile."""
    store = open_store(folder)
    image_ids = store.rows.image_ids
    for modality in store.modalities:  # shards are mapped at their first use
        store.read(modality, np.arange(0, len(image_ids), store.shard_size))
    store.rows.row_of(image_ids[0])
    seconds = []
    for row in np.random.default_rng(0).choice(len(image_ids), N_LOOKUPS):
        image_id = image_ids[row]
        started = time.perf_counter()
        store.read("shape", np.array([store.rows.row_of(image_id)]))
        seconds.append(time.perf_counter() - started)
    return {"p50": 1e6 * statistics.median(seconds), "p99": 1e6 * float(np.quantile(seconds, 0.99))}


def codes_rates(folders: Sequence[Path]) -> dict[str, list[float]]:
    """Codes a second of each store in each kind of shuffle: medians of rounds in which all take turns."""
    readers = {name: [open_codes(folder, shuffle) for folder in folders] for name, shuffle in SHUFFLES.items()}
    rounds = [{name: [rate_of(read) for read in reads] for name, reads in readers.items()} for _ in range(N_ROUNDS)]
    return {
        name: [statistics.median(rates) for rates in zip(*(found[name] for found in rounds), strict=True)]
        for name in SHUFFLES
    }


def open_codes(folder: Path, shuffle: bool | BlockShuffle) -> Callable[[int], int]:
    """Reads an epoch of a store of codes, all shards open; how many there are."""
    store = open_store(folder)
    order = order_of(len(store.rows), shuffle, 0)
    store.read("audio", np.arange(0, order.n, store.shard_size))

    def read_epoch(epoch: int) -> int:
        starts = range(0, order.n, BATCH_SIZE)
        return sum(
            len(store.read("audio", order.positions(epoch, start, min(start + BATCH_SIZE, order.n))))
            for start in starts
        )

    return read_epoch


def rate_of(read_epoch: Callable[[int], int]) -> float:
    n, epoch, seconds = 0, 0, 0.0
    while seconds < MIN_SECONDS:
        started = time.perf_counter()
        n += read_epoch(epoch)
        seconds += time.perf_counter() - started
        epoch += 1
    return n / seconds


if __name__ == "__main__":
    figure, path = sys.argv[1], Path(sys.argv[2])
    figures: dict[str, Callable[[], Any]] = {
        "first-latents": lambda: median_cost(first_latents, path),
        "first-pairs": lambda: median_cost(first_pairs, path),
        "lookup": lambda: lookup(path),
        "codes": lambda: codes_rates([path / n for n in sys.argv[3:]]),
        "make-codes": lambda: write_codes(path, int(sys.argv[3])),
    }
    print(json.dumps(figures[figure]()))
