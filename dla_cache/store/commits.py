"""Commit records: the only witness that a shard is there.

A record is written once, after the shard's bytes are safe on disk. It starts as a small JSON file;
consolidation gathers records into one Parquet file, so that 10⁶ shards are not 10⁶ files to list.
Both are named by their content, so that a name never stands for something else later.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated

import pyarrow as pa
from pydantic import Field

from dla_cache.durable import locked_folder, no_link, sync_folder, write_durably
from dla_cache.errors import StoreError
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.spec import StrictModel, canonical_json
from dla_cache.store.statistics import SplitStatistics


class CommitRecord(StrictModel):
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
    statistics: dict[str, SplitStatistics]
    """Per split that has images in the shard; empty for `images`."""
    seconds: float
    """From the first image read to the payloads in hand."""
    device: str


class CommitLog:
    """The records of one series; `folder` holds nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No file of a log ever changes, so one that was read need not be read again.
        self._known: dict[str, dict[int, CommitRecord]] = {}

    def read(self) -> dict[int, CommitRecord]:
        """Every committed shard's record, by shard index: the union of all files.

        Raises:
            StoreError: if a file of the log is damaged.
        """
        return {record.shard: record for part in self._snapshot().values() for record in part.values()}

    def find(self, shard: int) -> CommitRecord | None:
        """The record of one shard; looks on disk only for one that it has not seen yet."""
        for part in self._known.values():
            if shard in part:
                return part[shard]
        return self.read().get(shard)

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

    def consolidate(self) -> None:
        """Merges all records into one file and deletes exactly those files that it read.

        One process consolidates at a time. Writers and readers need not wait for it: a record is
        at any moment in at least one file.
        """
        with locked_folder(self.folder):
            parts = self._snapshot()
            if len(parts) > 1:
                self._merge(parts, {})

    def withdraw(self, records: Mapping[int, CommitRecord]) -> None:
        """Takes these records out of the log, by shard index; one that was replaced meanwhile stays.

        What is not withdrawn is at any moment in at least one file, whenever the process dies. What
        is withdrawn may then still be there: doing it again finishes it.
        """
        with locked_folder(self.folder):
            self._merge(self._snapshot(), records)
            sync_folder(self.folder)

    def _merge(self, parts: Mapping[str, Mapping[int, CommitRecord]], without: Mapping[int, CommitRecord]) -> None:
        """Writes the union of `parts` but those records into one file, then deletes the files it was read from."""
        for leftover in self.folder.glob(".consolidated-*.tmp"):
            leftover.unlink()
        records = {record.shard: record for part in parts.values() for record in part.values()}
        texts = {
            shard: canonical_json(records[shard].model_dump(mode="json"))
            for shard in sorted(records)
            if records[shard] != without.get(shard)
        }
        merged = None
        if texts:
            content = to_parquet(pa.table({"shard": list(texts), "record": list(texts.values())}))
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

    def _snapshot(self) -> dict[str, dict[int, CommitRecord]]:
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

    def _read_file(self, name: str) -> dict[int, CommitRecord]:
        path = self.folder / name
        try:
            content = path.read_bytes()
            if path.stem.rpartition("-")[2] != _digest(content):
                raise ValueError("it is not the file that was written")
            texts = [content.decode()] if name.endswith(".json") else from_parquet(content)["record"].to_pylist()
            records = [CommitRecord.model_validate_json(text) for text in texts]
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, OSError) as error:
            raise StoreError(
                f"commit record `{path}` is damaged: {error}",
                hint="restore it from a copy, or remove it and run `dla cache build`: it computes those shards again",
            ) from error
        return {record.shard: record for record in records}


def _digest(content: bytes) -> str:
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
