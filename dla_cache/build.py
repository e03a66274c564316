"""Filling a store: for every shard that no record vouches for, decode → encode → write → commit.

Running it again is how to resume. Nothing here knows how many processes build the store: each
takes the shards of its rank, and whatever is committed is skipped. So are images that were removed
from the store: the manifest may list them still or no longer, they do not come back.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from dla_cache.card import write_card
from dla_cache.errors import ManifestError, WorkInterrupted
from dla_cache.images import Pixels, centre_square, decode_image, read_image_bytes
from dla_cache.manifest import Manifest, path_of
from dla_cache.repair import changed_shards, require_shards, withdraw_damaged
from dla_cache.shards import Shard, shards_of_rank
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import LatentStore, create_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import checked_latents
from dla_cache.store.creation import stored_rows, with_removed
from dla_cache.store.files import Turns
from dla_cache.store.layout import IMAGES
from dla_cache.store.metadata import refuse_unfinished_removal, unchanged_rows
from dla_cache.store.mirror import files_at
from dla_cache.store.rows import RowTable, StoredImage
from dla_cache.stored_images import encode_image, image_recipe

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource

DECODE_THREADS = 4
BATCHES_AHEAD = 4
"""Batches that are decoded while one is encoded; they run on into the next shard."""

T = TypeVar("T")

LOOSE_RECORDS = 1000
"""Commit records are consolidated once so many lie about as single files."""


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Where a build is. Images count once a series, and only those that this run computes or stores."""

    modality: str
    """Or `images`."""
    shard: int
    n_shards: int
    """Of the whole store."""
    images_done: int
    images_total: int
    is_waiting: bool = False
    """Whether the shard is one that another builder has claimed."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did."""

    n_images: int
    """Images of the store, without those that were removed."""
    images_left_out: int
    """That the manifest lists and that were removed from the store before."""
    images_encoded: int
    """Computed and committed by this run, counted once a modality; not those that another process committed first."""
    images_stored: int
    """Whose own bytes this run committed."""
    shards_committed: int
    """By this run."""
    shards_repaired: int
    """Taken out of the store for being damaged, and made again."""
    shards_changed: tuple[str, ...]
    """Those of them with another content than before, as `depth, shard 3`: the source is not deterministic."""
    shards_without_removed: int
    """Those of them from which images were being removed: by now they are without these."""
    shards_missing: int
    """Of other ranks, not committed yet."""
    seconds: float
    content_hash: str | None
    """None while shards of a modality are missing."""

    @property
    def images_per_s(self) -> float:
        return self.images_encoded / self.seconds if self.seconds else 0.0


