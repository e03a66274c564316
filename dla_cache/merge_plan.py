"""What a merge of stores would make, and whether it can be: nothing here writes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import MissingLatentError, SpecError, StoreError, name_some
from dla_cache.joined import ABSENT, JoinedStore
from dla_cache.shards import ShardPlan
from dla_cache.spec import LARGEST_SHARD, ImageRecipe
from dla_cache.store import LatentStore
from dla_cache.store.creation import stored_rows, with_removed
from dla_cache.store.exchange import count_missing
from dla_cache.store.layout import IMAGES, payload_bytes
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, refuse_unfinished_removal
from dla_cache.store.rows import RowTable


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge is to write and what it leaves out."""

    stores: tuple[LatentStore, ...]
    metadata: StoreMetadata
    """Of the new store."""
    n_known: int
    """Images of all stores together that were removed from none."""
    coverage: dict[str, int]
    """Modality → how many of these have it."""
    shards_missing: int
    """Of all series, not committed yet."""
    size_bytes: int
    """About, of payloads: the images' is reckoned from the shards they lie in."""
    left_out: tuple[str, ...]
    """What, and why."""

    @property
    def n_images(self) -> int:
        """Of the new store."""
        return self.metadata.rows.n_kept

    @property
    def shards(self) -> ShardPlan:
        """Those of each series."""
        return ShardPlan(self.metadata.rows.spans, self.metadata.shard_size)

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "layout": self.metadata.layout.name,
            "shard_size": self.metadata.shard_size,
            "series": list(self.metadata.series),
            "n_images": self.n_images,
            "n_known": self.n_known,
            "coverage": self.coverage,
            "shards": len(self.shards) * len(self.metadata.series),
            "shards_missing": self.shards_missing,
            "size_bytes": self.size_bytes,
            "left_out": list(self.left_out),
        }


def plan_merge(
    stores: Sequence[LatentStore],
    target: Path,
    *,
    layout: str | None = None,
    shard_size: int | None = None,
    missing: Literal["error", "skip"] = "error",
    with_images: bool = False,
) -> MergePlan:
    """What `merge_stores` would do; nothing is written.

    Args:
        layout, shard_size: of the new store; those of the first one when None.
        missing: whether an image without a latent of every modality is refused or left out.
        with_images: refuses stores whose images cannot be merged, where they would be left out.

    Raises:
        MissingLatentError: if an image lacks a modality and `missing` is `error`, or images are asked for and not
            there.
        RecipeMismatchError: if a modality has two recipes, an image two contents, labels or splits, the class maps
            differ, or the target holds another thing.
        IncompleteBuildError: if a planned shard of a store is missing.
        SpecError: if there can be no shards of that size.
        StoreError: if the target is one of the stores or lies in one, or holds other things; if images are being
            removed from a store; if no image is left.
    """
    _check_places(stores, target)
    joined = JoinedStore(stores, missing="null")
    size = joined.shard_size if shard_size is None else shard_size
    if not 0 < size <= LARGEST_SHARD:
        raise SpecError(f"there are no shards of {size:,} images", hint=f"take 1 to {LARGEST_SHARD:,}")
    present = {name: joined.present(name, np.arange(len(joined.rows))) for name in joined.modalities}
    lacking = {name: joined.rows.ids_of(np.flatnonzero(~there)) for name, there in present.items()}
    is_whole = np.logical_and.reduce(list(present.values()))
    _check_lacking(len(is_whole), int(is_whole.sum()), lacking, missing)
    whole = [image for image, chosen in zip(joined.rows, is_whole.tolist(), strict=True) if chosen]
    rows = RowTable(
        [replace(image, row=row) for row, image in enumerate(whole)], is_multi_label=joined.rows.is_multi_label
    )
    images, why_no_images = _image_recipe(stores, rows)
    if with_images and images is None:
        raise MissingLatentError(f"the images cannot be merged: {why_no_images}", hint="merge the latents alone")
    metadata = StoreMetadata(
        layout=LAYOUTS[layout or stores[0].layout_name],
        rows=with_removed(stored_rows(target), rows),
        class_names=joined.class_names,
        shard_size=size,
        recipes={name: joined.recipe(name) for name in joined.modalities},
        images=images,
    )
    joined.require_complete(list(metadata.series))
    left_out = [f"{_images(joined.coverage.removed)} removed from a store"] if joined.coverage.removed else []
    left_out += [f"{_images(len(ids))} without `{name}`: {name_some(ids)}" for name, ids in lacking.items() if ids]
    left_out += [f"the images' own bytes: {why_no_images}"] if why_no_images and joined.has_images else []
    return MergePlan(
        stores=tuple(stores),
        metadata=metadata,
        n_known=joined.coverage.images,
        coverage=joined.coverage.by_modality,
        shards_missing=count_missing(target, metadata),
        size_bytes=_reckoned_bytes(stores, metadata),
        left_out=tuple(left_out),
    )


