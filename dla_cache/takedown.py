"""Images taken out of stores by their IDs, so that no byte of theirs or of their latents is left.

Rows first, in all stores: from the moment its tombstone is written no reader is given the image. Then each shard that
holds it is written anew without it; a damaged one keeps no other from it. Every step leaves either what was or what
will be, and a file in the store says that the removal is not through, so that the same call finishes whatever a killed
one began.

What stays is the ID in the row table, with its split: it keeps the rows in place, and tells what is gone. Builds and
imports go on with the store and leave the image out; one that runs meanwhile waits, and is refused its next commit,
since it holds the row table of before (`dla_cache.store.metadata.unchanged_rows`). That rests on `flock`: where a file
system does not keep it between machines, let nothing write to the store.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dla_cache.card import card_text
from dla_cache.durable import make_folder, read_file, sync_folder, write_durably
from dla_cache.errors import CorruptShardError, MissingLatentError, StoreError, name_some
from dla_cache.housekeeping import has_card, prune_store
from dla_cache.shards import Shard
from dla_cache.store import LatentStore, open_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.layout import open_shard
from dla_cache.store.metadata import read_metadata, sole_writer
from dla_cache.store.parts import CARD, STAGING, UNFINISHED
from dla_cache.store.row_files import write_rows
from dla_cache.store.rows import RowTable
from dla_cache.verify import VerifyReport, shard_problems, verify_store

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
    same_bytes: tuple[str, ...]
    """IDs not asked for, of this store's images that have the very bytes of one that is removed, here or there."""
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

    A process that has a store open may still hold what it read; it is refused the next shard it wants.

    Args:
        image_ids: each must be in at least one of the stores, also as one that was removed before.
        on_progress: told how many of how many shards are rewritten, and in which store.

    Raises:
        MissingLatentError: if no store knows an ID; then nothing is removed anywhere.
        CorruptShardError: if shards that must be rewritten are damaged, or a store does not verify afterwards; all
            others are rewritten by then.
        StoreError: if a store cannot be read or written.
        In every case images that have their tombstone stay hidden, and the same call goes on from there.
    """
    tables = {path: _read_rows(path) for path in paths}
    asked = set(image_ids)
    unknown = sorted(asked.difference(*(table.rows.image_ids for table in tables.values())))
    for place in unknown:
        meant = [image.image_id for table in tables.values() for image in table.rows if image.uri == place]
        if meant:
            raise is_path(place, meant)
    if unknown:
        raise MissingLatentError(
            f"{len(unknown)} images are in none of the {len(paths)} stores: {name_some(unknown)}",
            hint="nothing is removed; check the IDs, `dla cache inspect STORE --image-id ID` finds one",
        )
    doomed_bytes = {sha256 for table in tables.values() for sha256 in table.sha256_of(asked)}
    planned = {path: _plan_for(path, table, asked, doomed_bytes) for path, table in tables.items()}
    if dry_run:
        return [_with_shards_counted(path, plan) for path, plan in planned.items()]
    for path, plan in planned.items():
        with sole_writer(path):
            if _has_work(path, plan):
                _bury(path, plan.removed)
    damaged: list[str] = []
    problems: list[str] = []
    reports = []
    for path, plan in planned.items():
        with sole_writer(path):
            rewritten, lost = _rewrite_all(path, on_progress) if _has_work(path, plan) else (0, [])
            damaged += lost
            if not lost:  # else it is known not to verify
                checked = verify_store(open_store(path))
                problems += _close(path, checked)
                reports.append(
                    replace(
                        plan,
                        shards_rewritten=rewritten,
                        bytes_read=checked.bytes_checked,
                        content_hash=checked.content_hash,
                    )
                )
    _refuse_faults(damaged, problems)
    return reports


def remove_unmade(path: Path, image_ids: Sequence[str]) -> None:
    """Removes images that have no latent from a store, without the reading of every byte that `take_down` ends with.

    Nothing needs to be untraceable here. Where the process dies, `take_down` finishes it.

    Raises:
        CorruptShardError: if a committed shard that must be rewritten is damaged.
        StoreError: if the store cannot be read or written.
    """
    with sole_writer(path):
        _bury(path, image_ids)
        _, damaged = _rewrite_all(path, None)
        _refuse_faults(damaged, ())
        (path / UNFINISHED).unlink()
        sync_folder(path)


def ids_of_file(paths: Sequence[Path], content: bytes) -> list[str]:
    """The IDs under which stores know an image of these bytes."""
    sha256 = hashlib.sha256(content).hexdigest()
    return sorted({image.image_id for path in paths for image in _read_rows(path).rows if image.sha256 == sha256})


def is_path(place: str, image_ids: Sequence[str]) -> MissingLatentError:
    """For an image's path where its ID is wanted."""
    named = name_some(sorted(set(image_ids)))
    return MissingLatentError(
        f"`{place}` is an image's path; its ID is {named}",
        hint="give the ID; nothing is removed",
    )


