"""How fast samples come out of a store, shuffled, beside the libraries that others use for it.

    python bench/stores.py [--folder bench-out/stores] [--images 4000] [--rounds 5] [--full]

Made-up samples on a local disk with a WARM page cache: what a second epoch sees. Each library reads the same samples
in a format of its own, in an interpreter of its own that this script makes with pip, with the settings that its
documentation advises: see the links in `store_peers/`. All readers take turns in random order, round after round. A
rate is counted behind the first batch of an epoch; a ratio is the median of the rounds' ratios. The sums of what every
reader hands out are compared with those of the samples before anything is measured.

What was written is kept: the next run starts with measuring. `--full` adds a million rows of codes, 2 GB.
"""

import argparse
import os
import random
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from store_environments import ENVIRONMENTS, make_environment
from store_report import (
    CEILING,
    DATASETS,
    DOCUMENTED,
    FILES,
    LATENTS,
    LITDATAS,
    MOSAIC,
    OUR_PROCESSES,
    OUR_TARS,
    OURS,
    SAFETENSORS,
    SIMPLEJPEG,
    TASKS,
    WEBDATASETS,
    goal_rows,
    show_rates,
    show_table,
    verdict,
)
from store_samples import make_samples, payload_bytes
from store_workers import Peer, ReaderError, Worker, run_alone

PEERS = (
    Peer(OURS, "dla_reader.py", "zarr", None, "dla-zarr", TASKS),
    Peer(OUR_TARS, "dla_reader.py", "webdataset", None, "dla-webdataset", TASKS),
    Peer(OUR_PROCESSES, "dla_reader.py", "zarr processes", None, "dla-zarr", (DOCUMENTED, SIMPLEJPEG)),
    Peer(MOSAIC, "mosaicml_reader.py", "", "mosaicml", "mosaicml", TASKS),
    Peer(LITDATAS[0], "litdata_reader.py", "tuned", "litdata", "litdata", TASKS),
    Peer(LITDATAS[1], "litdata_reader.py", "defaults", "litdata", "litdata", (LATENTS,)),
    Peer(WEBDATASETS[0], "webdataset_reader.py", "own", "webdataset", "webdataset", TASKS),
    Peer(WEBDATASETS[1], "webdataset_reader.py", "ours", "webdataset", "dla-webdataset", (LATENTS, FILES)),
    Peer(DATASETS[0], "datasets_reader.py", "torch", "datasets", "datasets", TASKS),
    Peer(DATASETS[1], "datasets_reader.py", "arrow", "datasets", "datasets", TASKS),
    Peer(SAFETENSORS[0], "safetensors_reader.py", "mapped", "safetensors", "safetensors", TASKS),
    Peer(SAFETENSORS[1], "safetensors_reader.py", "slices", "safetensors", "safetensors", (LATENTS,)),
    Peer("zarr-python, rows", "zarr_reader.py", "rows", "zarr", "dla-zarr", (LATENTS,)),
    Peer("zarr-python, whole shards", "zarr_reader.py", "shards", "zarr", "dla-zarr", (LATENTS,)),
    Peer("tensorstore", "tensorstore_reader.py", "", "tensorstore", "dla-zarr", (LATENTS,)),
    Peer(CEILING, "ceiling_reader.py", "", None, "samples", (LATENTS,)),
)
"""Those that write a folder stand before those that only read it."""

UNDECODED = (LATENTS, FILES)
BATCH_SIZE, DECODED_BATCH_SIZE = 256, 64
N_WORKERS = 2
"""Of the tasks that decode; the others have none."""

ALONE = "alone"
"""What is asked of dla by itself: starts, look-ups, bytes, rows."""

CODES_ROWS = (1_000, 10_000, 100_000)
FULL_CODES_ROWS = 1_000_000


