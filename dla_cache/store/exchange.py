"""From one store to another: the same rows in another layout, or in fewer bits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dla_cache.durable import read_file, write_durably
from dla_cache.errors import CorruptShardError, SpecError, StoreError, WorkInterrupted
from dla_cache.shards import Shard
from dla_cache.spec import Recipe
from dla_cache.store import LatentStore, create_store
from dla_cache.store.commits import CommitRecord
from dla_cache.store.content import checked_latents, content_sum
from dla_cache.store.layout import IMAGES, stored_dtype
from dla_cache.store.metadata import sole_writer
from dla_cache.store.parts import ADOPTED
from dla_cache.store.precision import quantise, to_payloads
from dla_cache.verify import shard_problems

FloatDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""How continuous latents may lie on disk."""


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
    if target.resolve() == source.path.resolve():
        raise StoreError(f"`{target}` is the store to read", hint="name a new folder to write to")
    source.require_complete(source.series)
    metadata = source.metadata
    recipes = metadata.recipes | dict(_rounded_recipes(source, dtypes or {}))
    rounded = {name: recipe for name, recipe in recipes.items() if recipe != metadata.recipes[name]}
    written = create_store(
        target,
        metadata.rows,
        metadata.class_names,
        metadata.shard_size,
        recipes,
        layout=layout,
        images=metadata.images,
    )
    todo = [(series, source.shards[shard]) for series in source.series for shard in written.missing(series)]
    for name in rounded:
        _check_rounded(source, written, name)
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
        if series not in rounded:
            _check_equal(source, written, series)
    _copy_adoptions(source, written)
    return ConvertReport(
        n_images=written.rows.n_kept,
        series=source.series,
        shards_written=len(todo),
        content_hash=written.content_hash(),
        source_content_hash=source.content_hash(),
        rounded={name: (metadata.recipes[name].format.dtype, recipe.format.dtype) for name, recipe in rounded.items()},
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


def _copy_shard(source: LatentStore, target: LatentStore, series: str, shard: Shard) -> None:
    record = _checked_record(source, series, shard)
    rows = source.kept_rows(shard)
    if series == IMAGES:
        target.write_images(shard, source.read_images(rows), seconds=record.seconds)
    else:
        latents = source.read(series, rows)
        target.write_shard(series, shard, latents, seconds=record.seconds, device=record.device, error=record.error)


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


def _check_equal(source: LatentStore, target: LatentStore, series: str) -> None:
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