def _plan_for(path: Path, table: "_Rows", asked: Collection[str], doomed_bytes: Collection[str]) -> TakedownReport:
    gone, wanted = table.rows.removed_ids, frozenset(asked).intersection(table.rows.image_ids)
    return TakedownReport(
        store=str(path),
        removed=tuple(sorted(wanted - gone)),
        already=tuple(sorted(wanted & gone)),
        same_bytes=tuple(
            image.image_id for image in table.rows if image.sha256 in doomed_bytes and image.image_id not in asked
        ),
        shards_rewritten=0,
        bytes_read=0,
        content_hash=None,
    )


def _with_shards_counted(path: Path, plan: TakedownReport) -> TakedownReport:
    store = open_store(path)
    rows = frozenset(map(store.rows.row_of, plan.removed))
    return replace(plan, shards_rewritten=len(_units(store, rows)))


def _has_work(path: Path, plan: TakedownReport) -> bool:
    return bool(plan.removed or plan.already) or (path / UNFINISHED).is_file()


def _rewrite_all(path: Path, on_progress: Callable[[int, int, str], None] | None) -> tuple[int, list[str]]:
    """Rewrites what can be of a store whose `sole_writer` this is: how many shards it were, and which are damaged."""
    store = open_store(path)
    units = _units(store, store.rows.removed_rows)
    prune_store(store)
    rewritten, damaged = 0, []
    for done, unit in enumerate(units, start=1):
        try:
            rewritten += _rewrite(store, unit)
        except CorruptShardError as error:
            damaged.append(error.message)
        if on_progress is not None:
            on_progress(done, len(units), str(path))
    if not damaged:
        for series in store.series:
            store.consolidate(series)
        if (path / STAGING).is_dir():
            shutil.rmtree(path / STAGING)
        if has_card(path / CARD) or not (path / CARD).exists():
            write_durably(path / CARD, card_text(store).encode())
    return rewritten, damaged


def _close(path: Path, report: VerifyReport) -> list[str]:
    """Notes that the removal is through, unless there are problems: these."""
    store = open_store(path)
    # Shards that were never computed are no trace of anybody.
    expected = {f"{series}, shard {shard}" for series in store.series for shard in store.missing(series)}
    problems = [
        f"{problem.where} of `{path}`: {problem.what}"
        for problem in report.problems
        if problem.where not in {UNFINISHED, *expected}
    ]
    if not problems:
        (path / UNFINISHED).unlink(missing_ok=True)
        sync_folder(path)
    return problems


