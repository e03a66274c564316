"""Filling a store: every shard that no record vouches for is read, encoded, written and committed.

Running it again is how to resume. Nothing here knows how many processes build the store: each
takes the shards of its rank, and whatever is committed is skipped. So are images that were removed
from the store: the manifest may list them still or no longer, they do not come back.

One pass fills all series (`dla_cache.passes`): an image is read once for all of them, and the device goes on while
images are read and shards are written (`dla_cache.pipeline`).
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dla_cache.card import write_card
from dla_cache.engines.local import fill_on_devices
from dla_cache.errors import ManifestError, StoreError
from dla_cache.filling import bad_images
from dla_cache.leaks import Synonyms
from dla_cache.manifest import Manifest
from dla_cache.passes import Filled, OnProgress, OpenSource, Pass, ShouldStop, series_of, shards_of_pass
from dla_cache.pipeline import bottleneck_of
from dla_cache.progress import BuildProgress as BuildProgress
from dla_cache.progress import BuildReport as BuildReport
from dla_cache.quarantine import keep_reasons, put_aside, read_reasons
from dla_cache.remote import is_remote
from dla_cache.repair import changed_shards
from dla_cache.shares import NOTHING_BAD, Allowance
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore
from dla_cache.store.layout import IMAGES
from dla_cache.store.metadata import unchanged_rows
from dla_cache.store.mirror import files_at


def build_cache(
    manifest: Manifest,
    spec: CacheSpec,
    store_place: str | Path,
    *,
    open_source: OpenSource,
    device: str = "cpu",
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    repair: bool = False,
    append: bool = False,
    allow_bad: Allowance = NOTHING_BAD,
    synonyms: Synonyms | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> BuildReport:
    """Computes and commits all latents of this rank that are not committed yet, and the images if the spec says so.

    Args:
        open_source: what opens a source on a device; for several devices a function of a module.
        device: one, or several with a comma between them: then each has a process of its own.
        batch_size: images per call of a source, always; the last call of all is filled up with its last image. It
            changes a latent by no more than the source's `tolerance`, and stands in the commit records.
        repair: first reads every committed shard of this rank, and makes again those that are not
            what their records say. Without it they are only looked at: present, and of their size.
        append: adds the images of the manifest that the store has not; it must list all others as they are there.
        allow_bad: how many images of the store may have no latent. So many get a tombstone as removed images have,
            and the shards they kept back are computed without them.
        synonyms: of class names: captions that latents are made from are searched for both, and counted in the records.
        on_progress, should_stop: called after every batch; a build that is through is not interrupted any more.

    Raises:
        ManifestError: if a split of the spec has no image, or the spec names no split.
        CorruptShardError: if a committed shard of this rank has lost its file, unless `repair`.
        BadImagesError: if images are missing, changed, cannot be decoded, or the source makes no latent of them.
            All shards without such an image are committed by then.
        SourceError: if a source cannot be opened, fails, or puts out something that is no latent for a whole batch.
        StoreError: if the store cannot be written or was built from another spec, if a removal of images from it
            was not finished and this is no repair, or if images were removed while this ran.
        IncompleteBuildError: if a shard of this rank is missing at the end.
        WorkInterrupted: if `should_stop` said so.
        In every case what is committed stays, and the same call goes on from there.
    """
    started = time.monotonic()
    if spec.splits is not None:
        manifest = manifest.select(spec.splits)
    if not len(manifest):
        raise ManifestError("there is no image to build", hint="name splits in the spec, or leave `splits` out: all")
    if allow_bad.limit and is_remote(str(store_place)):
        raise StoreError(
            f"images cannot be left out of `{store_place}`, which is no folder",
            hint="build without an allowance, and mend or drop what it names; or build in a folder and copy that",
        )
    work = Pass(
        *(manifest, spec, store_place, batch_size, rank, world_size),
        repair=repair,
        append=append,
        synonyms=synonyms or {},
    )
    filled, left_out = Filled(), dict[str, str]()
    with files_at(store_place).naming():
        while True:
            store, now = fill_on_devices(
                work, device.split(","), open_source=open_source, on_progress=on_progress, should_stop=should_stop
            )
            filled = filled.merged(now)
            keep_reasons(store, now.bad, series_of(spec))
            if not now.bad:
                break
            _put_aside(store, now.bad, allow_bad)
            left_out |= now.bad
            work = replace(work, repair=False)  # what was damaged is taken out by now
        report = _report(store, work, filled, left_out, seconds=time.monotonic() - started)
        if report.content_hash is not None:
            write_card(store)
        with unchanged_rows(store.path, store.metadata):  # else the report speaks of what is no longer there
            return report


def _put_aside(store: LatentStore, bad: Mapping[str, str], allow_bad: Allowance) -> None:
    """Removes images that have no latent from a store, if so many may be.

    Raises:
        BadImagesError: if they may not.
    """
    before = store.rows.removed_ids & read_reasons(store).keys()
    if not allow_bad.covers(len(before) + len(bad), store.rows.n_kept + len(before)):
        n_before = f" beside {len(before)} that were left out before" if before and allow_bad is not NOTHING_BAD else ""
        raise bad_images(bad, f"all shards without such an image are committed{n_before}")
    put_aside(store, bad)


def _report(store: LatentStore, work: Pass, filled: Filled, left_out: Mapping[str, str], seconds: float) -> BuildReport:
    own = {shard.index for shard in shards_of_pass(store, work)}
    missing = {name: store.missing(name) for name in series_of(work.spec)}
    for name, shards in missing.items():
        if own.intersection(shards):
            store.require_complete([name])
    is_complete = not any(store.missing(modality) for modality in store.modalities)
    changed = changed_shards(store, filled.withdrawn)
    n_as_before = sum(
        store.committed(name)[shard].content_sum == before.content_sum
        for name, records in filled.withdrawn.items()
        for shard, before in records.items()
    )
    shards_repaired = sum(len(records) for records in filled.withdrawn.values())
    images_of = Counter[bool]()
    for name, shard in filled.committed:
        images_of[name == IMAGES] += len(store.kept_rows(store.shards[shard]))
    removed = store.rows.removed_ids - left_out.keys()
    busy = [times.busy for times in filled.times if times.busy is not None]
    return BuildReport(
        n_images=store.rows.n_kept,
        images_left_out=sum(image_id in removed for image_id in work.manifest.image_ids),
        images_encoded=images_of[False],
        images_stored=images_of[True],
        shards_committed=len(filled.committed),
        shards_repaired=shards_repaired,
        shards_changed=changed,
        shards_without_removed=shards_repaired - n_as_before - len(changed),
        shards_missing=sum(len(shards) for shards in missing.values()),
        seconds=seconds,
        content_hash=store.content_hash() if is_complete else None,
        put_aside=left_out,
        batch_sizes=filled.batch_sizes,
        device_busy=mean(busy) if busy else None,
        bottleneck=bottleneck_of(filled.times),
    )