def main() -> None:
    """Makes what is missing, measures, and prints tables and goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-out/stores"))
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--readers", nargs="+", metavar="NAME", help="only those whose names begin so, as `dla`")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, ALONE), default=(*TASKS, ALONE))
    parser.add_argument("--full", action="store_true", help="a million rows of codes too")
    parser.add_argument("--pip-args", type=shlex.split, default=[], metavar="ARGS", help="for pip, in one string")
    options = parser.parse_args()
    chosen = [
        peer
        for peer in PEERS
        if (not options.readers or peer.name.startswith(tuple(options.readers)))
        and (ALONE in options.tasks or not set(options.tasks).isdisjoint(peer.tasks))
    ]
    environments = {
        name: make_environment(name, options.folder / "environments" / name, options.pip_args)
        for name in ENVIRONMENTS
        if name in {peer.environment for peer in chosen}
    }
    data = options.folder / f"{options.images}-images"
    checksums = make_samples(data / "samples", options.images)
    goals = []
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(peer, environments.get(peer.environment or "", sys.executable), _log_of(options.folder, peer))
            )
            for peer in chosen
        ]
        versions = write_all(workers, data)
        print_head(options.images, options.rounds, data, versions)
        rng = random.Random(0)
        for task in TASKS:
            taking_part = [worker for worker in workers if task in worker.peer.tasks]
            if task in options.tasks:
                goals += measure_task(task, taking_part, data, checksums, options.rounds, rng)
    if ALONE in options.tasks:
        goals += measure_alone(data, options.folder, options.full)
    print()
    show_table(("goal", "measured", "wanted", "verdict"), goals)
    print(f"load average at the end {_load()}")


def _log_of(folder: Path, peer: Peer) -> Path:
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{Path(peer.script).stem} {peer.variant}.log"


def write_all(workers: Sequence[Worker], data: Path) -> dict[str, None]:
    """Has every format written that is not there yet; the libraries' versions."""
    versions = {}
    written = set()
    for worker in workers:
        folder = data / worker.peer.folder
        is_writer = worker.peer.folder not in written and not (data / f"{worker.peer.folder}.written").exists()
        if is_writer:
            print(f"writing {folder}", file=sys.stderr)
            if worker.peer.folder != "samples":
                shutil.rmtree(folder, ignore_errors=True)
        answer = worker.ask(
            {"do": "write" if is_writer else "version", "folder": str(folder), "samples": str(data / "samples")}
        )
        versions[answer["version"]] = None
        written.add(worker.peer.folder)
        (data / f"{worker.peer.folder}.written").touch()
    return versions


def print_head(n_images: int, rounds: int, data: Path, versions: Mapping[str, None]) -> None:
    payload = payload_bytes(data / "samples")
    print(
        f"{n_images} samples: {payload['latents'] / 1e6:.0f} MB of latents and codes,"
        f" {payload['images'] / 1e6:.0f} MB of JPEG images; local disk, WARM page cache, {os.cpu_count()} cores,"
        f" load average {_load()}"
    )
    print(
        f"medians of {rounds} interleaved rounds in random order; batches of {batch_size_of(LATENTS, n_images)},"
        f" of {batch_size_of(DOCUMENTED, n_images)} where images are decoded"
    )
    print(f"python {sys.version.split()[0]}, {', '.join(versions)}")


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def measure_task(
    task: str,
    workers: Sequence[Worker],
    data: Path,
    checksums: Mapping[str, Sequence[int]],
    rounds: int,
    rng: random.Random,
) -> list[tuple[str, str, str, str]]:
    """Checks and times the readers of a task, shows their rates; the rows of its goals."""
    first_batch_s: dict[str, float] = {}
    rates: dict[str, list[float]] = {worker.peer.name: [] for worker in workers}
    for worker in workers:
        print(f"{task}: {worker.peer.name}", file=sys.stderr)
        warm(data / worker.peer.folder)
        answer = worker.ask(
            {
                "do": "check",
                "folder": str(data / worker.peer.folder),
                "task": task,
                "batch_size": batch_size_of(task, checksums["latents"][0]),
                "workers": 0 if task in UNDECODED else N_WORKERS,
            }
        )
        compare(worker.peer.name, task, answer["checksum"], checksums)
        first_batch_s[worker.peer.name] = answer["first_batch_s"]
    for _ in range(rounds):
        for worker in rng.sample(workers, len(workers)):
            folder = str(data / worker.peer.folder)
            answer = worker.ask({"do": "measure", "folder": folder, "task": task})
            rates[worker.peer.name].append(answer["samples_per_s"])
    show_rates(task, rates, first_batch_s)
    return goal_rows(task, rates)


