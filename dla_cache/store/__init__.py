"""Stores of undecoded latents, in two layouts that read the same: Zarr v3 arrays, and WebDataset tars."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dla_cache.spec import ImageRecipe, Recipe
from dla_cache.store.latent_store import LatentStore
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, find_layout
from dla_cache.store.mirror import files_at
from dla_cache.store.rows import RowTable

__all__ = ["LatentStore", "create_store", "open_store"]


def open_store(place: str | Path) -> LatentStore:
    """The store at a path, or at a URL `s3://bucket/prefix`, for reading or for going on with a build.

    Raises:
        StoreError: if there is no store, it is damaged, its format is newer than this code, or it cannot be reached.
    """
    files = files_at(place)
    files.refresh()
    with files.naming():
        return LatentStore(files.path, files)


def create_store(
    place: str | Path,
    rows: RowTable,
    class_names: Sequence[str],
    shard_size: int,
    recipes: Mapping[str, Recipe],
    *,
    layout: str | None = None,
    images: ImageRecipe | None = None,
    append: bool = False,
) -> LatentStore:
    """A new store, or the one at a path or URL if it agrees: the same spec shares it, another is refused.

    Args:
        layout: `zarr` or `webdataset`; None for that of the store there is, or `zarr`.
        images: how to hold the images, too; a store that has them keeps them anyway.
        append: adds to a store those of `rows` that it has not, from a new shard on.

    Raises:
        RecipeMismatchError: if layout, row table, class map, shard size or a recipe differ, saying how.
        StoreError: if the folder holds other things or cannot be written.
    """
    files = files_at(place)
    if layout is None:
        files.refresh()
    chosen = LAYOUTS[layout] if layout is not None else find_layout(files.path) or LAYOUTS["zarr"]
    wanted = StoreMetadata(chosen, rows, tuple(class_names), shard_size, dict(sorted(recipes.items())), images)
    files.create(wanted, append=append)
    return LatentStore(files.path, files)
