"""Stores of undecoded latents. The one there is: Zarr v3, one file a shard, commit records beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.spec import Recipe
from dla_cache.store.metadata import StoreMetadata, create_metadata
from dla_cache.store.rows import RowTable
from dla_cache.store.statistics import LatentStatistics
from dla_cache.store.zarr_store import ZarrStore


class LatentStore(Protocol):
    """What a training run reads: everything that does not depend on how latents lie on disk."""

    rows: RowTable
    class_names: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]: ...
    def recipe(self, modality: str) -> Recipe: ...
    def require_complete(self, modalities: Sequence[str] | None = None) -> None: ...
    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]: ...
    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]: ...
    def statistics(self, modality: str, splits: Sequence[str]) -> LatentStatistics: ...
    def content_hash(self, modalities: Sequence[str] | None = None) -> str: ...


def open_store(path: Path) -> ZarrStore:
    """The store at `path`, for reading or for going on with a build.

    Raises:
        StoreError: if there is no store, it is damaged, or its format is newer than this code.
    """
    return ZarrStore(path)


def create_store(
    path: Path, rows: RowTable, class_names: Sequence[str], shard_size: int, recipes: Mapping[str, Recipe]
) -> ZarrStore:
    """A new store, or the one at `path` if it agrees: the same spec shares it, another is refused.

    Raises:
        RecipeMismatchError: if row table, class map, shard size or a recipe differ, saying how.
        StoreError: if the folder holds other things or cannot be written.
    """
    create_metadata(path, StoreMetadata(rows, tuple(class_names), shard_size, dict(sorted(recipes.items()))))
    return ZarrStore(path)