def rows_in_store(store: LatentStore, rows: RowTable) -> NDArray[np.int64]:
    """The row in a store of each row of a table, [rows.end]; `ABSENT` where it has none."""
    found = np.full(rows.end, ABSENT, np.int64)
    for image in rows.kept():
        found[image.row] = store.rows.row_by_id.get(image.image_id, ABSENT)
    return found


def _images(number: int) -> str:
    return "1 image" if number == 1 else f"{number:,} images"


def _check_places(stores: Sequence[LatentStore], target: Path) -> None:
    seen: set[Path] = set()
    for store in stores:
        source = store.path.resolve()
        if source in seen:
            raise StoreError(f"`{store.path}` is named twice", hint="name each store once")
        seen.add(source)
        if source == target.resolve():
            raise StoreError(f"`{target}` is a store to read", hint="name a new folder to write to")
        if source in target.resolve().parents:
            raise StoreError(f"`{target}` lies in `{store.path}`", hint="name a new folder beside the stores")
        refuse_unfinished_removal(store.path)


def _check_lacking(n_known: int, n_whole: int, lacking: dict[str, tuple[str, ...]], missing: str) -> None:
    said = "; ".join(f"{len(ids)} lack `{name}`: {name_some(ids)}" for name, ids in lacking.items() if ids)
    if said and missing == "error":
        raise MissingLatentError(
            f"of {n_known} images {said}", hint="build what is missing, or leave these images out: `--missing skip`"
        )
    if not n_whole:
        raise StoreError(f"no image has every modality: of {n_known} images {said}", hint="build what is missing")


def _image_recipe(stores: Sequence[LatentStore], rows: RowTable) -> tuple[ImageRecipe | None, str]:
    """How the stores hold the images of `rows`, if all are held in one way; else why they cannot be merged."""
    holders = {store: store.metadata.images for store in stores if store.metadata.images is not None}
    if not holders:
        return None, "no store holds them"
    if len(set(holders.values())) > 1:
        return None, "; ".join(f"`{store.path}` holds them as {recipe}" for store, recipe in holders.items())
    is_held = np.zeros(rows.end, bool)
    for store in holders:
        is_held |= rows_in_store(store, rows) != ABSENT
    without = rows.ids_of(np.flatnonzero(~is_held))
    if without:
        return None, f"no store holds those of {_images(len(without))}: {name_some(without)}"
    return next(iter(holders.values())), ""


def _reckoned_bytes(stores: Sequence[LatentStore], metadata: StoreMetadata) -> int:
    n_images = metadata.rows.n_kept
    latents = sum(payload_bytes(recipe.format) for recipe in metadata.recipes.values()) * n_images
    if metadata.images is None:
        return latents
    holders = [store for store in stores if store.has_images]
    held_bytes = sum(record.size_bytes for store in holders for record in store.committed(IMAGES).values())
    return latents + held_bytes * n_images // sum(store.rows.n_kept for store in holders)