def _refuse_faults(damaged: Sequence[str], problems: Sequence[str]) -> None:
    """Passes if there are none.

    Raises:
        CorruptShardError: naming every damaged shard, and the first problems of stores that do not verify.
    """
    if damaged:
        and_problems = f"; and {len(problems)} problems elsewhere: {problems[0]}" if problems else ""
        raise CorruptShardError(
            f"{len(damaged)} shards are damaged, so they cannot be written anew: {'; '.join(damaged)}{and_problems}",
            hint="restore them from a copy, or make them again with `dla cache build --repair`, and run this again:"
            " until then these may hold bytes of the images, which are hidden in all stores given",
        )
    if problems:
        raise CorruptShardError(
            f"{len(problems)} problems after the removal: {problems[0]}",
            hint="`dla cache verify` with that store lists all; restore what is damaged from a copy, or make it again"
            " with `dla cache build --repair`, then run this again",
        )


def _bury(path: Path, removed: Sequence[str]) -> None:
    """Writes the tombstones: the plan first, then the new row table, then the main file, by which it counts."""
    table = _read_rows(path)
    plan = {
        "removed": sorted(table.rows.removed_ids.union(removed)),
        "sha256": sorted(table.sha256_of(set(removed))),
    }
    write_durably(path / UNFINISHED, json.dumps(plan).encode())
    rows = table.rows.without(removed)
    for name, text in replace(read_metadata(path), rows=rows).files(write_rows(path, rows)).items():
        if read_file(path / name) != text:
            write_durably(path / name, text)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A row table with the tombstones of an unfinished removal, be they written or not."""

    rows: RowTable
    pending_sha256: frozenset[str]
    """Of the bytes of the images of that removal."""

    def sha256_of(self, image_ids: Collection[str]) -> frozenset[str]:
        """Of the bytes of these images that were not removed before, and of those of the unfinished removal."""
        return self.pending_sha256 | {
            image.sha256 for image in self.rows if image.image_id in image_ids and not image.removed
        }


def _read_rows(path: Path) -> _Rows:
    """The row table of a store.

    Raises:
        StoreError: if it, or the plan of an unfinished removal, is damaged.
    """
    if not (path / UNFINISHED).is_file():
        return _Rows(open_store(path).rows, frozenset())
    try:
        plan = json.loads(read_file(path / UNFINISHED))
        removed, sha256 = set(plan["removed"]), frozenset(plan["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"`{path / UNFINISHED}` is damaged: {error}", hint="restore it from a copy") from error
    return _Rows(open_store(path).rows.without(removed), sha256)


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
        is_without = contents == tuple(read_file(path) for path in files)
        if is_without and not any(shard_problems(store, series, shard, record)):
            return False
        if not is_without and _sha256_of(files) != record.file_sha256:
            raise _damaged(store, series, shard, files[0], "it is not the file that was committed")
        _stage(staging, record, contents)
    record = CommitRecord.model_validate_json(read_file(staging / RECORD))
    payloads = _payloads(store, series, shard, record, [staging / str(number) for number in range(len(files))])
    store.replace_shard(shard, payloads, record)
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


def _payloads(store: LatentStore, series: str, shard: Shard, record: CommitRecord, files: Sequence[Path]) -> Any:
    """The payloads of the images that stay, each with its checksum.

    Raises:
        CorruptShardError: if a file or one of these payloads is damaged.
    """
    try:
        contents = [read_file(path) for path in files]
        opened = open_shard(store.layout_of(series), contents, len(shard), record.size_bytes)
        payloads, damaged = opened.gather(store.kept_rows(shard) - shard.start)
    except (OSError, ValueError) as error:
        raise _damaged(store, series, shard, files[0], str(error)) from error
    if damaged:
        raise _damaged(store, series, shard, files[0], f"{len(damaged)} samples do not have their checksum")
    return payloads


def _damaged(store: LatentStore, series: str, shard: Shard, path: Path, fault: str) -> CorruptShardError:
    return CorruptShardError(f"{series}, shard {shard.index} of `{store.path}`: {fault} (`{path.name}`)")


def _sha256_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(read_file(path))
    return digest.hexdigest()
