"""Every bad store at every door, in a process of its own with little memory and little time.

`python -m tests.torture.bad_input FOLDER FIRST EVERY SECONDS` tries the cases from number FIRST on, one in EVERY, each
for so many seconds, and prints a line of JSON before and after each: whoever started it knows which one has ended it.
"""

import errno
import faulthandler
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dla_cache.build import build_cache
from dla_cache.describe import describe_store
from dla_cache.errors import DlaError
from dla_cache.housekeeping import describe_entry, prune_store, remove_store
from dla_cache.manifest import read_manifest
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store
from tests.torture.bad_stores import FOREIGN, HALF, BadStore
from tests.torture.flips import stream_pairs
from tests.torture.forged_stores import LINKS, TERABYTES
from tests.torture.kills import ROOT
from tests.torture.outcome import NOTICED, OTHER, SILENT, UNCHANGED, UNNAMED, Outcome
from tests.torture.stores import SmallSource, make_spec, make_stores, read_all

MEMORY_BYTES = 2**31
"""That a case may take beyond what the interpreter and its libraries have taken."""
SECONDS = 8
"""That a case may take; most take a tenth of one."""

Case = tuple[str, str, Callable[[], str | None]]
"""Kind, name, and what tells what is wrong: None where nothing is, an error of ours where it was noticed."""


class Hang(BaseException):
    """A case has taken too long."""


