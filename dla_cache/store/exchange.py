"""From one store to another: the same rows, recipes and payloads in another layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dla_cache.errors import CorruptShardError, StoreError, WorkInterrupted
from dla_cache.shards import Shard
from dla_cache.store import LatentStore, create_store
from dla_cache.store.layout import IMAGES
from dla_cache.verify import shard_problems


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did."""

    n_images: int
    """Of the store."""
    series: tuple[str, ...]
    shards_written: int
    """By this run."""
    content_hash: str
    """Of both stores."""


def convert_store(
    source: LatentStore,
    target: Path,
    layout: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ConvertReport:
    """Writes all that a store holds to another one; run again, it goes on where it stopped.

    Every payload is read with its checks and goes through the same write as if it had been computed; shards, image
    bytes, statistics and content hash are equal, and records keep what they say of the first computation.

    Args:
        on_progress: told after each shard how many of this run are written and how many there are.
        should_stop: asked between two shards.

    Raises:
        IncompleteBuildError: if a planned shard of the source is missing.
        CorruptShardError: if something in the source is damaged, or the target has shards from elsewhere.
        RecipeMismatchError: if the target holds other things than the source, or has another layout.
        StoreError: if the target cannot be written, or is the source.
        WorkInterrupted: if `should_stop` said so.
    """
    if target.resolve() == source.path.resolve():
        raise StoreError(f"`{target}` is the store to read", hint="name a new folder to write to")
    source.require_complete(source.series)
    metadata = source.metadata
    written = create_store(
        target,
        metadata.rows,
        metadata.class_names,
        metadata.shard_size,
        metadata.recipes,
        layout=layout,
        images=metadata.images,
    )
    todo = [(series, source.shards[shard]) for series in source.series for shard in written.missing(series)]
    for done, (series, shard) in enumerate(todo, start=1):
        _copy_shard(source, written, series, shard)
        if on_progress is not None:
            on_progress(done, len(todo))
        if should_stop is not None and done < len(todo) and should_stop():
            raise WorkInterrupted(
                f"interrupted: {done} of {len(todo)} shards are written to `{target}`",
                hint="run the same command again; it goes on from there",
            )
    for series in source.series:
        written.consolidate(series)
        _check_equal(source, written, series)
    return ConvertReport(len(written.rows.kept_ids), source.series, len(todo), written.content_hash())


def _copy_shard(source: LatentStore, target: LatentStore, series: str, shard: Shard) -> None:
    record = source.committed(series)[shard.index]
    for problem in shard_problems(source, series, shard, record):
        raise CorruptShardError(
            f"{problem.where} of `{source.path}` is damaged: {problem.what}",
            hint="restore it from a copy, or run its `dla cache build` with `--repair`",
        )
    rows = source.kept_rows(shard)
    if series == IMAGES:
        target.write_images(shard, source.read_images(rows), seconds=record.seconds)
    else:
        latents = source.read(series, rows)
        target.write_shard(series, shard, latents, seconds=record.seconds, device=record.device)


def _check_equal(source: LatentStore, target: LatentStore, series: str) -> None:
    """Passes if the records of both stores vouch for the same content.

    Raises:
        CorruptShardError: naming the first shard of which they do not.
    """
    before, after = source.committed(series), target.committed(series)
    for shard in source.shards:
        one, two = before[shard.index], after[shard.index]
        if (one.content_sum, one.statistics) != (two.content_sum, two.statistics):
            raise CorruptShardError(
                f"shard {shard.index} of `{series}` in `{target.path}` does not hold what its record in"
                f" `{source.path}` says",
                hint=f"the latents in `{target.path}` come from another build: name a new folder",
            )
