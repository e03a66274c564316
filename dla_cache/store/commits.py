"""Commit records: the only witness that a shard is there.

A record is written once, after the shard's bytes are safe on disk. It starts as a small JSON file;
consolidation gathers records into one Parquet file, so that 10⁶ shards are not 10⁶ files to list, nor
10⁶ records to parse for whoever needs one. Both are named by their content, so that a name never stands
for something else later.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from dla_cache.durable import locked_folder, no_link, read_file, sync_folder, write_durably
from dla_cache.errors import StoreError
from dla_cache.maps import map_file
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.spec import StrictModel, canonical_json
from dla_cache.store.statistics import SplitStatistics, StoredError


class Commitment(StrictModel):
    """What was committed. `seconds` and `device` tell of the attempt and lie outside identity."""

    modality: str
    """The series: a modality, or `images`."""
    shard: int
    n_rows: int
    size_bytes: int
    """Of the shard's files together."""
    file_sha256: str
    """Of the bytes of the shard's files, one after another."""
    content_sum: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the payloads under their image IDs, hexadecimal; see `dla_cache.store.content`."""
    recipe_hash: str
    seconds: float
    """From the first image read to the payloads in hand."""
    device: str


class CommitRecord(Commitment):
    """All that a record says."""

    statistics: dict[str, SplitStatistics]
    """Of the stored numbers, per split that has images in the shard; empty for `images`."""
    error: StoredError | None = None
    """What was lost when the latents were stored; None if nothing was, and for `images`."""


Records = Mapping[int, CommitRecord]
"""Records by shard index; whoever looks one up may be the first to parse it."""

SCHEMA = pa.schema(
    [
        ("modality", pa.string()),
        ("shard", pa.int64()),
        ("n_rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("file_sha256", pa.string()),
        ("content_sum", pa.string()),
        ("recipe_hash", pa.string()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        # The other fields, as JSON: few need them, and they are ten times as large.
        ("measured", pa.string()),
    ]
)
"""The columns of a file of many records."""

COMMITTED = tuple(Commitment.model_fields)


def table_of(records: Iterable[CommitRecord]) -> pa.Table:
    """Records as columns."""
    rows = []
    for record in records:
        fields = record.model_dump(mode="json")
        rows.append({name: fields.pop(name) for name in COMMITTED} | {"measured": canonical_json(fields)})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class RecordFile(Mapping[int, CommitRecord]):
    """The records of one consolidated file. What was measured is read when the first record is asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: if it is not the file that was written.
        """
        self._path = path
        self._content = map_file(path)  # a map outlives its file, which the next consolidation deletes
        if path.stem.rpartition("-")[2] != _digest(self._content):
            raise ValueError("it is not the file that was written")
        self._commitments = from_parquet(self._content, COMMITTED)
        self._places = {shard: place for place, shard in enumerate(self._commitments["shard"].to_pylist())}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __contains__(self, shard: object) -> bool:
        return shard in self._places

    def __getitem__(self, shard: int) -> CommitRecord:
        place = self._places[shard]
        measured = json.loads(self._measured[place].as_py())
        with _told_as_damage(self._path):
            return CommitRecord.model_validate_json(canonical_json(self._fields(place) | measured))

    def commitment(self, shard: int) -> Commitment:
        with _told_as_damage(self._path):
            return Commitment.model_validate(self._fields(self._places[shard]))

    def table(self) -> pa.Table:
        return self._commitments.append_column("measured", self._measured).cast(SCHEMA)

    def _fields(self, place: int) -> dict[str, Any]:
        fields: dict[str, Any] = self._commitments.slice(place, 1).to_pylist()[0]
        return fields

    @cached_property
    def _measured(self) -> pa.ChunkedArray:
        with _told_as_damage(self._path):
            return from_parquet(self._content, ["measured"])["measured"]


class Union(Mapping[int, CommitRecord]):
    """The records of several files."""

    def __init__(self, parts: Iterable[Records]) -> None:
        self._part_of = {shard: part for part in parts for shard in part}

    def __len__(self) -> int:
        return len(self._part_of)

    def __iter__(self) -> Iterator[int]:
        return iter(self._part_of)

    def __contains__(self, shard: object) -> bool:
        return shard in self._part_of

    def __getitem__(self, shard: int) -> CommitRecord:
        return self._part_of[shard][shard]


class CommitLog:
    """The records of one series; `folder` holds nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No file of a log ever changes, so one that was read need not be read again.
        self._known: dict[str, Records] = {}

    def read(self) -> Records:
        """Every committed shard's record, by shard index: the union of all files.

        Raises:
            StoreError: if a file of the log is damaged.
        """
        return Union(self._snapshot().values())

    def find(self, shard: int, *, anew: bool = False) -> Commitment | None:
        """What was committed of one shard.

        Args:
            anew: looks on disk in any case, not only for a shard that it has not seen yet.
        """
        known = None if anew else _commitment(self._known.values(), shard)
        return known or _commitment(self._snapshot().values(), shard)

    def commit_once(self, shard: int, write: Callable[[], CommitRecord]) -> bool:
        """Runs `write` and commits the record it returns; False if the shard is committed already.

        Of several processes at one shard, one writes at a time and the first to commit wins; the
        lock is the kernel's, so a killed process leaves none.
        """
        claim = self.folder / f".{shard}.json.tmp"
        with _locked_file(claim) as file:
            if shard in self.read():
                claim.unlink()
                return False
            try:
                content = write().model_dump_json().encode()
                file.truncate(0)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                claim.rename(self.folder / f"{shard}-{_digest(content)}.json")
            except OSError:
                with suppress(OSError):
                    claim.unlink()
                raise
            sync_folder(self.folder)
        return True

    def consolidate(self, *, loose: bool = False) -> None:
        """Merges all records into one file and deletes exactly those files that it read.

        Args:
            loose: only records that lie about as single files: what a long build does now and then.

        One process consolidates at a time. Writers and readers need not wait for it: a record is
        at any moment in at least one file.
        """
        with locked_folder(self.folder):
            parts = self._snapshot()
            if loose:
                parts = {name: part for name, part in parts.items() if name.endswith(".json")}
            if len(parts) > 1:
                self._merge(parts, {})

    def withdraw(self, records: Records) -> None:
        """Takes these records out of the log, by shard index; one that was replaced meanwhile stays.

        What is not withdrawn is at any moment in at least one file, whenever the process dies. What
        is withdrawn may then still be there: doing it again finishes it.
        """
        with locked_folder(self.folder):
            self._merge(self._snapshot(), records)
            sync_folder(self.folder)

    def _merge(self, parts: Mapping[str, Records], without: Records) -> None:
        """Writes the union of `parts` but those records into one file, then deletes the files it was read from."""
        for leftover in self.folder.glob(".consolidated-*.tmp"):
            leftover.unlink()
        table = pa.concat_tables(
            [SCHEMA.empty_table()]
            + [part.table() if isinstance(part, RecordFile) else table_of(part.values()) for part in parts.values()]
        )
        shards, places = np.unique(np.array(table["shard"].to_pylist(), np.int64), return_index=True)
        records = Union(parts.values())
        kept = [shard not in without or records[shard] != without[shard] for shard in shards.tolist()]
        merged = None
        if any(kept):
            content = to_parquet(table.take(pa.array(places[kept])).combine_chunks())
            merged = f"consolidated-{_digest(content)}.parquet"
            write_durably(self.folder / merged, content)
        for name in parts.keys() - {merged}:
            (self.folder / name).unlink()

    def loose_files(self) -> int:
        """Number of records that await consolidation."""
        return sum(name.endswith(".json") for name in self._names())

    def _names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("."))
        except OSError as error:
            raise StoreError(
                f"the commit records in `{self.folder}` cannot be listed: {error.strerror}",
                hint="restore them from a copy; without them `dla cache build` computes all again",
            ) from error

    def _snapshot(self) -> dict[str, Records]:
        # A consolidation may move records while the folder is listed. It brings its merged file
        # before it deletes, so a listing is whole if the merged files are the same after it. A lock
        # would do as well, but a reader of a read-only store could not take it.
        while True:
            names = self._names()
            try:
                parts = {name: self._known.get(name) or self._read_file(name) for name in names}
            except FileNotFoundError:
                continue
            if _merged(names) == _merged(self._names()):
                self._known = parts
                return parts

    def _read_file(self, name: str) -> Records:
        path = self.folder / name
        with _told_as_damage(path):
            if not name.endswith(".json"):
                return RecordFile(path)
            content = read_file(path)
            if path.stem.rpartition("-")[2] != _digest(content):
                raise ValueError("it is not the file that was written")
            record = CommitRecord.model_validate_json(content)
        return {record.shard: record}


def _commitment(parts: Iterable[Records], shard: int) -> Commitment | None:
    for part in parts:
        if shard in part:
            return part.commitment(shard) if isinstance(part, RecordFile) else part[shard]
    return None


@contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises into one error; a missing file remains one."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise StoreError(
            f"commit record `{path}` is damaged: {error}",
            hint="restore it from a copy, or remove it and run `dla cache build`: it computes those shards again",
        ) from error


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _merged(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".parquet")]


@contextmanager
def _locked_file(path: Path) -> Iterator[IO[bytes]]:
    """The file at `path`, made if absent, under an exclusive lock; waits for whoever holds it.

    Whoever held it may have renamed or deleted the file, and a lock on a file without a name
    excludes nobody: then it starts again.
    """
    while True:
        with open(path, "ab", opener=no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_current = False
            if is_current:
                yield file
                return
