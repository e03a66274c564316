"""Two builders of one store, and a disk that is full: real `dla` commands on real file systems."""

import gc
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dla_cache.manifest import Manifest
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests.torture.kills import committed, n_entries, start_dla
from tests.torture.outcome import NOTICED, OTHER, SILENT, UNCHANGED, UNNAMED, Outcome
from tests.torture.stores import build, make_manifest, make_spec

LIMIT_SECONDS = 120
N_IMAGES = 24
SHARD_SIZE = 1
FULL_KILOBYTES = (60, 120, 180, 240)
"""Sizes of the disks that are too small for the store."""


def _command(folder: Path, manifest: Manifest, store: Path, layout: str, seed: int) -> list[object]:
    spec = folder / f"{layout}-{seed}.yaml"
    spec.write_text(make_spec(layout, seed=seed, shard_size=SHARD_SIZE).model_dump_json())
    return ["cache", "build", spec, "--manifest", manifest.root / "manifest.parquet", "--out", store, "--json"]


def ended(process: subprocess.Popen[str]) -> tuple[int | str, str, str]:
    """Exit code or `hang`, stdout and stderr."""
    try:
        out, said = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hang", *process.communicate()
    return process.returncode, out, said


def refused(code: int | str, said: str) -> str | None:
    """The verdict on a command that had to fail; None if it did not."""
    if code == 0:
        return None
    if code != 1 or "Traceback" in said or "error: " not in said:
        return OTHER
    return NOTICED if "hint: " in said else UNNAMED


def two_builders(
    folder: Path, layout: str, rounds: int, pairs: Sequence[tuple[int, int]] = ((0, 1), (0, 0))
) -> Iterator[tuple[str, Outcome]]:
    """Two builds of one new store at once: of different specs one is refused, of the same both share.

    Args:
        pairs: seeds of the two specs.
    """
    folder.mkdir()
    manifest = make_manifest(folder / "data", N_IMAGES)
    hashes = {}
    for seed in (0, 1):
        alone = build(manifest, folder / f"alone-{seed}", layout, seed=seed, shard_size=SHARD_SIZE)
        hashes[seed] = open_store(alone).content_hash()
    for number in range(rounds):
        for seeds in pairs:
            kind = "two builders, one spec" if seeds[0] == seeds[1] else "two builders, two specs"
            store = folder / f"{number}-{seeds}"
            processes = [start_dla(*_command(folder, manifest, store, layout, seed)) for seed in seeds]
            ends = [ended(process) for process in processes]
            judge = _judge_shared if seeds == (0, 0) else _judge_rivals
            verdict, said = judge(store, hashes, ends)
            yield kind, Outcome(verdict, f"{kind}, {layout}, round {number}: {said}")


def _judge_shared(store: Path, hashes: dict[int, str], ends: list[tuple[int | str, str, str]]) -> tuple[str, str]:
    if any(code != 0 for code, _, _ in ends):
        return OTHER, str(ends)
    reports = [json.loads(out) for _, out, _ in ends]
    shards = [report["shards_committed"] for report in reports]
    fault = _fault_of(store, hashes[0]) or (
        f"{shards} shards were committed of {len(committed(store))}" if sum(shards) != len(committed(store)) else ""
    )
    if fault or {report["content_hash"] for report in reports} != {hashes[0]}:
        return SILENT, fault or str(reports)
    return UNCHANGED, f"{shards} shards"


def _judge_rivals(store: Path, hashes: dict[int, str], ends: list[tuple[int | str, str, str]]) -> tuple[str, str]:
    winners = [seed for seed, (code, _, _) in enumerate(ends) if code == 0]
    if len(winners) != 1:
        return (SILENT if winners else OTHER), str(ends)
    code, _, said = ends[1 - winners[0]]
    fault = _fault_of(store, hashes[winners[0]])
    return (SILENT, fault) if fault else (refused(code, said) or SILENT, said)


def _fault_of(store: Path, content_hash: str) -> str:
    """What is wrong with a finished store, "" if nothing."""
    opened = open_store(store)
    problems = verify_store(opened).problems
    twice = [unit for unit, count in n_entries(store).items() if count > 1]
    if opened.content_hash() != content_hash:
        return "another content hash than that of a build alone"
    return f"{problems} {twice}" if problems or twice else ""


class NoMount(Exception):
    """A file system cannot be mounted here."""


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A new file system of so many kilobytes.

    Raises:
        NoMount: if the system does not let us.
    """
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        raise NoMount(f"{done.stderr.strip()}: mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def full_disk(
    folder: Path, layout: str, sizes: Sequence[int] = FULL_KILOBYTES, *, short: bool = False
) -> Iterator[tuple[str, Outcome]]:
    """Each command that writes, on a disk that is too small for it; then the disk is enlarged and it goes on.

    Args:
        short: builds alone.

    Raises:
        NoMount: if the system does not let us mount one.
    """
    folder.mkdir()
    manifest = make_manifest(folder / "data", N_IMAGES)
    whole = build(manifest, folder / "whole", layout, shard_size=SHARD_SIZE)
    content_hash = open_store(whole).content_hash()
    for kilobytes in sizes:
        with small_disk(folder / f"disk-{kilobytes}", kilobytes) as disk:
            store = disk / "store"
            works = {
                "build": _command(folder, manifest, store, layout, 0),
                "convert": ["cache", "convert", whole, store, "--layout", layout],
            }
            for name, command in list(works.items())[: 1 if short else None]:
                verdict, said = _fill(disk, store, kilobytes, command, content_hash)
                yield "full disk", Outcome(verdict, f"full disk, {layout}, {name}, {kilobytes} kB: {said}")
                shutil.rmtree(store, ignore_errors=True)
                gc.collect()  # maps of its files, in stores that nobody needs any more, still fill the disk
                subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
    if not short:
        yield "full disk", _takedown_on_full_disk(folder, whole, layout)


def _fill(disk: Path, store: Path, kilobytes: int, command: list[object], content_hash: str) -> tuple[str, str]:
    code, _, said = ended(start_dla(*command))
    verdict = refused(code, said)
    if verdict is None:
        return OTHER, f"{kilobytes} kB were enough: make the disk smaller"
    before = committed(store)
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    code, _, again = ended(start_dla(*command))
    if code != 0:
        return OTHER, f"it did not go on after the disk was enlarged: {again}"
    lost = [unit for unit, record in before.items() if committed(store).get(unit) != record]
    fault = f"lost {lost[:3]}" if lost else _fault_of(store, content_hash)
    return (SILENT, fault) if fault else (verdict, f"{len(before)} shards stayed. {said}")


def _takedown_on_full_disk(folder: Path, whole: Path, layout: str) -> Outcome:
    """A removal with no room for its copies; with room again it goes on."""
    name = f"full disk, {layout}, takedown"
    alone = shutil.copytree(whole, folder / "taken-down")
    command = ["cache", "takedown", alone, "--ids", "image-3"]
    assert ended(start_dla(*command))[0] == 0
    with small_disk(folder / "disk-takedown", 8192) as disk:
        store = shutil.copytree(whole, disk / "store")
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        code, _, said = ended(start_dla(*command[:2], store, *command[3:]))
        ballast.unlink()
        again, _, more = ended(start_dla(*command[:2], store, *command[3:]))
        if again != 0:
            return Outcome(OTHER, f"{name}: it did not go on when there was room: {more}")
        fault = _fault_of(store, open_store(alone).content_hash())
        return Outcome(SILENT if fault else refused(code, said) or SILENT, f"{name}: {fault or said}")
