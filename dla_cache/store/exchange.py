"""From one store to another: the same rows in another layout, or in fewer bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dla_cache.durable import read_file, write_durably
from dla_cache.errors import CorruptShardError, SpecError, StoreError, WorkInterrupted
from dla_cache.shards import Shard, ShardPlan
from dla_cache.spec import Recipe
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import checked_latents, content_sum
from dla_cache.store.creation import check_agrees, check_is_new
from dla_cache.store.layout import IMAGES, payload_bytes, stored_dtype
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, find_layout, sole_writer
from dla_cache.store.mirror import files_at
from dla_cache.store.parts import ADOPTED
from dla_cache.store.precision import quantise, to_payloads
from dla_cache.verify import shard_problems

FloatDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""How continuous latents may lie on disk."""


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """What a conversion is to write."""

    metadata: StoreMetadata
    """Of the new store."""
    rounded: dict[str, tuple[str, str]]
    """Modality → dtype before and after, of those that are given fewer bits."""
    shards_missing: int
    """Of all series, not committed yet."""
    size_bytes: int
    """About, of payloads."""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did."""

    n_images: int
    """Of the store."""
    series: tuple[str, ...]
    shards_written: int
    """By this run."""
    content_hash: str
    """Of the new store."""
    source_content_hash: str
    """Of the old one: the same, unless numbers were rounded."""
    rounded: dict[str, tuple[str, str]]
    """Modality → dtype before and after, of those that were given fewer bits."""


def plan_conversion(
    source: LatentStore, target: Path, layout: str, *, dtypes: Mapping[str, FloatDtype] | None = None
) -> ConvertPlan:
    """What `convert_store` would write; nothing is written. Arguments, and errors before the first write, are its."""
    if target.resolve() == source.path.resolve():
        raise StoreError(f"`{target}` is the store to read", hint="name a new folder to write to")
    source.require_complete(source.series)
    before = source.metadata.recipes
    recipes = before | dict(_rounded_recipes(source, dtypes or {}))
    metadata = replace(source.metadata, layout=LAYOUTS[layout], recipes=recipes)
    size_bytes = sum(payload_bytes(recipe.format) for recipe in recipes.values()) * metadata.rows.n_kept
    if source.has_images:
        size_bytes += sum(record.size_bytes for record in source.committed(IMAGES).values())
    return ConvertPlan(
        metadata=metadata,
        rounded={
            name: (before[name].format.dtype, recipe.format.dtype)
            for name, recipe in recipes.items()
            if recipe != before[name]
        },
        shards_missing=count_missing(target, metadata),
        size_bytes=size_bytes,
    )


def count_missing(target: Path, wanted: StoreMetadata) -> int:
    """How many shards of a store that is to be, or to be gone on with, are not committed yet.

    Raises:
        RecipeMismatchError: if there is another store.
        StoreError: if the folder holds other things.
    """
    n_shards = len(ShardPlan(wanted.rows.spans, wanted.shard_size))
    if find_layout(files_at(target).path) is None:
        if target.is_dir():
            check_is_new(target, wanted.layout)
        return n_shards * len(wanted.series)
    begun = open_store(target)
    check_agrees(target, begun.metadata, wanted)
    return sum(len(begun.missing(name)) if name in begun.series else n_shards for name in wanted.series)


def convert_store(
    source: LatentStore,
    target: Path,
    layout: str,
    *,
    dtypes: Mapping[str, FloatDtype] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ConvertReport:
    """Writes all that a store holds to another one; run again, it goes on where it stopped.

    Every payload is read with its checks and goes through the same write as if it had been computed. Shards, image
    bytes, statistics and content hash are equal, and records keep what they say of the first computation. Latents that
    get fewer bits are another thing: they have another recipe, other statistics and another hash, and their records
    tell what was lost against the store that was read.

    Args:
        dtypes: modality → what its latents are to be on disk; those not named stay as they are. int8 spans for each
            channel the range of all images, so that nothing is cut off.
        on_progress: told after each shard how many of this run are written and how many there are.
        should_stop: asked between two shards.

    Raises:
        SpecError: if a dtype would lose something and save nothing.
        IncompleteBuildError: if a planned shard of the source is missing.
        CorruptShardError: if something in the source is damaged, or the target has shards from elsewhere.
        RecipeMismatchError: if the target holds other things than the source, or has another layout.
        StoreError: if the target cannot be written, or is the source.
        WorkInterrupted: if `should_stop` said so.
    """
    plan = plan_conversion(source, target, layout, dtypes=dtypes)
    metadata = plan.metadata
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
    for name in plan.rounded:
        _check_rounded(source, written, name)
    for series, shard in one_by_one(todo, target, on_progress, should_stop):
        copy_shard(source, written, series, shard)
    for series in source.series:
        written.consolidate(series)
        if series not in plan.rounded:
            check_equal(source, written, series)
    _copy_adoptions(source, written)
    return ConvertReport(
        n_images=written.rows.n_kept,
        series=source.series,
        shards_written=len(todo),
        content_hash=written.content_hash(),
        source_content_hash=source.content_hash(),
        rounded=plan.rounded,
    )


def one_by_one(
    todo: Sequence[tuple[str, Shard]],
    target: Path,
    on_progress: Callable[[int, int], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Iterator[tuple[str, Shard]]:
    """The shards that are to be written to a store; after each its progress is told, and whether to go on is asked.

    Raises:
        WorkInterrupted: if `should_stop` said so between two of them.
    """
    for done, unit in enumerate(todo, start=1):
        yield unit
        if on_progress is not None:
            on_progress(done, len(todo))
        if should_stop is not None and done < len(todo) and should_stop():
            raise WorkInterrupted(
                f"interrupted: {done} of {len(todo)} shards are written to `{target}`",
                hint="run the same command again; it goes on from there",
            )


def _copy_adoptions(source: LatentStore, target: LatentStore) -> None:
    """What was declared harmless of the source is so of the same recipes elsewhere."""
    if (source.path / ADOPTED).is_file() and not (target.path / ADOPTED).is_file():
        with sole_writer(target.path, target.metadata):
            write_durably(target.path / ADOPTED, read_file(source.path / ADOPTED))


def _rounded_recipes(source: LatentStore, dtypes: Mapping[str, FloatDtype]) -> Iterator[tuple[str, Recipe]]:
    """The recipes of the modalities that are to get another dtype than they have."""
    for modality, dtype in dtypes.items():
        recipe = source.recipe(modality)
        latent = recipe.format
        if latent.dtype == dtype:
            continue
        if latent.kind == "codes":
            raise SpecError(
                f"`{modality}` holds codes, which lie in the smallest integer that holds them, `{latent.dtype}`",
                hint=f"name modalities of real numbers: `--dtype MODALITY={dtype}`",
            )
        quantisation = None
        if dtype == "int8":
            splits = sorted(source.rows.splits)
            if not splits:
                raise SpecError(f"`{source.path}` holds no image, so `{modality}` has no range", hint="leave out int8")
            ranges = source.statistics(modality, splits)
            try:
                quantisation = quantise(ranges.minimum, ranges.maximum)
            except ValueError as error:
                raise SpecError(
                    f"`{modality}` has a channel that is too wide for int8: from {ranges.minimum.min():.4g}"
                    f" to {ranges.maximum.max():.4g}",
                    hint="take `bfloat16`",
                ) from error
        fields = {"dtype": dtype, "quantisation": quantisation, "rounded_from": (*latent.rounded_from, latent.dtype)}
        smaller = latent.model_copy(update=fields)
        if stored_dtype(smaller).itemsize >= stored_dtype(latent).itemsize:
            raise SpecError(
                f"`{modality}` lies there as `{latent.dtype}`: `{dtype}` would save nothing and bring nothing back",
                hint=f"leave it out, or build the store again with `dtype: {dtype}`"
                if dtype != "int8"
                else "leave it out",
            )
        yield modality, recipe.model_copy(update={"format": smaller})


def copy_shard(source: LatentStore, target: LatentStore, series: str, shard: Shard) -> None:
    """Writes a shard of one store to another, with what its record says of the first computation.

    Raises:
        CorruptShardError: if it is damaged.
    """
    record = _checked_record(source, series, shard)
    rows = source.kept_rows(shard)
    if series == IMAGES:
        target.write_images(shard, source.read_images(rows), seconds=record.seconds)
    else:
        latents = source.read(series, rows)
        target.write_shard(
            series,
            shard,
            latents,
            seconds=record.seconds,
            device=record.device,
            error=record.error,
            made_with=record.made_with,
            audit=record.audit,
        )


def _checked_record(source: LatentStore, series: str, shard: Shard) -> CommitRecord:
    """The record of a shard that lies there as it says.

    Raises:
        CorruptShardError: if it does not.
    """
    record = source.committed(series)[shard.index]
    for problem in shard_problems(source, series, shard, record):
        raise CorruptShardError(
            f"{problem.where} of `{source.path}` is damaged: {problem.what}",
            hint="restore it from a copy, or run its `dla cache build` with `--repair`",
        )
    return record


def _check_rounded(source: LatentStore, target: LatentStore, modality: str) -> None:
    """Passes if the shards that the target has already are those of the source, rounded.

    Raises:
        CorruptShardError: naming the first that is not.
    """
    latent = target.recipe(modality).format
    for index, record in target.committed(modality).items():
        shard = source.shards[index]
        _checked_record(source, modality, shard)
        image_ids = source.rows.kept_ids_of(shard)
        stored = checked_latents(source.read(modality, source.kept_rows(shard)), latent, image_ids)
        if f"{content_sum(image_ids, to_payloads(stored)):064x}" != record.content_sum:
            raise _from_elsewhere(source, target, modality, index)


def check_equal(source: LatentStore, target: LatentStore, series: str) -> None:
    """Passes if the records of both stores vouch for the same content.

    Raises:
        CorruptShardError: naming the first shard of which they do not.
    """
    before, after = source.committed(series), target.committed(series)
    for shard in source.shards:
        one, two = before[shard.index], after[shard.index]
        if (one.content_sum, one.statistics) != (two.content_sum, two.statistics):
            raise _from_elsewhere(source, target, series, shard.index)


def _from_elsewhere(source: LatentStore, target: LatentStore, series: str, shard: int) -> CorruptShardError:
    return CorruptShardError(
        f"shard {shard} of `{series}` in `{target.path}` does not hold what its record in `{source.path}` says",
        hint=f"the latents in `{target.path}` come from another build: name a new folder",
    )
