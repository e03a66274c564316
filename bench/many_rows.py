"""How long a store of many rows takes to open and to hand out its first batch, and how much memory.

The rows, their records and their shards' names are all there, ten million of them; the shards' bytes are those of one
shard, under many names (hard links), because 10 M latents would be 350 GB. `python bench/many_rows.py` prints a table.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from dla_cache.parquet import to_parquet
from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.commits import table_of
from dla_cache.store.row_blocks import schema_of
from dla_cache.store.row_parts import parts_of
from dla_cache.store.rows import RowTable

SHARD_SIZE = 512
ROUNDS = 5

ONE_BATCH = """
import json, resource, sys, time
from pathlib import Path
from dla_cache.order import BlockShuffle
from dla_cache.pairs import PairStream
from dla_cache.store import open_store

def memory():
    return dict(line.split(":") for line in open("/proc/self/status") if ":" in line)

def kilobytes(name):
    return int(memory()[name].split()[0])

before = {name: kilobytes(name) for name in ("VmHWM", "RssAnon")}
started = time.perf_counter()
store = open_store(Path(sys.argv[1]))
opened = time.perf_counter()
shuffle = BlockShuffle() if sys.argv[2] == "blocks" else True
stream = PairStream(store, None, ["train"], 256, seed=0, decode=None, images=False, shuffle=shuffle)
batch = stream.batch(0)
first = time.perf_counter()
assert len(set(batch.image_ids)) == 256
after = {name: kilobytes(name) for name in before}
print(json.dumps({
    "open": opened - started,
    "first batch": first - started,
    "peak MB": (after["VmHWM"] - before["VmHWM"]) / 1e3,
    "of them not files MB": (after["RssAnon"] - before["RssAnon"]) / 1e3,
}))
"""


def make_store(folder: Path, n_rows: int) -> LatentStore:
    """A store of codes [4, 250] and latents [256, 64] of images that exist nowhere."""
    names = pa.array([f"image-{row}" for row in range(n_rows)])
    table = pa.table(
        [
            np.arange(n_rows),
            names,
            pa.array([b"\0" * 32] * n_rows, pa.binary(32)),
            pa.array(["train"] * n_rows),
            pa.array(np.arange(n_rows, dtype=np.int32) % 1000),
            names,
            np.zeros(n_rows, bool),
        ],
        schema=schema_of(is_multi_label=False),
    )
    rows = RowTable.of_parts(parts_of(table), is_multi_label=False)
    recipes = {
        "audio": recipe(
            Modality.AUDIO, kind="codes", shape=(4, 250), axes=("codebook", "time"), dtype="int16", vocabulary=2048
        ),
        "shape": recipe(Modality.SHAPE, kind="continuous", shape=(256, 64), axes=("token", "channel"), dtype="float16"),
    }
    store = create_store(folder, rows, [f"class {label}" for label in range(1000)], SHARD_SIZE, recipes)
    for modality, one in recipes.items():
        latents = np.random.default_rng(0).integers(0, 2048, (SHARD_SIZE, *one.format.shape))
        store.write_shard(modality, store.shards[0], latents.astype(one.format.dtype), seconds=0, device="cpu")
        (loose,) = (folder / "commits" / modality).glob("*.json")
        record = store.committed(modality)[0]
        whole = [shard for shard in store.shards if len(shard) == SHARD_SIZE]
        for shard in whole[1:]:
            os.link(store.shard_path(modality, 0), store.shard_path(modality, shard.index))
        content = to_parquet(table_of(record.model_copy(update={"shard": shard.index}) for shard in whole))
        (loose.parent / name_of(content)).write_bytes(content)
        loose.unlink()
        for shard in store.shards[len(whole) :]:
            rest = latents[: len(shard)].astype(one.format.dtype)
            open_store(folder).write_shard(modality, shard, rest, seconds=0, device="cpu")
    return store


def name_of(content: bytes) -> str:
    """Of a file of many records."""
    return f"consolidated-{hashlib.sha256(content).hexdigest()[:16]}.parquet"


def recipe(modality: Modality, **latent: object) -> Recipe:
    """Of numbers that nobody computed."""
    return Recipe(
        modality=modality,
        source="made",
        weights_sha256="",
        parameters={},
        seed=0,
        source_view_size=224,
        format=LatentFormat.model_validate(latent),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    print("| rows | shuffle | opened, ms | first batch, ms | peak memory above imports, MB | of it not of files, MB |")
    print("|---|---|---|---|---|---|")
    for n_rows in arguments.rows:
        store = folder / f"rows-{n_rows}"
        started = time.perf_counter()
        make_store(store, n_rows)
        print(f"made {n_rows:,} rows in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for shuffle in ("permuted", "blocks"):
            command = [sys.executable, "-c", ONE_BATCH, str(store), shuffle]
            found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(ROUNDS)]
            middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
            print(
                f"| {n_rows:,} | {shuffle} | {1e3 * middle['open']:.0f} | {1e3 * middle['first batch']:.0f}"
                f" | {middle['peak MB']:.0f} | {middle['of them not files MB']:.0f} |",
                flush=True,
            )
        shutil.rmtree(store)
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