def batch_size_of(task: str, n_images: int) -> int:
    """The same for all readers; never so large that an epoch has no second batch."""
    return min(BATCH_SIZE if task in UNDECODED else DECODED_BATCH_SIZE, max(n_images // 4, 1))


def warm(folder: Path) -> None:
    """Reads every file once, so that the page cache has it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def compare(name: str, task: str, found: Sequence[int], checksums: Mapping[str, Sequence[int]]) -> None:
    """Passes if a reader handed out each sample once; decoders may differ by a thousandth of the mean.

    Raises:
        ReaderError: if not.
    """
    wanted = checksums[task if task in UNDECODED else "pixels"]
    slack = 0 if task in UNDECODED else wanted[3] / 1000
    if list(found[:3]) != list(wanted[:3]) or abs(found[3] - wanted[3]) > slack:
        raise ReaderError(f"`{name}` hands out other samples in `{task}`: {list(found)} and not {list(wanted)}")


def measure_alone(data: Path, folder: Path, full: bool) -> list[tuple[str, str, str, str]]:
    """What is asked of dla by itself: the rows of these goals, and tables."""
    print("dla by itself", file=sys.stderr)
    goals = []
    n_images = payload_bytes(data / "samples")["samples"]
    for layout in ("zarr", "webdataset"):
        for figure, what in (("first-latents", "latents and codes"), ("first-pairs", "the same and files")):
            start = run_alone(figure, data / f"dla-{layout}")
            milliseconds = 1000 * start["seconds"]
            row = f"first batch, {n_images} samples, {layout}, {what} ({start['megabytes']:.0f} MB above imports)"
            goals.append((row, f"{milliseconds:.0f} ms", "<= 50 ms", verdict(milliseconds <= 50)))
    for layout in ("zarr", "webdataset"):
        found = run_alone("lookup", data / f"dla-{layout}")
        row = f"latent by image ID, p50, {layout} (p99 {found['p99']:.0f} us)"
        goals.append((row, f"{found['p50']:.0f} us", "<= 60 us", verdict(found["p50"] <= 60)))
    goals += overhead_rows(data)
    return goals + measure_codes(folder / "codes", (*CODES_ROWS, FULL_CODES_ROWS) if full else CODES_ROWS)


def overhead_rows(data: Path) -> list[tuple[str, str, str, str]]:
    """Bytes of the latents and codes of both layouts over those of their numbers, index and records included."""
    rows = []
    payload = payload_bytes(data / "samples")
    for layout, below in (("zarr", "latents/"), ("webdataset", "")):
        store = data / f"dla-{layout}"
        for series, name in (("latents", "shape"), ("codes", "audio")):
            size = sum(p.stat().st_size for p in (store / f"{below}{name}").rglob("*") if p.is_file())
            over = 100 * (size / payload[series] - 1)
            sample = f"{payload[series] // payload['samples']} B a sample"
            is_goal = layout == "zarr" and series == "latents"
            goal = ("<= 1 %", verdict(over <= 1)) if is_goal else ("", "")
            rows.append((f"bytes over payload, {layout}, {series} of {sample}", f"{over:.2f} %", *goal))
    return rows


def measure_codes(folder: Path, sizes: Sequence[int]) -> list[tuple[str, str, str, str]]:
    """Codes alone from stores of growing size, in turn, in both kinds of shuffle."""
    stores = {n: folder / str(n) for n in sizes}
    for n, store in stores.items():
        done = store.with_suffix(".written")
        if not done.exists():
            print(f"writing {store}", file=sys.stderr)
            shutil.rmtree(store, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            run_alone("make-codes", store, str(n))
            done.touch()
        warm(store)
    shuffles = {"permuted": "full permutation", "blocks": "blocks of 512, 16 at a time"}
    rates = run_alone("codes", folder, *map(str, sizes))
    starts = [run_alone("first-latents", store) for store in stores.values()]
    print("\ncodes int16 [4, 250] alone, codes/s, medians of interleaved rounds in one process")
    show_table(
        ("rows", *shuffles.values(), "first batch, ms", "MB above imports"),
        [
            (
                f"{n}",
                *(f"{rates[shuffle][place]:.0f}" for shuffle in shuffles),
                f"{1000 * starts[place]['seconds']:.0f}",
                f"{starts[place]['megabytes']:.0f}",
            )
            for place, n in enumerate(sizes)
        ],
    )
    goals = []
    for shuffle, name in shuffles.items():
        slowest, fastest = min(rates[shuffle]), max(rates[shuffle])
        spread = 100 * (fastest - slowest) / (fastest + slowest)
        row = f"codes from {sizes[0]} to {sizes[-1]} rows, {name}: off their middle"
        goals.append((row, f"+- {spread:.0f} %", "+- 15 %", verdict(spread <= 15)))
    return goals


if __name__ == "__main__":
    main()
