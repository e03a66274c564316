"""Commit records: the only witness that a shard is there.

A record is written once, after the shard's bytes are safe on disk. It starts as a small JSON file;
consolidation gathers records into one Parquet file, so that 10⁶ shards are not 10⁶ files to list, nor
10⁶ records to parse for whoever needs one. Both are named by their content, so that a name never stands
for something else later.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from dla_cache.durable import read_file
from dla_cache.errors import StoreError
from dla_cache.maps import map_file
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.spec import RecordModel, canonical_json
from dla_cache.store.record_files import LocalRecords, RecordFiles
from dla_cache.store.statistics import SplitStatistics, StoredError


class Commitment(RecordModel):
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
    edge_crc32c: tuple[int, int]
    """The checksums of its first and its last payload: by them the files of another shard are told from its own."""
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
    made_with: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Versions, device, attention backend, batch size, and where weights came from: what lies outside the recipe."""
    audit: dict[str, int] = Field(default_factory=dict)
    """Counts of texts that latents were made from: `captions`, and by name those that named a class."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_told(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that what had nothing to tell has the bytes that it had before these fields were there.
        fields: dict[str, Any] = dump(self)
        return {name: value for name, value in fields.items() if value or name not in ("made_with", "audit")}


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
        ("edge_crc32c", pa.list_(pa.uint32())),
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

    def __init__(self, path: Path, place: str) -> None:
        """
        Args:
            place: what messages call it.

        Raises:
            ValueError: if it is not the file that was written.
        """
        self._place = place
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
        with _told_as_damage(self._place):
            return CommitRecord.model_validate_json(canonical_json(self._fields(place) | measured))

    def commitment(self, shard: int) -> Commitment:
        with _told_as_damage(self._place):
            return Commitment.model_validate(self._fields(self._places[shard]))

    def table(self) -> pa.Table:
        return self._commitments.append_column("measured", self._measured).cast(SCHEMA)

    def _fields(self, place: int) -> dict[str, Any]:
        fields: dict[str, Any] = self._commitments.slice(place, 1).to_pylist()[0]
        return fields

    @cached_property
    def _measured(self) -> pa.ChunkedArray:
        with _told_as_damage(self._place):
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

    def __init__(self, folder: Path, files: RecordFiles | None = None) -> None:
        """
        Args:
            files: where they are, if not simply in the folder.
        """
        self.folder = folder
        self._files = files or LocalRecords(folder)
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

        def make() -> tuple[str, bytes]:
            content = write().model_dump_json().encode()
            return f"{shard}-{_digest(content)}.json", content

        return self._files.commit(shard, lambda: shard in self.read(), make)

    def consolidate(self, *, loose: bool = False) -> None:
        """Merges all records into one file and deletes exactly those files that it read.

        Args:
            loose: only records that lie about as single files: what a long build does now and then.

        One process consolidates at a time. Writers and readers need not wait for it: a record is
        at any moment in at least one file.
        """
        if len(self._names()) < 2:  # as of a store that is whole, and may be read-only
            return
        with self._files.one_at_a_time():
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
        with self._files.one_at_a_time():
            self._merge(self._snapshot(), records)
            self._files.sync()

    def _merge(self, parts: Mapping[str, Records], without: Records) -> None:
        """Writes the union of `parts` but those records into one file, then deletes the files it was read from."""
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
            self._files.write(merged, content)
        for name in parts.keys() - {merged}:
            self._files.remove(name)

    def loose_files(self) -> int:
        """Number of records that await consolidation."""
        return sum(name.endswith(".json") for name in self._names())

    def _names(self) -> list[str]:
        try:
            return self._files.names()
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"the commit records in `{self._files.place}` cannot be listed: {error.strerror}",
                hint="restore them from a copy; without them `dla cache build` computes all again",
            ) from error

    def _snapshot(self) -> dict[str, Records]:
        while True:
            names = self._names()
            try:
                parts = {name: self._known.get(name) or self._read_file(name) for name in names}
            except FileNotFoundError:
                continue
            if self._files.was_whole(names):
                self._known = parts
                return parts

    def _read_file(self, name: str) -> Records:
        path = self._files.path(name)
        with _told_as_damage(f"{self._files.place}/{name}"):
            if not name.endswith(".json"):
                return RecordFile(path, f"{self._files.place}/{name}")
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
def _told_as_damage(place: str) -> Iterator[None]:
    """Turns what a damaged file raises into one error; a missing file remains one."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise StoreError(
            f"commit record `{place}` is damaged: {error}",
            hint="restore it from a copy, or remove it and run `dla cache build`: it computes those shards again",
        ) from error


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
