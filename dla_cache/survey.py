"""What a build would do, found without writing: which images lack a latent and why, and how many bytes these take."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import ImageError, ManifestError
from dla_cache.manifest import Manifest, path_of
from dla_cache.quarantine import read_reasons
from dla_cache.remote import is_remote
from dla_cache.repair import lost_shards
from dla_cache.shards import ShardPlan
from dla_cache.spec import CacheSpec, Recipe
from dla_cache.store import LatentStore
from dla_cache.store.adopted import as_stored
from dla_cache.store.creation import appended_rows, check_agrees, check_is_new, with_removed
from dla_cache.store.layout import IMAGES, SeriesLayout, payload_bytes
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, find_layout, refuse_unfinished_removal
from dla_cache.store.mirror import files_at
from dla_cache.store.rows import RowTable
from dla_cache.stored_images import encode_image, image_recipe
from dla_cache.tars import read_range

NEW_STORE, NEW_MODALITY = "the store is not there yet", "the store does not have the modality yet"
NEW_IMAGES, NOT_COMMITTED, DAMAGED = "new images", "not committed", "damaged: its file is missing or cut off"
NO_LATENT = "the last build found no latent: `dla cache explain` says why"

IMAGES_LOOKED_AT = 64
"""Of stored images, whose bytes differ, so many tell what all will take."""


@dataclass(frozen=True, slots=True)
class Todo:
    """What a build would compute of one series."""

    reasons: dict[str, int]
    """Images by the reason why they are to be done."""
    rows: NDArray[np.int64]
    """The images, rising."""
    size_bytes: int
    """That their shards take on disk; of stored images an estimate."""
    bytes_per_image: float

    @property
    def n_images(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a build would find and do."""

    is_there: bool
    """Whether the store exists."""
    rows: RowTable
    """Of the store as it would be."""
    todo: dict[str, Todo]
    """By series: the modalities of the spec, and `images` if it stores them."""

    @property
    def has_damage(self) -> bool:
        """Whether a build would refuse to go on without `repair`."""
        return any(DAMAGED in todo.reasons for todo in self.todo.values())


def survey_build(
    manifest: Manifest, spec: CacheSpec, store_place: str | Path, recipes: Mapping[str, Recipe], *, append: bool = False
) -> Survey:
    """What `build_cache` would do with these sources; nothing is written to the store, nor is it made.

    Args:
        recipes: of the spec's sources, by modality.

    Raises:
        ManifestError: if the manifest has no image, or not that of a split.
        RecipeMismatchError: if the store was built from another spec, source or manifest, saying how.
        StoreError: if the place holds other things, is damaged or cannot be reached.
    """
    if spec.splits is not None:
        manifest = manifest.select(spec.splits)
    if not len(manifest):
        raise ManifestError("there is no image to build", hint="name splits in the spec, or leave `splits` out: all")
    files = files_at(store_place)
    with files.naming():
        files.refresh()
        store = None
        if find_layout(files.path) is not None:
            refuse_unfinished_removal(files.path)
            store = LatentStore(files.path, files)
        elif not is_remote(str(store_place)) and files.path.exists():
            check_is_new(files.path, LAYOUTS[spec.layout])
        listed = RowTable.from_manifest(manifest)
        wanted = StoreMetadata(
            LAYOUTS[spec.layout],
            with_removed(None if store is None else store.rows, listed),
            manifest.class_names,
            spec.shard_size,
            dict(sorted(recipes.items())),
            image_recipe(spec),
        )
        planned = wanted if store is None else _gone_on_with(store, wanted, append=append)
        todo = {
            series: _todo(store, planned, series, layout, manifest.root)
            for series, layout in planned.series.items()
            if series in recipes or (series == IMAGES and wanted.images is not None)
        }
    return Survey(store is not None, planned.rows, todo)


