"""Whether a store holds what its records and its manifest say: every byte is read, or those of a random sample."""

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

from dla_cache.card import is_card, is_sealed
from dla_cache.durable import is_temporary, read_file
from dla_cache.errors import StoreError, name_some
from dla_cache.manifest import Manifest
from dla_cache.order import generator
from dla_cache.shards import Shard
from dla_cache.store import LatentStore
from dla_cache.store.adopted import Adoption, content_of, read_adoptions
from dla_cache.store.claims import CLAIMS
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import content_sum
from dla_cache.store.files import IS_LINK, MOVE_AWAY
from dla_cache.store.layout import IMAGES, edges_of, open_shard
from dla_cache.store.metadata import how_to_go_on
from dla_cache.store.parts import ADOPTED, CARD, CARD_TITLE, QUARANTINE, UNFINISHED
from dla_cache.store.reading import is_out_of_reach, said_of
from dla_cache.store.row_files import row_files, row_problems


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    """A part of the store: `depth, shard 3`, `row table`, or a path in it."""
    what: str


Unit = tuple[str, Shard, CommitRecord]
"""A committed shard of a series."""


@dataclass(frozen=True, slots=True)
class ShardSample:
    """Which shards were read where not all were."""

    seed: int
    read: dict[str, tuple[int, ...]]
    """By series, in rising order."""
    unread: dict[str, int]
    """How many of each series: of these only presence and size were looked at, and nothing is said of their bytes."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at and what was found."""

    problems: tuple[Problem, ...]
    n_images: int
    """Of the store, without those that were removed."""
    n_removed: int
    """Images that were removed from the store and that the manifest lists; 0 without a manifest."""
    shards_checked: int
    bytes_checked: int
    content_hash: str | None
    """None if a shard of a modality is missing."""
    sample: ShardSample | None
    """None if every shard was read."""
    adopted: tuple[Adoption, ...]
    """Changes that were declared harmless."""


