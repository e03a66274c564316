"""Images taken out of stores by their IDs, so that no byte of theirs or of their latents is left.

Row first: from the moment its tombstone is written no reader is given the image. Then each shard that holds it is
written anew without it. Every step leaves either what was or what will be, and a file in the store says that the
removal is not through, so that the same call finishes whatever a killed one began.

What stays is the ID in the row table, with its split: it keeps the rows in place, and tells what is gone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dla_cache.card import write_card
from dla_cache.durable import locked_folder, make_folder, sync_folder, write_durably, writing_to
from dla_cache.errors import CorruptShardError, MissingLatentError, StoreError, name_some
from dla_cache.housekeeping import prune_store
from dla_cache.shards import Shard
from dla_cache.store import LatentStore, open_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import Payload
from dla_cache.store.layout import IMAGES, open_shard, stored_dtype
from dla_cache.store.metadata import read_metadata
from dla_cache.store.parts import STAGING, UNFINISHED
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.verify import shard_problems, verify_store

RECORD = "record.json"

Unit = tuple[str, int]
"""Series and shard."""


@dataclass(frozen=True, slots=True)
class TakedownReport:
    """What became of one store."""

    store: str
    removed: tuple[str, ...]
    """IDs that this call removed, or would."""
    already: tuple[str, ...]
    """IDs asked for that were removed before."""
    shards_rewritten: int
    """Of all series."""
    bytes_read: int
    """By the check at the end."""
    content_hash: str | None
    """None while shards are missing, and of a dry run."""


def take_down(
    paths: Sequence[Path],
    image_ids: Sequence[str],
    *,
    dry_run: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[TakedownReport]:
    """Removes images from stores, finishes removals that were begun, and reads every byte of the stores afterwards.

    No other process may write to the stores meanwhile; one that has a store open may still hold what it read.

    Args:
        image_ids: each must be in at least one of the stores, also as one that was removed before.
        on_progress: told how many of how many shards are rewritten, and in which store.

    Raises:
        MissingLatentError: if no store knows an ID; then nothing is removed anywhere.
        CorruptShardError: if a shard that must be rewritten is damaged, or a store does not verify afterwards.
        StoreError: if a store cannot be read or written.
        In every case images that have their tombstone stay hidden, and the same call goes on from there.
    """
    tables = {path: _pending_rows(path) or open_store(path).rows for path in paths}
    known = {image_id for rows in tables.values() for image_id in rows.image_ids}
    unknown = sorted(set(image_ids) - known)
    if unknown:
        raise MissingLatentError(
            f"{len(unknown)} images are in none of the {len(paths)} stores: {name_some(unknown)}",
            hint="nothing is removed; check the IDs, `dla cache inspect STORE --image-id ID` finds one",
        )
    reports = []
    for path, rows in tables.items():
        gone = {image.image_id for image in rows if image.removed}
        wanted = set(image_ids) & set(rows.image_ids)
        removed, already = tuple(sorted(wanted - gone)), tuple(sorted(wanted & gone))
        if dry_run:
            store = open_store(path)
            doomed = frozenset(row for row in range(len(rows)) if rows.image_ids[row] in wanted - gone)
            reports.append(TakedownReport(str(path), removed, already, len(_units(store, doomed)), 0, None))
        else:
            reports.append(_take_down_of(path, removed, already, on_progress))
    return reports


def _take_down_of(
    path: Path,
    removed: tuple[str, ...],
    already: tuple[str, ...],
    on_progress: Callable[[int, int, str], None] | None,
) -> TakedownReport:
    rewritten = 0
    with writing_to(path), locked_folder(path):
        if removed or already or (path / UNFINISHED).is_file():
            _bury(path, removed)
            store = open_store(path)
            units = _units(store, frozenset(image.row for image in store.rows if image.removed))
            prune_store(store)
            for done, unit in enumerate(units, start=1):
                rewritten += _rewrite(store, unit)
                if on_progress is not None:
                    on_progress(done, len(units), str(path))
            for series in store.series:
                store.consolidate(series)
            if (path / STAGING).is_dir():
                shutil.rmtree(path / STAGING)
    store = open_store(path)
    write_card(store)
    report = verify_store(store)
    # Shards that were never computed are no trace of anybody.
    expected = {f"{series}, shard {shard}" for series in store.series for shard in store.missing(series)}
    problems = [problem for problem in report.problems if problem.where not in {UNFINISHED, *expected}]
    if problems:
        raise CorruptShardError(
            f"{len(problems)} problems in `{path}` after the removal: {problems[0].where}: {problems[0].what}",
            hint=f"`dla cache verify {path}` lists all; restore what is damaged from a copy, then run this again",
        )
    with writing_to(path):
        (path / UNFINISHED).unlink(missing_ok=True)
        sync_folder(path)
    return TakedownReport(str(path), removed, already, rewritten, report.bytes_checked, report.content_hash)


def _bury(path: Path, removed: Sequence[str]) -> None:
    """Writes the tombstones: the plan first, then the row table, then the main file, which vouches for it."""
    pending = _pending_rows(path)
    before = open_store(path).rows if pending is None else pending
    rows = RowTable([_tombstone(image) if image.image_id in set(removed) else image for image in before])
    content = rows.to_parquet()
    rows_sha256 = hashlib.sha256(content).hexdigest()
    plan = {
        "removed": [image.image_id for image in rows if image.removed],
        "rows_sha256": [hashlib.sha256((path / "rows.parquet").read_bytes()).hexdigest(), rows_sha256],
    }
    write_durably(path / UNFINISHED, json.dumps(plan).encode())
    write_durably(path / "rows.parquet", content)
    for name, text in read_metadata(path, rows_sha256=rows_sha256).files(rows_sha256).items():
        if (path / name).read_bytes() != text:
            write_durably(path / name, text)


def _tombstone(image: StoredImage) -> StoredImage:
    return replace(image, sha256="", uri="", label=None, removed=True)


def _pending_rows(path: Path) -> RowTable | None:
    """The row table with the tombstones of an unfinished removal, written yet or not; None if there is none.

    Raises:
        StoreError: if the plan or the row table is damaged.
    """
    if not (path / UNFINISHED).is_file():
        return None
    try:
        plan = json.loads((path / UNFINISHED).read_bytes())
        content = (path / "rows.parquet").read_bytes()
        if hashlib.sha256(content).hexdigest() not in plan["rows_sha256"]:
            raise ValueError("the row table is neither the one before nor the one after")
        removed = set(plan["removed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"`{path / UNFINISHED}` is damaged: {error}", hint="restore it from a copy") from error
    rows = RowTable.from_parquet(content)
    return RowTable([_tombstone(image) if image.image_id in removed else image for image in rows])


def _units(store: LatentStore, rows: frozenset[int]) -> list[Unit]:
    """The shards, of every series, that hold one of these rows and are committed or half rewritten."""
    shards = sorted({row // store.shard_size for row in rows})
    return [
        (series, shard)
        for series in store.series
        for shard in shards
        if shard in store.committed(series) or _staging(store, (series, shard)).is_dir()
    ]


def _staging(store: LatentStore, unit: Unit) -> Path:
    series, shard = unit
    return store.path / STAGING / f"{series}-{shard}"


def _rewrite(store: LatentStore, unit: Unit) -> bool:
    """Writes a shard without its removed images; False if it is so already.

    A copy of what stays is made first, in a folder that comes into being by one rename. While it is there it is what
    counts, whatever has become of the shard's own files.
    """
    series, index = unit
    shard = store.shards[index]
    staging = _staging(store, unit)
    files = store.shard_files(series, index)
    if not staging.is_dir():
        record = store.committed(series)[index]
        contents = store.encode_shard(series, shard, _payloads(store, series, shard, record, files))
        is_without = contents == tuple(path.read_bytes() for path in files)
        if is_without and not any(shard_problems(store, series, shard, record)):
            return False
        if not is_without and _sha256_of(files) != record.file_sha256:
            raise _damaged(store, series, shard, files[0], "it is not the file that was committed")
        _stage(staging, record, contents)
    record = CommitRecord.model_validate_json((staging / RECORD).read_bytes())
    payloads = _payloads(store, series, shard, record, [staging / str(number) for number in range(len(files))])
    committed = store.committed(series)
    if index in committed:
        store.withdraw(series, {index: committed[index]})
    if series == IMAGES:
        store.write_images(shard, [bytes(payload) for payload in payloads], seconds=record.seconds)
    else:
        latent = store.recipe(series).format
        latents = np.ascontiguousarray(payloads).view(stored_dtype(latent)).reshape(len(payloads), *latent.shape)
        store.write_shard(series, shard, latents, seconds=record.seconds, device=record.device)
    # By one rename, too: half a copy would count as a whole one.
    shutil.rmtree(staging.rename(_unfinished(staging)))
    return True


def _stage(staging: Path, record: CommitRecord, contents: Sequence[bytes]) -> None:
    unfinished = _unfinished(staging)
    make_folder(unfinished)
    for number, content in enumerate(contents):
        write_durably(unfinished / str(number), content)
    size_bytes = sum(len(content) for content in contents)
    kept = record.model_copy(update={"size_bytes": size_bytes})
    write_durably(unfinished / RECORD, kept.model_dump_json().encode())
    unfinished.rename(staging)
    sync_folder(staging.parent)


def _unfinished(staging: Path) -> Path:
    """Where a copy lies before it is whole and after it is of use; cleared of what a killed process left."""
    path = staging.with_name(f"{staging.name}.part")
    if path.is_dir():
        shutil.rmtree(path)
    return path


def _payloads(
    store: LatentStore, series: str, shard: Shard, record: CommitRecord, files: Sequence[Path]
) -> Sequence[Payload]:
    """The payloads of the images that stay, each with its checksum.

    Raises:
        CorruptShardError: if a file or one of these payloads is damaged.
    """
    try:
        contents = [path.read_bytes() for path in files]
        opened = open_shard(store.layout_of(series), contents, len(shard), record.size_bytes)
        payloads: Sequence[Payload]
        payloads, damaged = opened.gather(store.kept_rows(shard) - shard.start)
    except (OSError, ValueError) as error:
        raise _damaged(store, series, shard, files[0], str(error)) from error
    if damaged:
        raise _damaged(store, series, shard, files[0], f"{len(damaged)} samples do not have their checksum")
    return payloads


def _damaged(store: LatentStore, series: str, shard: Shard, path: Path, fault: str) -> CorruptShardError:
    return CorruptShardError(
        f"{series}, shard {shard.index} of `{store.path}` is damaged, so it cannot be written anew: {fault}",
        hint=f"restore `{path.name}` from a copy and run this again: until then the images are hidden, and their bytes"
        " are still there",
    )


def _sha256_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