def _gone_on_with(store: LatentStore, wanted: StoreMetadata, *, append: bool) -> StoreMetadata:
    """The metadata that a store would have; as `create_metadata` decides it."""
    stored = store.metadata
    if append:
        if (stored.rows.is_multi_label, stored.class_names) == (wanted.rows.is_multi_label, wanted.class_names):
            stored = replace(stored, rows=appended_rows(store.path, stored.rows, wanted.rows, stored.shard_size))
        wanted = replace(wanted, rows=stored.rows)
    wanted = replace(wanted, recipes=as_stored(store.path, stored.recipes, wanted.recipes))
    check_agrees(store.path, stored, wanted)
    recipes = dict(sorted((stored.recipes | wanted.recipes).items()))
    return replace(stored, recipes=recipes, images=wanted.images if stored.images is None else stored.images)


def _todo(
    store: LatentStore | None, planned: StoreMetadata, series: str, layout: SeriesLayout, image_root: Path
) -> Todo:
    shards = ShardPlan(planned.rows.spans, planned.shard_size)
    is_known = store is not None and series in store.series
    committed = store.committed(series) if store is not None and is_known else {}
    lost = set(lost_shards(store, series, store.shards)) if store is not None and is_known else set()
    bad = {} if store is None else read_reasons(store)
    reasons: Counter[str] = Counter()
    rows = []
    for shard in shards:
        kept = planned.rows.kept_rows_of(shard)
        if shard.index in lost:
            reason = DAMAGED
        elif shard.index in committed:
            continue
        elif store is None:
            reason = NEW_STORE
        elif shard.start >= store.rows.end:
            reason = NEW_IMAGES
        else:
            reason = NOT_COMMITTED if is_known else NEW_MODALITY
        if len(kept):
            n_bad = sum(image_id in bad for image_id in planned.rows.ids_of(kept)) if bad else 0
            reasons[NO_LATENT] += n_bad
            reasons[reason] += len(kept) - n_bad
            rows.append((shard, kept))
    chosen = np.concatenate([kept for _, kept in rows]) if rows else np.empty(0, np.int64)
    sizes = _ShardSizes(planned, series, layout, image_root, chosen)
    total = sum(sizes.of_shard(len(shard), len(kept)) for shard, kept in rows)
    return Todo(
        {reason: count for reason, count in reasons.items() if count}, chosen, total, total / max(len(chosen), 1)
    )


class _ShardSizes:
    """How many bytes a shard takes, of its rows and those of them whose images were not removed.

    Shards of a layout grow by the same number of bytes with every image, so those of one and of two tell all.
    """

    def __init__(
        self, planned: StoreMetadata, series: str, layout: SeriesLayout, image_root: Path, rows: NDArray[np.int64]
    ) -> None:
        self._layout = layout
        self._payload = 0
        if series != IMAGES:
            self._payload = payload_bytes(planned.recipes[series].format)
        elif len(rows):
            self._payload = _mean_image_bytes(planned, image_root, rows)
        self._empty = self._encoded([None])
        self._of_kept = self._encoded([bytes(self._payload)]) - self._empty
        self._of_row = self._encoded([None, None]) - self._empty if planned.shard_size > 1 else 0

    def _encoded(self, payloads: list[bytes | None]) -> int:
        image_ids = [f"image-{number}" for number in range(len(payloads))]
        return sum(map(len, self._layout.encode(image_ids, payloads)))

    def of_shard(self, n_rows: int, n_kept: int) -> int:
        return self._empty + (n_rows - 1) * self._of_row + n_kept * self._of_kept


def _mean_image_bytes(planned: StoreMetadata, image_root: Path, rows: NDArray[np.int64]) -> int:
    """Of images as the store would hold them, of a few that lie evenly among all."""
    recipe = planned.images
    assert recipe is not None
    places = np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_LOOKED_AT)).astype(int)
    sizes = []
    for image in planned.rows.images_of(rows[places]):
        path = path_of(image_root, image.uri)
        try:
            sizes.append(len(encode_image(read_range(path.parent, path.name), image.image_id, recipe)))
        except ImageError:
            continue  # the build tells of it
    return round(float(np.mean(sizes))) if sizes else 0
