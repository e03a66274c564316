"""What a store holds, in plain values that can be printed or turned into JSON."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dla_cache.store import LatentStore
from dla_cache.store.layout import IMAGES
from dla_cache.store.precision import Rounding, summarise_error
from dla_cache.store.rows import StoredImage
from dla_cache.store.statistics import SplitStatistics, measure, merge_errors, merge_statistics


@dataclass(frozen=True, slots=True)
class ModalityStatus:
    """How much of a modality, or of the images' own bytes, is committed."""

    modality: str
    """Or `images`."""
    shards: int
    shards_planned: int
    shards_missing: tuple[int, ...]
    images: int
    size_bytes: int
    recipe_hash: str

    @property
    def bytes_per_image(self) -> float:
        return self.size_bytes / max(self.images, 1)


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How much of a store is committed."""

    images: int
    images_per_split: dict[str, int]
    class_names: tuple[str, ...]
    modalities: tuple[ModalityStatus, ...]
    content_hash: str | None
    """None while shards of a modality are missing."""
    layout: str = "zarr"
    image_bytes: ModalityStatus | None = None
    """Of the images' own bytes; None if the store does not hold them."""


@dataclass(frozen=True, slots=True)
class ModalityDescription:
    """What the numbers of a modality are."""

    recipe: dict[str, Any]
    recipe_hash: str
    statistics: dict[str, dict[str, Any]]
    """Per split: count, mean, std, minimum, maximum, the latter four per channel; of the stored numbers."""
    rounding: Rounding | None
    """What was lost when they were stored; None if nothing was, and of codes."""


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """One image: its row, and its latents' statistics per channel."""

    image: StoredImage
    shard: int
    latents: dict[str, SplitStatistics]
    """Per committed modality."""
    image_bytes: int | None = None
    """What the store holds of the image itself: its file, or a picture made of it."""


def describe_store(store: LatentStore) -> StoreStatus:
    """The state of every modality, from the commit records."""
    modalities = [_describe_series(store, modality) for modality in store.modalities]
    return StoreStatus(
        images=store.rows.n_kept,
        images_per_split={split: store.rows.n_of(split) for split in sorted(store.rows.splits)},
        class_names=store.class_names,
        modalities=tuple(modalities),
        content_hash=None if any(state.shards_missing for state in modalities) else store.content_hash(),
        layout=store.layout_name,
        image_bytes=_describe_series(store, IMAGES) if store.has_images else None,
    )


def _describe_series(store: LatentStore, series: str) -> ModalityStatus:
    committed = store.committed(series)
    return ModalityStatus(
        modality=series,
        shards=len(committed),
        shards_planned=len(store.shards),
        shards_missing=tuple(store.missing(series)),
        images=sum(len(store.kept_rows(shard)) for shard in store.shards if shard.index in committed),
        size_bytes=sum(record.size_bytes for record in committed.values()),
        recipe_hash=store.recipe_hash(series),
    )


def describe_modality(store: LatentStore, modality: str) -> ModalityDescription:
    """Recipe and statistics of a modality; of those splits whose shards are all committed."""
    missing = store.missing(modality)
    statistics = {}
    for split in sorted(store.rows.splits):
        if not np.isin(store.rows_of([split]) // store.shard_size, missing).any():
            merged = store.statistics(modality, [split])
            statistics[split] = {
                "count": merged.count,
                "mean": merged.mean.tolist(),
                "std": merged.std.tolist(),
                "minimum": merged.minimum.tolist(),
                "maximum": merged.maximum.tolist(),
            }
    recipe = store.recipe(modality)
    return ModalityDescription(
        recipe.model_dump(mode="json"), recipe.hash, statistics, describe_rounding(store, modality)
    )


def describe_rounding(store: LatentStore, modality: str) -> Rounding | None:
    """What the committed latents of a modality lost when they were stored; None if nothing, and of codes."""
    records = store.committed(modality).values()
    parts = [(record.statistics.values(), record.error) for record in records]
    error = merge_errors([(sum(part.count for part in of_splits), lost) for of_splits, lost in parts])
    if error is None:
        return None
    std = merge_statistics([part for of_splits, _ in parts for part in of_splits]).std
    return summarise_error(error, std, store.recipe(modality).format)


def describe_image(store: LatentStore, image_id: str) -> ImageDescription:
    """One image's row and latents.

    Raises:
        MissingLatentError: if the store does not know the image.
        CorruptShardError: if one of its latents, or its stored image, is damaged.
    """
    row = store.rows.row_of(image_id)
    shard = row // store.shard_size
    latents = {
        modality: measure(store.read(modality, np.array([row])), store.recipe(modality).format.channel_axis)
        for modality in store.modalities
        if shard in store.committed(modality)
    }
    has_image = store.has_images and shard in store.committed(IMAGES)
    image_bytes = len(store.read_images(np.array([row]))[0]) if has_image else None
    return ImageDescription(store.rows[row], shard, latents, image_bytes)
