"""Stores of undecoded latents, in two layouts that read the same: Zarr v3 arrays, and WebDataset tars."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dla_cache.spec import ImageRecipe, Recipe
from dla_cache.store.creation import create_metadata
from dla_cache.store.latent_store import LatentStore
from dla_cache.store.metadata import LAYOUTS, StoreMetadata, find_layout
from dla_cache.store.rows import RowTable

__all__ = ["LatentStore", "create_store", "open_store"]


def open_store(path: Path) -> LatentStore:
    """The store at `path`, for reading or for going on with a build.

    Raises:
        StoreError: if there is no store, it is damaged, or its format is newer than this code.
    """
    return LatentStore(path)


def create_store(
    path: Path,
    rows: RowTable,
    class_names: Sequence[str],
    shard_size: int,
    recipes: Mapping[str, Recipe],
    *,
    layout: str | None = None,
    images: ImageRecipe | None = None,
    append: bool = False,
) -> LatentStore:
    """A new store, or the one at `path` if it agrees: the same spec shares it, another is refused.

    Args:
        layout: `zarr` or `webdataset`; None for that of the store there is, or `zarr`.
        images: how to hold the images, too; a store that has them keeps them anyway.
        append: adds to a store those of `rows` that it has not, from a new shard on.

    Raises:
        RecipeMismatchError: if layout, row table, class map, shard size or a recipe differ, saying how.
        StoreError: if the folder holds other things or cannot be written.
    """
    chosen = LAYOUTS[layout] if layout is not None else find_layout(path) or LAYOUTS["zarr"]
    wanted = StoreMetadata(chosen, rows, tuple(class_names), shard_size, dict(sorted(recipes.items())), images)
    create_metadata(path, wanted, append=append)
    return LatentStore(path)
