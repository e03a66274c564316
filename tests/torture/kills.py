"""SIGKILL to a `dla` command that writes, again and again, each between its first and its last commit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet

from dla_cache.errors import DlaError
from dla_cache.manifest import Manifest
from dla_cache.store import open_store
from dla_cache.store.commits import CommitRecord
from dla_cache.verify import verify_store
from tests.torture.outcome import NOTICED, SILENT, Outcome
from tests.torture.stores import make_manifest, make_spec

ROOT = Path(__file__).parents[2]
N_IMAGES = 32
SHARD_SIZE = 2
KILLS_A_STORE = 5
LIMIT_SECONDS = 120
DOOMED = ("image-3", "image-17", "image-18", "image-30")

Unit = tuple[str, int]


def start_dla(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return start("cli.main", *arguments)


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    """A module of this project in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True, slots=True)
class Work:
    """A command that fills or changes one store."""

    name: str
    command: Callable[[Path], list[object]]
    """Its arguments for a store at this path."""
    module: str = "cli.main"
    begin: Callable[[Path], object] = lambda _store: None
    """What must lie there first."""
    unfinished: str | None = None
    """A file that lies in the store from the first step to the last; None where commit records tell."""


class Damned:
    """One store, what an unbroken run makes of it, and what was found."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work = work
        self.folder = folder
        self.number = 0
        unbroken = self.new_store()
        process = start(work.module, *work.command(unbroken))
        wait_for_steps(work, unbroken, 1, process)
        started = time.monotonic()
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, said
        self.seconds = time.monotonic() - started
        """From its first commit to its end."""
        self.content_hash = open_store(unbroken).content_hash()
        self.planned = len(committed(unbroken))

    def new_store(self) -> Path:
        path = self.folder / f"{self.work.name.replace(' ', '-')}-{self.number}"
        self.number += 1
        self.work.begin(path)
        return path

    def run_to_end(self, store: Path) -> None:
        process = start(self.work.module, *self.work.command(store))
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, said


def committed(path: Path) -> dict[Unit, CommitRecord]:
    """The records of a store, of all series; none if there is no store yet."""
    try:
        store = open_store(path)
    except DlaError:
        if any(path.glob("rows/*")) and ((path / "zarr.json").exists() or (path / "dla.json").exists()):
            raise
        return {}
    return {(series, shard): record for series in store.series for shard, record in store.committed(series).items()}


def n_entries(path: Path) -> Counter[Unit]:
    """How often each shard stands in the files of the commit log, as docs/format.md says to read them."""
    found: Counter[Unit] = Counter()
    for file in (path / "commits").glob("*/[!.]*"):
        if file.suffix == ".json":
            found[file.parent.name, json.loads(file.read_bytes())["shard"]] += 1
        else:
            shards = pyarrow.parquet.ParquetFile(file).read(["shard"], use_threads=False)["shard"].to_pylist()
            found.update((file.parent.name, shard) for shard in shards)
    return found


def files_of(path: Path, units: set[Unit]) -> dict[Path, tuple[int, int]]:
    """Inode and time of the shards' files: the same as long as nobody writes them again."""
    store = open_store(path)
    files = [file for series, shard in sorted(units) for file in store.shard_files(series, shard)]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def n_names(store: Path) -> int:
    """Files in the commit log: a look at names that takes no lock and no time."""
    return sum(1 for _ in (store / "commits").glob("*/[!.]*"))