def verify_store(
    store: LatentStore,
    manifest: Manifest | None = None,
    *,
    sample: float | None = None,
    seed: int = 0,
    jobs: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Reads the whole store, each shard's files once, and compares everything that is said twice.

    Against the manifest: IDs, sha256 and labels of all images but those that were removed from the store. In the
    store: metadata against recipes; each shard's size, checksums, hash, content and statistics against its record;
    planned shards without a record; files that belong to nothing. Of stored images each one's sha256, too.

    Args:
        sample: read only so many random committed shards, as a share below 1 or a number of them; at least one. All
            else is compared as ever.
        seed: which ones those are.
        jobs: threads that read and hash, each a shard at a time in memory; by default one a core.
        on_progress: told after each shard how many are checked and how many there are.
    """
    with store.past_copies() as anew:
        return _verify(anew, manifest, sample, seed, jobs, on_progress)


def _verify(
    store: LatentStore,
    manifest: Manifest | None,
    sample: float | None,
    seed: int,
    jobs: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> VerifyReport:
    problems = list(_manifest_problems(store, manifest)) if manifest else []
    problems += _metadata_problems(store)
    if (store.path / UNFINISHED).is_file():
        problems.append(Problem(UNFINISHED, "images are being removed: run `dla cache takedown` again to finish"))
    units: list[Unit] = []
    for series in store.series:
        committed = store.committed(series)
        problems += _plan_problems(store, series, committed)
        units += [(series, shard, committed[shard.index]) for shard in store.shards if shard.index in committed]
    chosen = _draw(len(units), sample, seed)
    for place in sorted(set(range(len(units))).difference(chosen)):
        problems += _size_problems(store, *units[place])
    for done, found in enumerate(_in_order(store, [units[place] for place in chosen], jobs), start=1):
        problems += found
        if on_progress is not None:
            on_progress(done, len(chosen))
    is_complete = not any(store.missing(modality) for modality in store.modalities)
    content_hash = store.content_hash() if is_complete else None
    adopted, found = _adopted(store)
    problems += found
    problems += [*_surplus_problems(store), *_card_problems(store, content_hash)]
    return VerifyReport(
        problems=tuple(problems),
        n_images=store.rows.n_kept,
        n_removed=0 if manifest is None else len(store.rows.removed_ids.intersection(manifest.image_ids)),
        shards_checked=len(chosen),
        bytes_checked=sum(units[place][2].size_bytes for place in chosen),
        content_hash=content_hash,
        sample=None if sample is None else _describe_sample(units, chosen, seed),
        adopted=adopted,
    )


def _adopted(store: LatentStore) -> tuple[tuple[Adoption, ...], list[Problem]]:
    """What was adopted, and whether the record of it is, byte for byte, the one that was written."""
    try:
        adopted = read_adoptions(store.path)
    except StoreError as error:
        return (), [Problem(ADOPTED, error.message)]
    if adopted and read_file(store.path / ADOPTED) != content_of(adopted):
        return adopted, [Problem(ADOPTED, "its bytes are not those that were written: restore it from a copy")]
    return adopted, []


def _draw(n_units: int, sample: float | None, seed: int) -> list[int]:
    """The places of the shards that are read, rising."""
    if sample is None:
        return list(range(n_units))
    wanted = math.ceil(sample * n_units) if sample < 1 else int(sample)
    return sorted(generator(seed).permutation(n_units)[:wanted].tolist())


def _describe_sample(units: Sequence[Unit], chosen: Collection[int], seed: int) -> ShardSample:
    counts = Counter(series for series, _, _ in units)
    read: dict[str, list[int]] = {series: [] for series in counts}
    for place in chosen:
        series, shard, _ = units[place]
        read[series].append(shard.index)
    return ShardSample(
        seed,
        {series: tuple(shards) for series, shards in read.items()},
        {series: counts[series] - len(shards) for series, shards in read.items()},
    )


def _in_order(store: LatentStore, units: Sequence[Unit], jobs: int | None) -> Iterator[list[Problem]]:
    """What is amiss with each shard, in their order; several are read at a time.

    Threads, because hashes and checksums of large buffers leave Python's lock to others.
    """
    n_threads = max(1, jobs or len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="verify")
    ahead: deque[Future[list[Problem]]] = deque()
    try:
        for unit in units:
            ahead.append(pool.submit(_read_unit, store, unit))
            if len(ahead) > n_threads:  # a store has up to a million shards: not all of them at once
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_unit(store: LatentStore, unit: Unit) -> list[Problem]:
    return list(shard_problems(store, *unit))


def _size_problems(store: LatentStore, series: str, shard: Shard, record: CommitRecord) -> Iterator[Problem]:
    """What is amiss with a shard that is not read, as far as its files' names and sizes tell."""
    where, files = f"{series}, shard {shard.index}", store.layout_of(series).files(shard.index)
    problem = record_problem(store, series, shard, record)
    if problem is not None:
        yield Problem(where, problem)
        return
    try:
        _require_files(store, files, record.size_bytes)
    except (OSError, ValueError) as error:
        if is_out_of_reach(error):
            raise
        yield Problem(where, f"{said_of(error)} ({_named(files)})")


def _require_files(store: LatentStore, files: Sequence[str], size_bytes: int) -> None:
    """Passes if these files have so many bytes together, and are no links: before any of them is read.

    Raises:
        OSError: if one is missing.
        ValueError: if they have not, or are.
    """
    if any((store.path / name).is_symlink() for name in files):
        raise ValueError(IS_LINK)
    found = sum(store.files.size_bytes(name) for name in files)
    if found != size_bytes:
        raise ValueError(f"it has {found} bytes, {size_bytes} were committed")


def _named(files: Sequence[str]) -> str:
    return ", ".join(f"`{name.rpartition('/')[2]}`" for name in files)


def _manifest_problems(store: LatentStore, manifest: Manifest) -> Iterator[Problem]:
    listed = {row.image_id: row for row in manifest.rows() if row.image_id not in store.rows.removed_ids}
    stored = {image.image_id: image for image in store.rows.kept()}
    # A store may have been built from some splits of the manifest only.
    wanted = [image_id for image_id, row in listed.items() if row.split in store.rows.splits]
    differing = {
        "are in the manifest but not in the store": [image_id for image_id in wanted if image_id not in stored],
        "are in the store but not in the manifest": [image_id for image_id in stored if image_id not in listed],
    }
    both = [image_id for image_id in stored if image_id in listed]
    for name in ("sha256", "label", "split", "uri"):
        differing[f"have another `{name}` in the manifest"] = [
            image_id for image_id in both if getattr(stored[image_id], name) != getattr(listed[image_id], name)
        ]
    for what, image_ids in differing.items():
        if image_ids:
            yield Problem("row table", f"{len(image_ids)} images {what}: {name_some(image_ids)}")
    if store.class_names != manifest.class_names:
        yield Problem(store.metadata.layout.main_file, "the class names are not the manifest's")


def _metadata_problems(store: LatentStore) -> Iterator[Problem]:
    for path, fault in row_problems(store.path, store.metadata.rows_sha256):
        yield Problem(path, fault)
    for name, expected in store.metadata.files(store.metadata.rows_sha256).items():
        try:
            is_as_expected = read_file(store.path / name) == expected
        except OSError:
            is_as_expected = False
        if not is_as_expected:
            yield Problem(name, "it is not what describes this store, byte for byte: `dla cache build` writes it again")


def _plan_problems(store: LatentStore, series: str, committed: Mapping[int, CommitRecord]) -> Iterator[Problem]:
    for shard in store.missing(series):
        yield Problem(f"{series}, shard {shard}", f"not committed: {how_to_go_on(store.path)}")
    for shard in sorted(committed.keys() - range(len(store.shards))):
        yield Problem(f"{series}, shard {shard}", "it is committed, and not planned")


def record_problem(store: LatentStore, series: str, shard: Shard, record: CommitRecord) -> str | None:
    """What keeps a record from being that of this shard, if anything does."""
    if record.n_rows != len(shard):
        return f"its record is of {record.n_rows} images, {len(shard)} are planned"
    if (record.recipe_hash, record.modality) != (store.recipe_hash(series), series):
        return f"its record is of another recipe, `{record.recipe_hash}`"
    return None


def shard_problems(store: LatentStore, series: str, shard: Shard, record: CommitRecord) -> Iterator[Problem]:
    """All that is amiss with one committed shard; reads every byte of it."""
    where = f"{series}, shard {shard.index}"
    problem = record_problem(store, series, shard, record)
    if problem is not None:
        yield Problem(where, problem)
        return
    kept = store.kept_rows(shard)
    image_ids = store.rows.ids_of(kept)
    files = store.layout_of(series).files(shard.index)
    try:
        _require_files(store, files, record.size_bytes)
        contents = [store.files.read(name) for name in files]
        opened = open_shard(store.layout_of(series), contents, len(shard), record.size_bytes)
    except (OSError, ValueError) as error:
        if is_out_of_reach(error):
            raise
        yield Problem(where, f"{said_of(error)} ({_named(files)})")
        return
    payloads, damaged = opened.gather(kept - shard.start)
    if damaged:
        names = name_some([image_ids[position] for position in damaged])
        yield Problem(where, f"{len(damaged)} of {len(kept)} samples do not have their checksum: {names}")
        return
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    is_committed = digest.hexdigest() == record.file_sha256
    if not is_committed:
        yield Problem(where, "the file is whole but not the one that was committed")
    elif edges_of(opened, len(shard)) != record.edge_crc32c:
        yield Problem(where, "its record has other checksums of its first and last sample")
    if f"{content_sum(image_ids, payloads):064x}" != record.content_sum:
        yield Problem(where, "its samples are not those that were committed")
    if store.measure_shard(series, shard, payloads) != record.statistics:
        yield Problem(where, "its statistics are not those of its samples")
    # A file without an index beside it has room for nothing but its samples, where none is removed.
    may_hold_more = len(kept) < len(shard) or (is_committed and len(files) > 1)
    if may_hold_more and store.encode_shard(series, shard, payloads) != tuple(contents):
        more = "run `dla cache takedown` again" if len(kept) < len(shard) else f"see the members of {_named(files[:1])}"
        yield Problem(where, f"it holds other things than its images under their names: {more}")
    if series == IMAGES:
        changed = store.metadata.changed_images(kept.tolist(), payloads)
        if changed:
            names = name_some(store.rows.ids_of(changed))
            yield Problem(where, f"{len(changed)} images do not have the sha256 of their row: {names}")


def _surplus_problems(store: LatentStore) -> Iterator[Problem]:
    rows = row_files(store.rows, store.metadata.rows_sha256)
    files = {series: store.layout_of(series).files for series in store.series}
    shards = {name for series in store.series for shard in store.committed(series) for name in files[series](shard)}
    known = shards | {CARD, ADOPTED, QUARANTINE, *rows, *store.metadata.files("")}
    logs = {PurePosixPath("commits", series) for series in store.series}
    # A build writes over these, and `prune` removes them.
    planned = {name for series in store.series for shard in store.shards for name in files[series](shard.index)}
    for name, fault in store.files.entries():
        path = PurePosixPath(name)
        # What a killed process left under a hidden temporary name is overwritten or never looked at, and so are claims.
        is_leftover = is_temporary(path) or name == UNFINISHED or path.parts[0] == CLAIMS
        if fault == IS_LINK:
            if name not in shards:  # else it was found with its shard
                yield Problem(name, IS_LINK)
        elif name in known or (path.parent in logs and fault is None) or is_leftover:
            continue
        elif fault is not None:
            yield Problem(name, fault)
        else:
            what = "it belongs to nothing that is committed"
            yield Problem(name, what if name in planned else f"{what}: {MOVE_AWAY}")


def _card_problems(store: LatentStore, content_hash: str | None) -> Iterator[Problem]:
    """What is amiss with the card, which decides nothing. Not that its words are other ones than those of this dla."""
    path = store.path / CARD
    if not path.is_file():
        return
    card = read_file(path)
    cure = f"run what made the store again, or {MOVE_AWAY}"
    n_images = store.rows.n_kept
    if is_card(card) and not is_sealed(card):
        yield Problem(CARD, f"it is not the card that was written: {cure}")
    elif is_card(card) and not card.startswith(f"{CARD_TITLE}{n_images} images".encode()):
        yield Problem(CARD, f"it does not tell of {n_images} images: {cure}")
    elif is_card(card) and content_hash is not None and f"`{content_hash}`".encode() not in card:
        yield Problem(CARD, f"it tells of another content hash: {cure}")