def build_cache(
    manifest: Manifest,
    spec: CacheSpec,
    store_place: str | Path,
    *,
    open_source: Callable[[LatentSpec, str], "LatentSource"],
    device: str = "cpu",
    batch_size: int = 64,
    rank: int = 0,
    world_size: int = 1,
    repair: bool = False,
    append: bool = False,
    on_progress: Callable[[BuildProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> BuildReport:
    """Computes and commits all latents of this rank that are not committed yet, and the images if the spec says so.

    Args:
        batch_size: images per call of a source, fewer at the end of a shard; it changes no latent.
        repair: first reads every committed shard of this rank, and makes again those that are not
            what their records say. Without it they are only looked at: present, and of their size.
        append: adds the images of the manifest that the store has not; it must list all others as they are there.
        should_stop: asked between two batches; a build that is through is not interrupted any more.

    Raises:
        ManifestError: if a split of the spec has no image, or the spec names no split.
        CorruptShardError: if a committed shard of this rank has lost its file, unless `repair`.
        ImageError: if an image is missing, changed or cannot be decoded.
        SourceError: if a source cannot be opened or puts out something that is no latent.
        StoreError: if the store cannot be written or was built from another spec, if a removal of images from it
            was not finished and this is no repair, or if images were removed while this ran.
        IncompleteBuildError: if a shard of this rank is missing at the end.
        WorkInterrupted: if `should_stop` said so.
        In every case what is committed stays, and the same call goes on from there.
    """
    started = time.monotonic()
    files = files_at(store_place)
    if spec.splits is not None:
        manifest = manifest.select(spec.splits)
    if not len(manifest):
        raise ManifestError("there is no image to build", hint="name splits in the spec, or leave `splits` out: all")
    with ExitStack() as stack:
        stack.enter_context(files.naming())
        files.refresh()
        sources = [stack.enter_context(closing(open_source(entry, device))) for entry in spec.latents]
        recipes = {source.recipe.modality.value: source.recipe for source in sources}
        store = create_store(
            store_place,
            with_removed(stored_rows(files.path), RowTable.from_manifest(manifest)),
            manifest.class_names,
            spec.shard_size,
            recipes,
            layout=spec.layout,
            images=image_recipe(spec),
            append=append,
        )
        if not repair:  # a repair is the way out where the removal met a damaged shard
            refuse_unfinished_removal(store.path)
        series = [*recipes, *([IMAGES] if spec.images != "none" else [])]
        mine = shards_of_rank(store.shards, rank, world_size)
        withdrawn = _withdraw(store, series, mine, should_stop) if repair else {}
        for name in series:
            require_shards(store, name, mine)
        todo = {name: _uncommitted(store, name, mine) for name in series}
        turns = stack.enter_context(files.turns(lambda name, shard: shard in store.committed(name)))
        fills = {
            source.recipe.modality.value: _in_turns(
                store,
                source.recipe.modality.value,
                todo[source.recipe.modality.value],
                partial(_fill_modality, store, manifest.root, source, batch_size=batch_size, device=device),
                turns,
            )
            for source in sources
        }
        if IMAGES in todo:
            fill_images = partial(_fill_images, store, manifest.root)
            fills[IMAGES] = _in_turns(store, IMAGES, todo[IMAGES], fill_images, turns)
        committed: list[tuple[str, Shard]] = []
        images_total = sum(len(store.kept_rows(shard)) for shards in todo.values() for shard in shards)
        images_done = 0
        for name, fill in fills.items():
            for shard, n_images, is_ours in stack.enter_context(closing(fill)):
                images_done += n_images
                if is_ours:
                    committed.append((name, shard))
                if on_progress is not None:
                    is_waiting = not (n_images or is_ours)
                    at = BuildProgress(name, shard.index, len(store.shards), images_done, images_total, is_waiting)
                    on_progress(at)
                if should_stop is not None and images_done < images_total and should_stop():
                    raise _interrupted(store, series)
    for name in series:
        store.consolidate(name)
    listed = manifest.image_ids
    report = _report(store, listed, series, mine, committed, withdrawn, seconds=time.monotonic() - started)
    if report.content_hash is not None:
        write_card(store)
    with unchanged_rows(store.path, store.metadata):  # else the report speaks of what is no longer there
        return report


def _withdraw(
    store: LatentStore, series: Collection[str], shards: Sequence[Shard], should_stop: Callable[[], bool] | None
) -> dict[str, dict[int, CommitRecord]]:
    def stop_if_asked(_shard: Shard) -> None:
        if should_stop is not None and should_stop():
            raise _interrupted(store, series)

    return {name: withdraw_damaged(store, name, shards, stop_if_asked) for name in series}


def _uncommitted(store: LatentStore, series: str, shards: Sequence[Shard]) -> list[Shard]:
    committed = store.committed(series)
    return [shard for shard in shards if shard.index not in committed]


Filling = Generator[tuple[Shard, int, bool], None, None]
"""Yields after every batch its shard, its images, and if they made us commit it."""


def _in_turns(
    store: LatentStore,
    series: str,
    shards: Sequence[Shard],
    fill: Callable[[Iterator[Shard]], Filling],
    turns: Turns,
) -> Filling:
    """Fills shards as they are this process's turn, until all are committed; those of other builders count as done.

    While it waits for others it yields such a shard and no image.
    """
    filled, left = set(), shards
    while left:
        with closing(fill(turns.take(series, left))) as filling:
            for shard, n_images, is_ours in filling:
                filled.add(shard)
                if is_ours:
                    turns.release(series, shard.index)
                yield shard, n_images, is_ours
        left = turns.left(series)
        if left:
            yield left[0], 0, False
    for shard in shards:
        if shard not in filled:
            yield shard, len(store.kept_rows(shard)), False


def _fill_modality(
    store: LatentStore,
    image_root: Path,
    source: "LatentSource",
    shards: Iterator[Shard],
    *,
    batch_size: int,
    device: str,
) -> Filling:
    """Encodes and commits shards."""
    recipe = source.recipe
    modality = recipe.modality.value
    # One after the other, because a shard is taken when its first batch is asked for.
    batches, to_decode = tee(batch for shard in shards for batch in _batches_of(store, shard, batch_size))
    latents: list[NDArray[np.generic]] = []
    shard_started = time.monotonic()
    views = _decoded(image_root, (images for _, images, _ in to_decode), recipe.source_view_size)
    with closing(views) as decoded:
        for (shard, images, is_last), pixels in zip(batches, decoded, strict=True):
            latents.append(encode_batch(source, images, pixels))
            is_ours = False
            if is_last:
                seconds = time.monotonic() - shard_started
                is_ours = store.write_shard(modality, shard, np.concatenate(latents), seconds=seconds, device=device)
                store.consolidate(modality, at_least=LOOSE_RECORDS)
                latents = []
                shard_started = time.monotonic()
            yield shard, len(images), is_ours


def _batches_of(
    store: LatentStore, shard: Shard, batch_size: int
) -> Iterator[tuple[Shard, Sequence[StoredImage], bool]]:
    """The images of a shard that were not removed, and whether they are its last: one empty batch if there are none."""
    kept = store.rows.images_of(store.kept_rows(shard))
    for start in range(0, max(len(kept), 1), batch_size):
        yield shard, kept[start : start + batch_size], start + batch_size >= len(kept)


def _fill_images(store: LatentStore, image_root: Path, shards: Iterator[Shard]) -> Filling:
    """Commits the images as the store is to hold them, `original` undecoded."""
    recipe = store.metadata.images
    assert recipe is not None

    def read(image: StoredImage) -> bytes:
        return encode_image(read_image_bytes(path_of(image_root, image.uri), image), image.image_id, recipe)

    for shard in shards:
        started = time.monotonic()
        images = store.rows.images_of(store.kept_rows(shard))
        with closing(_ahead(read, [images])) as batches:
            contents = [content for batch in batches for content in batch]
        is_ours = store.write_images(shard, contents, seconds=time.monotonic() - started)
        store.consolidate(IMAGES, at_least=LOOSE_RECORDS)
        yield shard, len(images), is_ours


def _decoded(
    image_root: Path, batches: Iterable[Sequence[StoredImage]], size: int
) -> Generator[list[Pixels], None, None]:
    """The source view of every image, batch by batch."""

    def decode(image: StoredImage) -> Pixels:
        content = read_image_bytes(path_of(image_root, image.uri), image)
        return centre_square(decode_image(content, image.image_id), size)

    return _ahead(decode, batches)


def _ahead(
    make: Callable[[StoredImage], T], batches: Iterable[Sequence[StoredImage]]
) -> Generator[list[T], None, None]:
    """What `make` makes of every image, batch by batch, made ahead by threads."""
    ahead: deque[list[Future[T]]] = deque()
    pool = ThreadPoolExecutor(DECODE_THREADS, thread_name_prefix="decode")
    try:
        for batch in batches:
            ahead.append([pool.submit(make, image) for image in batch])
            if len(ahead) > BATCHES_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(
    source: "LatentSource", images: Sequence[StoredImage], pixels: Sequence[Pixels]
) -> NDArray[np.generic]:
    """Checked raw latents of one batch, [len(images), *shape], in the precision in which the source put them out."""
    recipe = source.recipe
    if not images:
        return np.empty((0, *recipe.format.shape), recipe.format.read_dtype)
    image_ids = [image.image_id for image in images]
    seeds = [sample_seed(recipe.seed, recipe.modality.value, image_id) for image_id in image_ids]
    latents = source.encode(np.stack(pixels), seeds)
    checked_latents(latents, recipe.format, image_ids)  # a fault is told here, by the batch
    return latents.copy()  # a source may use its memory again


def _interrupted(store: LatentStore, series: Collection[str]) -> WorkInterrupted:
    committed = sum(len(store.committed(name)) for name in series)
    planned = len(store.shards) * len(series)
    return WorkInterrupted(
        f"interrupted: {committed} of {planned} shards of `{store.place}` are committed",
        hint="run the same command again; it goes on from there",
    )


def _report(
    store: LatentStore,
    listed: Sequence[str],
    series: Collection[str],
    mine: Sequence[Shard],
    committed: Sequence[tuple[str, Shard]],
    withdrawn: Mapping[str, Mapping[int, CommitRecord]],
    seconds: float,
) -> BuildReport:
    own = {shard.index for shard in mine}
    missing = {name: store.missing(name) for name in series}
    for name, shards in missing.items():
        if own.intersection(shards):
            store.require_complete([name])
    is_complete = not any(store.missing(modality) for modality in store.modalities)
    changed = changed_shards(store, withdrawn)
    n_as_before = sum(
        store.committed(name)[shard].content_sum == before.content_sum
        for name, records in withdrawn.items()
        for shard, before in records.items()
    )
    shards_repaired = sum(len(records) for records in withdrawn.values())
    return BuildReport(
        n_images=store.rows.n_kept,
        images_left_out=sum(image_id in store.rows.removed_ids for image_id in listed),
        images_encoded=sum(len(store.kept_rows(shard)) for name, shard in committed if name != IMAGES),
        images_stored=sum(len(store.kept_rows(shard)) for name, shard in committed if name == IMAGES),
        shards_committed=len(committed),
        shards_repaired=shards_repaired,
        shards_changed=changed,
        shards_without_removed=shards_repaired - n_as_before - len(changed),
        shards_missing=sum(len(shards) for shards in missing.values()),
        seconds=seconds,
        content_hash=store.content_hash() if is_complete else None,
    )
