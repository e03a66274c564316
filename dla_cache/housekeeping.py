"""Which stores there are, what their bytes are for, and what may go."""

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dla_cache.card import is_card
from dla_cache.durable import is_temporary, read_file, writing_to
from dla_cache.errors import DlaError, StoreError, name_some
from dla_cache.store import LatentStore, open_store
from dla_cache.store.claims import CLAIMS
from dla_cache.store.layout import Layout, commits_folder
from dla_cache.store.metadata import find_layout
from dla_cache.store.mirror import refuse_lost_url
from dla_cache.store.parts import ADOPTED, CARD, QUARANTINE, STAGING, UNFINISHED, refuse_links
from dla_cache.store.row_files import is_of_rows, row_files


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """One store of a listing."""

    path: str
    layout: str
    modalities: tuple[str, ...]
    has_images: bool
    images: int
    is_complete: bool
    size_bytes: int
    content_hash: str | None
    """None while shards are missing, or the store cannot be read."""
    fault: str | None
    """Why it cannot be read; then nothing but path, layout and size is known."""


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """What the bytes of a store are for."""

    series: dict[str, int]
    """Committed shards of each modality, and of `images`."""
    records: int
    rest: int
    """Row table, metadata, card."""
    leftovers: int
    """What `prune` would remove."""

    @property
    def total(self) -> int:
        return sum(self.series.values()) + self.records + self.rest + self.leftovers


@dataclass(frozen=True, slots=True)
class Removed:
    """Files that are gone, or would go."""

    files: tuple[str, ...]
    """Paths from the store's folder."""
    size_bytes: int


def find_stores(folders: Sequence[Path]) -> list[Path]:
    """The stores at or below some folders, sorted; links to folders are not followed.

    Raises:
        StoreError: if there is no such folder.
    """
    found: set[Path] = set()
    for folder in folders:
        refuse_lost_url(folder)
        if not folder.is_dir():
            raise StoreError(f"`{folder}` is no folder", hint="check the path")
        for place, below, files in os.walk(folder):
            if {"zarr.json", "dla.json"} & set(files) and _is_store(Path(place)):
                found.add(Path(place))
                below.clear()  # a store holds no other
    return sorted(found)


def _is_store(path: Path) -> bool:
    """Whether a folder is a store of ours, be it damaged: other people's Zarr groups have no row table."""
    return any((path / "rows").glob("index-*.parquet")) or (path / "dla.json").is_file()


def _says_it_is_ours(path: Path, layout: Layout) -> bool:
    try:
        return "shard_size" in layout.read_attributes(path)
    except (OSError, ValueError, LookupError, TypeError):  # anybody's Zarr has a `zarr.json`
        return False


def describe_entry(path: Path) -> StoreEntry:
    """What a listing says of a store; one that cannot be read is listed with the reason."""
    size_bytes = sum(_files_below(path).values())
    try:
        store = open_store(path)
        is_complete = not any(store.missing(series) for series in store.series)
        return StoreEntry(
            path=str(path),
            layout=store.metadata.layout.name,
            modalities=store.modalities,
            has_images=store.has_images,
            images=len(store.rows_of()),
            is_complete=is_complete,
            size_bytes=size_bytes,
            content_hash=store.content_hash() if is_complete else None,
            fault=None,
        )
    except DlaError as error:
        return StoreEntry(str(path), "", (), False, 0, False, size_bytes, None, error.message)


def measure_usage(store: LatentStore) -> DiskUsage:
    """What the bytes of a store are for; sizes of files, not of the blocks they take."""
    store.require_folder()
    sizes = _files_below(store.path)
    leftovers = set(find_leftovers(store))
    series: Counter[str] = Counter(dict.fromkeys(store.series, 0))
    for name in store.series:
        for shard in store.committed(name):
            series[name] += sum(sizes.get(path, 0) for path in store.shard_files(name, shard))
    records = sum(
        size for path, size in sizes.items() if path.parent.parent.name == "commits" and path not in leftovers
    )
    lost = sum(sizes[path] for path in leftovers)
    return DiskUsage(dict(series), records, sum(sizes.values()) - series.total() - records - lost, lost)


def find_leftovers(store: LatentStore) -> list[Path]:
    """Temporary files of killed processes, and shards' files that no record vouches for; sorted.

    Not what a removal of images has still to write back.
    """
    logs = {commits_folder(store.path, series) for series in store.series}
    planned = _planned_files(store)
    committed = {
        path
        for series in store.series
        for shard in store.committed(series)
        for path in store.shard_files(series, shard)
    }
    rows = {store.path / name for name in row_files(store.rows, store.metadata.rows_sha256)}
    others = (*store.metadata.files(""), ADOPTED, CARD, QUARANTINE, UNFINISHED)
    named = planned | rows | {store.path / name for name in others}

    def is_leftover(path: Path) -> bool:
        if is_temporary(path):
            final = path.with_name(path.name[1:].removesuffix(".tmp"))
            return path.parent in logs or final in named or is_of_rows(store.path, final)
        return (path in planned and path not in committed) or (is_of_rows(store.path, path) and path not in rows)

    return sorted(path for path in _files_below(store.path) if is_leftover(path))


def _planned_files(store: LatentStore) -> set[Path]:
    """The files of all shards, committed or not."""
    return {
        path for series in store.series for shard in store.shards for path in store.shard_files(series, shard.index)
    }


