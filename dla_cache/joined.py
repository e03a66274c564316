"""Several stores read as one, joined by image ID: say, depth from one build and sound from another."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import MissingLatentError, RecipeMismatchError, StoreError, name_some
from dla_cache.spec import Recipe
from dla_cache.store import LatentStore
from dla_cache.store.creation import changed_fields
from dla_cache.store.layout import IMAGES
from dla_cache.store.rows import RowTable, StoredImage

Missing = Literal["error", "skip", "null"]
"""What becomes of an image without a latent of every modality: it is refused, left out, or has zeros there."""

ABSENT = -1


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many images of the stores have what."""

    images: int
    """In any of them, and removed from none."""
    whole: int
    """That have all modalities."""
    removed: int
    """Left out because they were removed from one of the stores."""
    by_modality: dict[str, int]


class JoinedStore:
    """Stores of the same images as one; what `PairStream` needs of a store, and nothing is copied.

    An image has its row by its ID: in the order of the first store, then those that only the second has, and so on.
    """

    def __init__(self, stores: Sequence[LatentStore], *, missing: Missing = "error") -> None:
        """
        Raises:
            RecipeMismatchError: if a modality has two recipes, an image two contents, labels or splits, or the class
                maps differ.
            MissingLatentError: if an image lacks a modality and `missing` is `error`.
            StoreError: if no image is left, or no store is given.
        """
        if not stores:
            raise StoreError("there is no store to join", hint="give at least one")
        self.stores = tuple(stores)
        self.class_names = stores[0].class_names
        self.shard_size = stores[0].shard_size
        _check_classes(stores)
        self._recipes = _common_recipes(stores)
        images, removed = _common_images(stores)
        held = _held_by(stores)
        whole = [image for image in images if all(image.image_id in ids for ids in held.values())]
        self.coverage = Coverage(
            images=len(images),
            whole=len(whole),
            removed=removed,
            by_modality={name: sum(image.image_id in ids for image in images) for name, ids in held.items()},
        )
        if missing == "error" and len(whole) < len(images):
            self._refuse_gaps(images, held)
        kept = images if missing == "null" else whole
        if not kept:
            raise StoreError("no image is in all of the stores", hint="look at the coverage, or join with `null`")
        self.rows = RowTable(
            [replace(image, row=row) for row, image in enumerate(kept)], is_multi_label=stores[0].rows.is_multi_label
        )
        self._rows_in = [_rows_in(store, self.rows) for store in stores]

    def _refuse_gaps(self, images: Iterable[StoredImage], held: Mapping[str, Collection[str]]) -> None:
        lacking = {
            name: [image.image_id for image in images if image.image_id not in ids] for name, ids in held.items()
        }
        said = "; ".join(f"{len(ids)} lack `{name}`: {name_some(ids)}" for name, ids in lacking.items() if ids)
        raise MissingLatentError(
            f"of {self.coverage.images} images {said}", hint="build what is missing, or join with `skip` or `null`"
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(self._recipes)

    @property
    def has_images(self) -> bool:
        """Whether a store holds the images' own bytes."""
        return any(store.has_images for store in self.stores)

    def recipe(self, modality: str) -> Recipe:
        """What the numbers of a modality are.

        Raises:
            MissingLatentError: if no store has it.
        """
        try:
            return self._recipes[modality]
        except KeyError:
            raise MissingLatentError(
                f"none of the stores has a modality `{modality}`",
                hint=f"they have {', '.join(f'`{name}`' for name in self.modalities) or 'none'}",
            ) from None

    def require_complete(self, series: Sequence[str] | None = None) -> None:
        """Passes if every store has committed all of these series that it has.

        Raises:
            IncompleteBuildError: naming what is missing.
            MissingLatentError: if no store has such a series.
        """
        for name in self.modalities if series is None else series:
            if name == IMAGES and not self.has_images:
                raise MissingLatentError("none of the stores holds its images", hint="name the folder they lie in")
            if name != IMAGES:
                self.recipe(name)
            for store in self.stores:
                if name in store.series:
                    store.require_complete([name])

    def rows_of(self, splits: Sequence[str] | None = None) -> NDArray[np.int64]:
        """The rows of some splits in row order, [n]; of all splits when None."""
        return self.rows.rows_of(splits)

    def present(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which images have a latent of a modality, [B]."""
        self.recipe(modality)
        found = np.zeros(len(rows), bool)
        for store, rows_in in zip(self.stores, self._rows_in, strict=True):
            if modality in store.modalities:
                found |= rows_in[rows] != ABSENT
        return found

    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Raw latents [B, *shape] in `LatentFormat.read_dtype`, in the order of `rows`; zeros where there is none.

        Raises:
            CorruptShardError: if a file or a payload is damaged, naming shard and images.
        """
        latent = self.recipe(modality).format
        latents = np.zeros((len(rows), *latent.shape), latent.read_dtype)
        wanted = np.ones(len(rows), bool)
        for store, rows_in in zip(self.stores, self._rows_in, strict=True):
            if modality in store.modalities:
                places = np.flatnonzero(wanted & (rows_in[rows] != ABSENT))
                latents[places] = store.read(modality, rows_in[rows][places])
                wanted[places] = False
        return latents

    def read_images(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Images as the stores hold them, in the order of `rows`; the CRC of each is checked.

        Raises:
            MissingLatentError: if no store holds the file of an image.
            CorruptShardError: if a file or an image is damaged.
        """
        contents: list[bytes | None] = [None] * len(rows)
        for store, rows_in in zip(self.stores, self._rows_in, strict=True):
            if store.has_images:
                places = [place for place, row in enumerate(rows_in[rows]) if row != ABSENT and contents[place] is None]
                for place, content in zip(places, store.read_images(rows_in[rows][places]), strict=True):
                    contents[place] = content
        without = [self.rows.image_ids[row] for row, content in zip(rows, contents, strict=True) if content is None]
        if without:
            raise MissingLatentError(
                f"no store holds the files of {len(without)} images: {name_some(without)}",
                hint="name the folder they lie in",
            )
        return [content for content in contents if content is not None]


def _check_classes(stores: Sequence[LatentStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if (store.class_names, store.rows.is_multi_label) != (first.class_names, first.rows.is_multi_label):
            raise RecipeMismatchError(
                f"`{first.place}` and `{store.place}` have different class maps",
                hint="build both from manifests of one class map",
            )


def _common_recipes(stores: Sequence[LatentStore]) -> dict[str, Recipe]:
    """The recipe of each modality, in alphabetical order."""
    recipes: dict[str, Recipe] = {}
    for store in stores:
        for name in store.modalities:
            known, recipe = recipes.setdefault(name, store.recipe(name)), store.recipe(name)
            if known.hash != recipe.hash:
                fields = changed_fields(known.model_dump(mode="json"), recipe.model_dump(mode="json"), f"{name}.")
                raise RecipeMismatchError(
                    f"`{store.place}` holds `{name}` of another recipe than a store before it: {'; '.join(fields)}",
                    hint="join stores of one recipe for each modality",
                )
    return dict(sorted(recipes.items()))


def _common_images(stores: Sequence[LatentStore]) -> tuple[list[StoredImage], int]:
    """All images that were removed from no store, and how many were."""
    found: dict[str, StoredImage] = {}
    removed: set[str] = set()
    for store in stores:
        differing: dict[str, list[str]] = {}
        for image in store.rows:
            if image.removed:
                removed.add(image.image_id)
                continue
            known = found.setdefault(image.image_id, image)
            for name in ("sha256", "label", "split"):
                if getattr(known, name) != getattr(image, name):
                    differing.setdefault(name, []).append(image.image_id)
        for name, image_ids in differing.items():
            raise RecipeMismatchError(
                f"{len(image_ids)} images have another `{name}` in `{store.place}`: {name_some(image_ids)}",
                hint="build both stores from one manifest",
            )
    return [image for image in found.values() if image.image_id not in removed], len(removed)


def _held_by(stores: Sequence[LatentStore]) -> dict[str, Collection[str]]:
    """The IDs of the images that have each modality; one collection for all modalities of the same stores."""
    of_stores: dict[tuple[int, ...], Collection[str]] = {}
    held = {}
    for name in _common_recipes(stores):
        which = tuple(place for place, store in enumerate(stores) if name in store.modalities)
        if which not in of_stores:
            ids = [stores[place].rows.row_by_id.keys() for place in which]
            of_stores[which] = ids[0] if len(ids) == 1 else set().union(*ids)
        held[name] = of_stores[which]
    return held


def _rows_in(store: LatentStore, rows: RowTable) -> NDArray[np.int64]:
    """The row that each image has in a store, [n]; `ABSENT` where it has none."""
    return np.array([store.rows.row_by_id.get(image_id, ABSENT) for image_id in rows.image_ids], np.int64)
