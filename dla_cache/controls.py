"""Control stores: latents that know less than the real ones, or nothing but a label, composed of stores that are there.

A gain that stays with them does not come from what a generator knows of the image. Images, rows, splits, labels,
formats and shapes are those of the real store, so that a trainer notices nothing; the recipe tells, and is another.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dla_cache.card import write_card
from dla_cache.control_composers import ClassVectors, Composer, Fabricated, Noise, Shuffle
from dla_cache.control_recipe import MEANINGS, Kind, control_recipe
from dla_cache.errors import SpecError, StoreError, name_some
from dla_cache.store import LatentStore, create_store
from dla_cache.store.exchange import check_equal, copy_shard, count_missing, one_by_one
from dla_cache.store.layout import payload_bytes
from dla_cache.store.metadata import StoreMetadata, has_rows_of, read_metadata

USED_BY: dict[str, tuple[Kind, ...]] = {
    "labels": ("shuffled-within-class", "shuffled-across-classes", "label-embedding"),
    "noise": ("label-embedding",),
    "features": ("fabricated",),
    "series": ("fabricated",),
}
"""What some kinds alone have a use for."""


@dataclass(frozen=True, slots=True)
class ControlPlan:
    """What a control store is to be."""

    kind: Kind
    metadata: StoreMetadata
    """Of the new store."""
    modalities: tuple[str, ...]
    """That are composed; all others are copied."""
    composer: Composer
    shards_missing: int
    """Of all series, not committed yet."""
    size_bytes: int
    """About, of latents."""

    @property
    def n_own(self) -> int | None:
        """Of a shuffle: images that keep their own latent, for there is no other to give."""
        return self.composer.n_own if isinstance(self.composer, Shuffle) else None

    @property
    def n_same_class(self) -> int | None:
        """Of a shuffle that goes by classes: images that get, or keep, a latent of their own."""
        return self.composer.n_same_class if isinstance(self.composer, Shuffle) else None


@dataclass(frozen=True, slots=True)
class ControlReport:
    """What was done."""

    plan: ControlPlan
    shards_written: int
    """By this run."""
    content_hash: str
    """Of the new store."""


def plan_control(
    source: LatentStore,
    out: Path,
    *,
    kind: Kind,
    seed: int = 0,
    modalities: Sequence[str] | None = None,
    labels: Path | None = None,
    noise: float | None = None,
    features: LatentStore | None = None,
    series: str | None = None,
) -> ControlPlan:
    """What `control_store` would write; nothing is written. Arguments, and errors before the first write, are its."""
    if out.resolve() == source.path.resolve():
        raise StoreError(f"`{out}` is the store to read", hint="name a new folder to write to")
    if kind not in MEANINGS:  # as from a file that nobody has checked
        raise SpecError(f"there is no control `{kind}`", hint=f"kinds: {', '.join(MEANINGS)}")
    for name, value in {"labels": labels, "noise": noise, "features": features, "series": series}.items():
        if value is not None and kind not in USED_BY[name]:
            used = ", ".join(f"`{one}`" for one in USED_BY[name])
            raise SpecError(f"`{kind}` has no use for `{name}`", hint=f"leave it out: it is for {used}")
    source.require_complete(source.series)
    if not source.rows.n_kept:
        raise SpecError(f"`{source.place}` holds no image", hint="name the store of the real latents")
    chosen = tuple(sorted(set(source.modalities if modalities is None else modalities)))
    if not chosen:
        raise SpecError(f"no modality of `{source.place}` is named", hint=f"it has {name_some(source.modalities)}")
    real = {name: source.recipe(name) for name in chosen}
    composer: Composer
    if kind.startswith("shuffled"):
        composer = Shuffle(source, kind, seed, labels)
    elif kind == "label-embedding":
        composer = ClassVectors(source, kind, seed, labels, noise or 0.0)
    elif kind == "fabricated":
        if features is None:
            raise SpecError(f"`{kind}` is made of another model's features", hint="name their store: --features STORE")
        composer = Fabricated(source, kind, seed, chosen, features, series)
    else:
        composer = Noise(source, kind, seed, chosen)
    made_of = {name: {"real_content": source.content_hash([name]), **composer.facts} for name in chosen}
    controls = {name: control_recipe(real[name], kind, seed=seed, made_of=made_of[name]) for name in chosen}
    recipes = source.metadata.recipes | controls
    metadata = replace(source.metadata, recipes=recipes)
    return ControlPlan(
        kind,
        metadata,
        chosen,
        composer,
        shards_missing=count_missing(out, metadata),
        size_bytes=sum(payload_bytes(recipe.format) for recipe in recipes.values()) * source.rows.n_kept,
    )


def control_store(
    source: LatentStore,
    out: Path,
    *,
    kind: Kind,
    seed: int = 0,
    modalities: Sequence[str] | None = None,
    labels: Path | None = None,
    noise: float | None = None,
    features: LatentStore | None = None,
    series: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ControlReport:
    """Writes a store of control latents beside a real one; run again, it goes on where it stopped.

    What an image gets depends on the seed, the images and the real latents, never on how they are cut into shards.
    The recipe names kind, seed and the content hashes of all that went in.

    Args:
        modalities: to compose, all when None; the others are copied as they are. A shuffle moves the latents of all
            of them together, so that pairs stay pairs.
        labels: table of `image_id` and `label`, for splits that have none in the store.
        noise: of `label-embedding`, in [0, 1], 0 when None: the share of the variance that is noise, of codes the
            share that is drawn anew.
        features: of `fabricated`: a store with another model's features of every image.
        series: which of its series; the pooled features of view 0, or its only one, when None.
        on_progress: told after each shard how many of this run are written and how many there are.
        should_stop: asked between two shards.

    Raises:
        SpecError: if the kind makes no sense of this store, or is given what it has no use for.
        ManifestError: if the table of labels is none.
        IncompleteBuildError: if a planned shard of the source is missing.
        MissingLatentError: if there is no such modality, or no features of an image.
        CorruptShardError: if something in a store is damaged.
        RecipeMismatchError: if the target holds other things.
        StoreError: if the target cannot be written, is the source, or images were removed meanwhile.
        WorkInterrupted: if `should_stop` said so.
    """
    plan = plan_control(
        source,
        out,
        kind=kind,
        seed=seed,
        modalities=modalities,
        labels=labels,
        noise=noise,
        features=features,
        series=series,
    )
    new = plan.metadata
    written = create_store(
        out, new.rows, new.class_names, new.shard_size, new.recipes, layout=new.layout.name, images=new.images
    )
    todo = [(name, source.shards[shard]) for name in source.series for shard in written.missing(name)]
    makers = {name: plan.composer.maker(name) for name in plan.modalities if name in dict(todo)}
    for name, shard in one_by_one(todo, out, on_progress, should_stop):
        if name in makers:
            began = time.monotonic()
            latents = makers[name](source.kept_rows(shard))
            seconds, made_with = time.monotonic() - began, {"numpy": np.__version__}
            written.write_shard(name, shard, latents, seconds=seconds, device="cpu", made_with=made_with)
        else:
            copy_shard(source, written, name, shard)
    if not has_rows_of(source.path, source.metadata, read_metadata(source.path).rows_sha256):
        raise StoreError(
            f"images were removed from `{source.place}` meanwhile, and `{out}` may hold their latents under other IDs",
            hint="remove it with `dla cache rm`, and run the same command again",
        )
    for name in source.series:
        written.consolidate(name)
        if name not in plan.modalities:
            check_equal(source, written, name)
    write_card(written)
    return ControlReport(plan, len(todo), written.content_hash())