def prune_store(store: LatentStore, *, dry_run: bool = False) -> Removed:
    """Removes what `find_leftovers` finds.

    Raises:
        StoreError: if another process is writing to the store, the disk refuses, or a series has shards and not one
            record: its records are lost, and the shards may be all there is.
    """
    store.require_folder()
    files = find_leftovers(store)
    for series in store.series:
        shards = {store.shard_files(series, shard.index)[0] for shard in store.shards} & set(files)
        if len(shards) > 1 and not store.committed(series):
            raise StoreError(
                f"`{store.path}` has {len(shards)} shards of `{series}` and not one record of them",
                hint="restore its folder in `commits` from a copy; if nothing is worth keeping, `dla cache rm` it",
            )
    sizes = {path: path.lstat().st_size for path in files}
    if not dry_run:
        refuse_links(store.path)
        with writing_to(store.path), _nobody_writes(store, files):
            for path in set(files) & set(find_leftovers(store)):  # a shard may have been committed meanwhile
                path.unlink(missing_ok=True)
    return Removed(tuple(path.relative_to(store.path).as_posix() for path in files), sum(sizes.values()))


@contextmanager
def _nobody_writes(store: LatentStore, files: Collection[Path]) -> Iterator[None]:
    """Holds the claims of those uncommitted shards that have one or of these files: who wants to write one waits.

    Raises:
        StoreError: if one is held already.
    """
    held: list[tuple[Path, int]] = []
    try:
        for series in store.series:
            for shard in store.missing(series):
                path = commits_folder(store.path, series) / f".{shard}.json.tmp"
                if not (path.exists() or set(files) & set(store.shard_files(series, shard))):
                    continue
                held.append((path, os.open(path, os.O_RDWR | os.O_CREAT, 0o644)))
                try:
                    fcntl.flock(held[-1][1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    os.close(held.pop()[1])  # it is the other's, so it stays
                    raise StoreError(
                        f"another process is writing to `{store.path}`: {series}, shard {shard}",
                        hint="wait until it has ended, or stop it",
                    ) from error
        yield
    finally:
        for path, claim in held:
            path.unlink(missing_ok=True)
            os.close(claim)


def remove_store(path: Path, *, dry_run: bool = False) -> Removed:
    """Removes a store with all it holds. A killed removal leaves a store without records; the next one finishes.

    Raises:
        StoreError: if the folder is no store, a link, or holds what is no part of a store; then nothing is removed.
    """
    refuse_lost_url(path)
    if path.is_symlink():
        raise StoreError(f"`{path}` is a link", hint="name the folder itself")
    path = path.resolve()  # `.` has no name by which it could be removed
    layout = find_layout(path)
    if layout is None or not _says_it_is_ours(path, layout):
        raise StoreError(f"`{path}` is no store", hint="nothing is removed; `dla cache ls FOLDER` lists stores")
    strangers = [file.relative_to(path).as_posix() for file in sorted(_strangers(path, layout))]
    if strangers:
        raise StoreError(
            f"`{path}` holds what is no part of a store: {name_some(strangers)}",
            hint="move it elsewhere; nothing is removed",
        )
    sizes = _files_below(path)
    if not dry_run:
        with writing_to(path):
            # Records first, so that nobody believes in what is half gone. Then shards, while metadata still tell which
            # files they are; the main file last: by it a store is known.
            for folder in (path / "commits", path / STAGING):
                if folder.is_dir():
                    shutil.rmtree(folder)
            last = {"zarr.json": 1, path / "rows": 2, path / layout.main_file: 3}
            left = _files_below(path)
            for file in sorted(left, key=lambda one: (last.get(one, last.get(one.parent, last.get(one.name, 0))), one)):
                file.unlink()
            for folder in sorted(path.rglob("*"), reverse=True):
                folder.rmdir()
            path.rmdir()
    return Removed(tuple(file.relative_to(path).as_posix() for file in sorted(sizes)), sum(sizes.values()))


def _strangers(path: Path, layout: Layout) -> list[Path]:
    """The files in a store's folder that no store has put there."""
    files = _files_below(path)
    top = {layout.main_file, ADOPTED, CARD, QUARANTINE, UNFINISHED}
    ours = {path / name for name in top}
    ours |= {file for file in files if is_of_rows(path, file)}
    folders = {path / "commits", path / CLAIMS, path / STAGING}
    try:
        store = open_store(path)
        ours |= _planned_files(store) | {path / name for name in store.metadata.files("")}
    except StoreError:  # half removed, or damaged: then a file in a folder of ours is not known to be a shard
        ours |= {file for file in files if file.name == "zarr.json"}

    def is_ours(file: Path) -> bool:
        if file.name == CARD and file.parent == path:
            return has_card(file)
        if file.is_symlink():
            return False
        return file in ours or is_temporary(file) or bool(folders & set(file.parents))

    return [file for file in files if not is_ours(file)]


def has_card(path: Path) -> bool:
    """Whether a README is one that a store has written of itself, be it damaged."""
    return path.is_file() and is_card(read_file(path))


def _files_below(folder: Path) -> dict[Path, int]:
    """The files and links in a folder and those below, with their own sizes in bytes; links are not followed."""
    found = {}
    for place, below, files in os.walk(folder):
        links = [name for name in below if (Path(place) / name).is_symlink()]
        for name in (*files, *links):
            path = Path(place) / name
            try:
                found[path] = path.lstat().st_size
            except FileNotFoundError:
                continue  # a process that writes has renamed its temporary file meanwhile
    return found