def wait_for_steps(work: Work, store: Path, n_wanted: int, process: subprocess.Popen[str]) -> None:
    """Returns once so many commits are there, or the work is under way where commits do not tell, or has ended."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if (store / work.unfinished).exists() if work.unfinished is not None else n_names(store) >= n_wanted:
            return
        time.sleep(0.001)


def kill_once(damned: Damned, store: Path, rng: random.Random) -> str | None:
    """Starts the work and kills it; what is wrong then, "" if nothing, None if the round does not count."""
    work = damned.work
    before = {} if work.unfinished else committed(store)
    files = files_of(store, set(before)) if before else {}
    # Half of what is left at most, so that a store lives for several kills.
    steps = rng.randint(1, max(1, (damned.planned - len(before)) // 2))
    pause = rng.uniform(0, damned.seconds * (0.8 if work.unfinished else 2 / damned.planned))
    process = start(work.module, *work.command(store))
    wait_for_steps(work, store, n_names(store) + steps, process)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        return f"it ended with {process.returncode}: {said}"
    if work.unfinished is not None:
        return "" if (store / work.unfinished).exists() else None
    after = committed(store)
    lost = [unit for unit, record in before.items() if after.get(unit) != record]
    if lost:
        return f"{len(lost)} committed shards lost or replaced: {lost[:3]}"
    if files != (files_of(store, set(before)) if before else {}):
        return "files of committed shards were written again"
    return "" if len(before) < len(after) < damned.planned else None


def judge_end(damned: Damned, store: Path) -> str:
    """Lets the work finish; what is wrong then, "" if nothing."""
    damned.run_to_end(store)
    opened = open_store(store)
    if opened.content_hash() != damned.content_hash:
        return "another content hash than that of an unbroken run"
    twice = [unit for unit, count in n_entries(store).items() if count > 1]
    if twice or len(n_entries(store)) != damned.planned:
        return f"shards that stand twice in the log: {twice[:3]}, planned {damned.planned}"
    problems = verify_store(opened).problems
    leftovers = [file.name for file in store.rglob(".*")]
    return f"{problems} {leftovers}" if problems or leftovers else ""


def kill_often(work: Work, folder: Path, n_kills: int, seed: int) -> list[Outcome]:
    """As many kills that count; an outcome for each, and one more for a store that is not whole after them."""
    rng = random.Random(f"{seed} {work.name}")
    damned = Damned(work, folder)
    outcomes: list[Outcome] = []
    kills = 0
    while kills < n_kills:
        store = damned.new_store()
        for _ in range(min(KILLS_A_STORE, n_kills - kills)):
            fault = kill_once(damned, store, rng)
            if fault is None:
                break
            kills += 1
            outcomes.append(Outcome(SILENT if fault else NOTICED, f"{work.name}, kill {kills}: {fault}"))
        fault = judge_end(damned, store)
        if fault:
            outcomes.append(Outcome(SILENT, f"{work.name}, after kill {kills}, {store}: {fault}"))
        else:
            shutil.rmtree(store)
    return outcomes


def make_works(folder: Path) -> dict[str, Work]:
    """Builds, conversions, imports and removals, by name."""
    manifest = make_manifest(folder / "kill-data", N_IMAGES)
    works = [build_work(folder, manifest, layout) for layout in ("zarr", "webdataset")]
    stores = {}
    for layout, work in zip(("zarr", "webdataset"), works, strict=True):
        stores[layout] = folder / f"whole-{layout}"
        process = start(work.module, *work.command(stores[layout]))
        assert process.wait(LIMIT_SECONDS) == 0, process.communicate()
    works += [_convert(stores["zarr"], "webdataset"), _convert(stores["webdataset"], "zarr")]
    works += [_import(folder, manifest, layout) for layout in ("zarr", "webdataset")]
    works += [_takedown(path, layout) for layout, path in stores.items()]
    return {work.name: work for work in works}


def build_work(folder: Path, manifest: Manifest, layout: str) -> Work:
    """`dla cache build` of two modalities and the images."""
    spec = folder / f"{layout}.yaml"
    spec.write_text(make_spec(layout, shard_size=SHARD_SIZE).model_dump_json())  # JSON is YAML
    listed = manifest.root / "manifest.parquet"
    return Work(f"build {layout}", lambda store: ["cache", "build", spec, "--manifest", listed, "--out", store])


def quick_build_work(manifest: Manifest, layout: str) -> Work:
    """The same without the command around it, which takes a second to begin."""
    listed = manifest.root / "manifest.parquet"
    return Work(f"build {layout}", lambda store: [listed, store, layout, SHARD_SIZE], module="tests.torture.stores")


def _convert(source: Path, layout: str) -> Work:
    return Work(f"convert to {layout}", lambda store: ["cache", "convert", source, store, "--layout", layout])


def _import(folder: Path, manifest: Manifest, layout: str) -> Work:
    latents = folder / "latents"
    latents.mkdir(exist_ok=True)
    for number, image_id in enumerate(manifest.image_ids):
        np.save(latents / f"{image_id}.npy", np.random.default_rng(number).normal(size=(4, 2, 2)).astype(np.float32))
    listed = manifest.root / "manifest.parquet"
    options = ["--modality", "depth", "--shard-size", 1, "--layout", layout]
    return Work(
        f"import {layout}",
        lambda store: ["cache", "import", latents, "--manifest", listed, "--out", store, *options],
    )


def _takedown(source: Path, layout: str) -> Work:
    ids = [text for image_id in DOOMED for text in ("--ids", image_id)]
    return Work(
        f"takedown {layout}",
        lambda store: ["cache", "takedown", store, *ids],
        begin=lambda store: shutil.copytree(source, store),
        unfinished="takedown.json",
    )
