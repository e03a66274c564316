"""Whether a store holds what its records and its manifest say: every byte is read."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dla_cache.durable import is_temporary
from dla_cache.errors import name_some
from dla_cache.manifest import Manifest
from dla_cache.shards import Shard
from dla_cache.store import LatentStore
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import content_sum
from dla_cache.store.layout import IMAGES, commits_folder, open_shard
from dla_cache.store.metadata import how_to_go_on
from dla_cache.store.parts import CARD, CARD_TITLE, UNFINISHED

MOVE_AWAY = "move it away"
"""What cures a file that no command of ours writes, reads or removes."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    where: str
    """A part of the store: `depth, shard 3`, `rows.parquet`, or a path in it."""
    what: str


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


def verify_store(
    store: LatentStore,
    manifest: Manifest | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Reads the whole store and compares everything that is said twice.

    Against the manifest: IDs, sha256 and labels of all images but those that were removed from the store. In the
    store: metadata against recipes; each shard's size, checksums, hash, content and statistics against its record;
    planned shards without a record; files that belong to nothing. Of stored images each one's sha256, too.

    Args:
        on_progress: told after each shard how many are checked and how many there are.
    """
    problems = list(_manifest_problems(store, manifest)) if manifest else []
    problems += _metadata_problems(store)
    if (store.path / UNFINISHED).is_file():
        problems.append(Problem(UNFINISHED, "images are being removed: run `dla cache takedown` again to finish"))
    records = {series: store.committed(series) for series in store.series}
    shards_committed = sum(len(committed) for committed in records.values())
    shards_checked = bytes_checked = 0
    for series, committed in records.items():
        problems += _plan_problems(store, series, committed)
        for shard in store.shards:
            if shard.index in committed:
                problems += shard_problems(store, series, shard, committed[shard.index])
                shards_checked += 1
                bytes_checked += committed[shard.index].size_bytes
                if on_progress is not None:
                    on_progress(shards_checked, shards_committed)
    problems += [*_surplus_problems(store), *_card_problems(store)]
    is_complete = not any(store.missing(modality) for modality in store.modalities)
    return VerifyReport(
        problems=tuple(problems),
        n_images=len(store.rows.kept_ids),
        n_removed=0 if manifest is None else len(store.rows.removed_ids.intersection(manifest.image_ids)),
        shards_checked=shards_checked,
        bytes_checked=bytes_checked,
        content_hash=store.content_hash() if is_complete else None,
    )


def _manifest_problems(store: LatentStore, manifest: Manifest) -> Iterator[Problem]:
    listed = {row.image_id: row for row in manifest.rows() if row.image_id not in store.rows.removed_ids}
    stored = {image.image_id: image for image in store.rows if not image.removed}
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
            yield Problem("rows.parquet", f"{len(image_ids)} images {what}: {name_some(image_ids)}")
    if store.class_names != manifest.class_names:
        yield Problem(store.metadata.layout.main_file, "the class names are not the manifest's")


def _metadata_problems(store: LatentStore) -> Iterator[Problem]:
    try:
        rows_sha256 = hashlib.sha256((store.path / "rows.parquet").read_bytes()).hexdigest()
    except OSError as error:
        yield Problem("rows.parquet", f"it cannot be read: {error.strerror}")
        return
    for name, expected in store.metadata.files(rows_sha256).items():
        try:
            is_as_expected = json.loads((store.path / name).read_bytes()) == json.loads(expected)
        except (OSError, ValueError):
            is_as_expected = False
        if not is_as_expected:
            yield Problem(name, "it does not describe what lies there: `dla cache build` writes it again")


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
    image_ids = [store.rows.image_ids[row] for row in kept.tolist()]
    paths = store.shard_files(series, shard.index)
    try:
        contents = [path.read_bytes() for path in paths]
        opened = open_shard(store.layout_of(series), contents, len(shard), record.size_bytes)
    except (OSError, ValueError) as error:
        yield Problem(where, f"{error} ({', '.join(f'`{path.name}`' for path in paths)})")
        return
    payloads, damaged = opened.gather(kept - shard.start)
    if damaged:
        names = name_some([image_ids[position] for position in damaged])
        yield Problem(where, f"{len(damaged)} of {len(kept)} samples do not have their checksum: {names}")
        return
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    if digest.hexdigest() != record.file_sha256:
        yield Problem(where, "the file is whole but not the one that was committed")
    if f"{content_sum(image_ids, payloads):064x}" != record.content_sum:
        yield Problem(where, "its samples are not those that were committed")
    if store.measure_shard(series, shard, payloads) != record.statistics:
        yield Problem(where, "its statistics are not those of its samples")
    if len(kept) < len(shard) and store.encode_shard(series, shard, payloads) != tuple(contents):
        yield Problem(where, "it holds more than its images that were not removed: run `dla cache takedown` again")
    if series == IMAGES:
        changed = store.rows.changed_images(kept.tolist(), payloads)
        if changed:
            names = name_some([store.rows.image_ids[row] for row in changed])
            yield Problem(where, f"{len(changed)} images do not have the sha256 of their row: {names}")


def _surplus_problems(store: LatentStore) -> Iterator[Problem]:
    known = {store.path / "rows.parquet", store.path / CARD, *(store.path / name for name in store.metadata.files(""))}
    for series in store.series:
        for shard in store.committed(series):
            known.update(store.shard_files(series, shard))
    logs = {commits_folder(store.path, series) for series in store.series}
    # A build writes over these, and `prune` removes them.
    planned = {
        path for series in store.series for shard in store.shards for path in store.shard_files(series, shard.index)
    }
    for path in sorted(store.path.rglob("*")):
        # What a killed process left under a hidden temporary name is overwritten or never looked at.
        is_leftover = is_temporary(path) or path == store.path / UNFINISHED
        if path.is_file() and path not in known and path.parent not in logs and not is_leftover:
            what = "it belongs to nothing that is committed"
            yield Problem(path.relative_to(store.path).as_posix(), what if path in planned else f"{what}: {MOVE_AWAY}")


def _card_problems(store: LatentStore) -> Iterator[Problem]:
    path = store.path / CARD
    card = path.read_bytes() if path.is_file() else b""
    n_images = len(store.rows.kept_ids)
    if card.startswith(CARD_TITLE.encode()) and not card.startswith(f"{CARD_TITLE}{n_images} images".encode()):
        yield Problem(CARD, f"it does not tell of {n_images} images: run what made the store again, or {MOVE_AWAY}")