def judge(case: Callable[[], str | None], name: str, seconds: float) -> Outcome:
    """Runs a case; its outcome."""
    # Again and again: a thread that waits keeps the end of a stream waiting, too.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        fault = case()
    except DlaError as error:
        return Outcome(NOTICED if error.hint else UNNAMED, f"{name}: {type(error).__name__}: {error}")
    except Hang:
        return Outcome(OTHER, f"{name}: no answer for {seconds} s")
    except Exception as error:  # whatever it is, it is a finding
        return Outcome(OTHER, f"{name}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return Outcome(SILENT, f"{name}: {fault}") if fault else Outcome(UNCHANGED, name)


class Doors:
    """What may be done with a store, each on a fresh copy of a good one; the truth is known."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.good = folder / f"{layout}-loose"
        self.layout = layout
        self.scratch = folder / "scratch"
        self.pairs = dict(stream_pairs(self.good))
        self.content_hash = open_store(self.good).content_hash()
        self.manifest = read_manifest(folder / "data" / "manifest.parquet")
        without = folder / f"{layout}-without"
        if not without.exists():
            shutil.copytree(self.good, without)
            take_down([without], ["image-2"])
        self.hash_without = open_store(without).content_hash()

    def fresh(self) -> tuple[Path, Path]:
        """A copy of the good store, and an empty folder beside it."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.good, self.scratch / "store")
        (self.scratch / "outside").mkdir()
        return self.scratch / "store", self.scratch / "outside"

    def open(self, store: Path) -> str | None:
        open_store(store)
        return None

    def read(self, store: Path) -> str | None:
        return None if dict(stream_pairs(store)) == self.pairs else "other values were read"

    def verify(self, store: Path) -> str | None:
        problems = verify_store(open_store(store)).problems
        if problems:
            raise DlaError(f"{len(problems)} problems: {problems[0].where}: {problems[0].what}", hint="see verify")
        return None

    def build(self, store: Path) -> str | None:
        return self._built(store, repair=False)

    def repair(self, store: Path) -> str | None:
        return self._built(store, repair=True)

    def _built(self, store: Path, *, repair: bool) -> str | None:
        spec = make_spec(self.layout)
        report = build_cache(self.manifest, spec, store, open_source=SmallSource, repair=repair)
        if report.content_hash != self.content_hash:
            return "a build ended well with another content hash"
        return None if not repair else self._whole(store)

    def _whole(self, store: Path) -> str | None:
        problems = verify_store(open_store(store)).problems
        # A removal that was begun is no work of a repair, and verify says what to do.
        others = [problem for problem in problems if problem.where != "takedown.json"]
        return f"it ended well, and verify says {others[0]}" if others else None

    def convert(self, store: Path) -> str | None:
        other = "webdataset" if self.layout == "zarr" else "zarr"
        report = convert_store(open_store(store), self.scratch / "converted", other)
        return None if report.content_hash == self.content_hash else "a conversion with another content hash"

    def takedown(self, store: Path) -> str | None:
        (report,) = take_down([store], ["image-2"])
        # None says in plain words that shards are missing.
        is_right = report.content_hash in (self.hash_without, None)
        return None if is_right else "a removal that ended with another content hash"

    def status(self, store: Path) -> str | None:
        describe_store(open_store(store))
        return None

    def ls(self, store: Path) -> str | None:
        entry = describe_entry(store)
        if entry.fault:
            raise DlaError(entry.fault, hint="it is listed as damaged")
        return None

    def prune(self, store: Path) -> str | None:
        before = committed_files(store)
        prune_store(open_store(store))
        return None if committed_files(store) == before else "committed shards were pruned"

    def rm(self, store: Path) -> str | None:
        remove_store(store)
        return None


DOORS = ("open", "read", "verify", "status", "ls", "build", "repair", "convert", "takedown", "prune", "rm")
CHANGE_NOTHING = ("open", "read", "verify", "status", "ls", "convert")


def committed_files(path: Path) -> dict[str, bytes]:
    store = open_store(path)
    files = [
        file
        for series in store.series
        for shard in store.committed(series)
        for file in store.shard_files(series, shard)
    ]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def try_door(doors: Doors, bad: BadStore, door: str) -> str | None:
    """One bad store at one door."""
    store, outside = doors.fresh()
    bad.spoil(store, outside)
    before, inside = read_all(outside), snapshot(store)
    try:
        fault: str | None = getattr(doors, door)(store)
    finally:
        if read_all(outside) != before:
            raise AssertionError("files outside of the store were changed")
        if (door in CHANGE_NOTHING or bad.kind == "foreign") and snapshot(store) != inside:
            raise AssertionError("the store was changed")
    if fault is None and bad.must_be_refused:
        return "it was not refused"
    if fault is None and door == "verify" and not bad.is_harmless:
        return "verify found nothing"
    return fault


def snapshot(store: Path) -> dict[str, bytes]:
    return read_all(store) if store.is_dir() else {"": store.read_bytes()}


def bad_cases(folder: Path) -> Iterator[Case]:
    for layout in ("zarr", "webdataset"):
        doors = Doors(folder, layout)
        for bad in (*FOREIGN, *HALF, *LINKS, *TERABYTES):
            if layout in bad.layouts:
                for door in DOORS:
                    name = f"{bad.kind}: {bad.name}, {layout}, {door}"
                    yield bad.kind, name, lambda bad=bad, door=door, doors=doors: try_door(doors, bad, door)
        yield from gone_cases(doors)
        for door in DOORS:
            name = f"no locks: {layout}, {door}"
            yield "no locks", name, lambda door=door, doors=doors: without_locks(doors, door)


def gone_cases(doors: Doors) -> Iterator[Case]:
    """A store that is deleted while somebody has it open."""
    steps: dict[str, Callable[[LatentStore], object]] = {
        "read": lambda store: store.read("depth", store.rows_of()).tobytes(),
        "read images": lambda store: store.read_images(store.rows_of()),
        "statistics": lambda store: store.statistics("depth", ["train"]),
        "content hash": lambda store: store.content_hash(),
        "verify": lambda store: verify_store(store).problems,
        "convert": lambda store: convert_store(store, doors.scratch / "new", "zarr").content_hash,
        "prune": prune_store,
        "consolidate": lambda store: store.consolidate("depth"),
    }
    for step, act in steps.items():
        for is_warm in (False, True):
            name = f"deleted: {doors.layout}, {step}{', a second time' if is_warm else ''}"
            yield "deleted", name, lambda act=act, is_warm=is_warm: _delete_while_open(doors, act, is_warm)
    yield "deleted", f"deleted: {doors.layout}, stream", lambda: _delete_while_streamed(doors)
    yield "deleted", f"deleted: {doors.layout}, a shard cut in place", lambda: _cut_while_open(doors)


def _delete_while_open(doors: Doors, act: Callable[[LatentStore], object], is_warm: bool) -> str | None:
    path, _ = doors.fresh()
    store = open_store(path)
    before = act(store)
    if not is_warm:
        store = open_store(path)
    shutil.rmtree(path)
    shutil.rmtree(doors.scratch / "new", ignore_errors=True)
    return None if act(store) == before else "it ended well with another result"


def _delete_while_streamed(doors: Doors) -> str | None:
    path, _ = doors.fresh()
    pairs = stream_pairs(path)
    read = dict([next(pairs)])
    shutil.rmtree(path)
    read.update(pairs)
    return None if read == doors.pairs else "other values were read"


def _cut_while_open(doors: Doors) -> str | None:
    path, _ = doors.fresh()
    store = open_store(path)
    before = store.read("depth", store.rows_of()).tobytes()
    os.truncate(store.shard_path("depth", 1), 0)
    return None if store.read("depth", store.rows_of()).tobytes() == before else "other values were read"


def without_locks(doors: Doors, door: str) -> str | None:
    """A file system that has no `flock`, as some network ones."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    store, _ = doors.fresh()
    if door in ("build", "repair"):
        shutil.rmtree(store)
    kept, fcntl.flock = fcntl.flock, refuse
    try:
        return getattr(doors, door)(store)
    finally:
        fcntl.flock = kept


def limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))


def on_alarm(*_: object) -> None:
    raise Hang


def main() -> None:
    folder, first, every, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    signal.signal(signal.SIGALRM, on_alarm)
    cases = list(bad_cases(folder))
    limit_memory()
    for number in range(first, len(cases)):
        if number % every:
            continue
        kind, name, case = cases[number]
        print(json.dumps([number, kind, name]), flush=True)
        outcome = judge(case, name, seconds)
        print(json.dumps([number, kind, outcome.verdict, outcome.said]), flush=True)
    os._exit(0)  # a thread that hangs must not keep the process


def try_bad_input(folder: Path, every: int = 1, seconds: float = SECONDS) -> Iterator[tuple[str, Outcome]]:
    """The outcomes of all cases by kind; a case that ends or stops its process is an outcome, too."""
    if not (folder / "zarr-loose").exists():
        make_stores(folder)
    first: int | None = 0
    while first is not None:
        first = yield from _try_from(folder, first, every, seconds)


def _try_from(folder: Path, first: int, every: int, seconds: float) -> Iterator[tuple[str, Outcome]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.torture.bad_input", *map(str, (folder, first, every, seconds))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    begun: list[Any] | None = None
    for line in process.stdout:
        number, kind, *rest = json.loads(line)
        begun = [number, kind, *rest] if len(rest) == 1 else None
        if len(rest) == 2:
            yield kind, Outcome(*rest)
    _, said = process.communicate()
    if begun is None:
        assert process.returncode == 0, said
        return None
    number, kind, name = begun
    yield kind, Outcome(OTHER, f"{name}: the process ended with {process.returncode}: {said[-300:]}")
    return number + 1


if __name__ == "__main__":
    main()
