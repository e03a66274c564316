"""What a store says of itself: row table, class map, shard size, and a recipe per modality.

The main file of the layout is written last, so a folder that has it is a whole store. It holds the
hashes of all the rest, and one of its own attributes: commit records cover latents, these cover the
labels, splits and class names that a run takes from the store without a manifest.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from dla_cache.durable import locked_folder, make_folder, writing_to
from dla_cache.errors import StoreError, name_some
from dla_cache.modality import KINDS_OF_V1, is_modality
from dla_cache.spec import AXES_OF_V1, LARGEST_SHARD, ORIGINAL_IMAGES, ImageEncoding, ImageRecipe, Recipe
from dla_cache.store.layout import (
    FORMAT,
    IMAGES,
    Layout,
    SeriesLayout,
    not_as_written,
    sealed,
)
from dla_cache.store.parts import UNFINISHED, refuse_links
from dla_cache.store.row_files import read_rows
from dla_cache.store.rows import RowTable
from dla_cache.store.webdataset_layout import WebDatasetLayout
from dla_cache.store.zarr_layout import ZarrLayout

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ZarrLayout(), WebDatasetLayout())}


MORE_MODALITIES, MORE_AXES = "modalities", "axes"
"""What a store requires of its readers if it has others than the first ones of v1."""

NEW_FOLDER = "name a new or empty folder"


@dataclass(frozen=True, slots=True)
class StoreMetadata:
    """What decides the place of every payload and the meaning of its numbers."""

    layout: Layout
    rows: RowTable
    class_names: tuple[str, ...]
    shard_size: int
    recipes: dict[str, Recipe]
    """By modality, in alphabetical order."""
    images: ImageRecipe | None = None
    """How the store holds the images; None if it does not."""
    rows_sha256: str = ""
    """Of the row table's index as it was read; empty where none was."""

    @property
    def settings(self) -> dict[str, Any]:
        """What every layout says in plain words, and is the same for the life of a store."""
        return {
            "format": FORMAT,
            "requires": self.requires,
            "shard_size": self.shard_size,
            "class_names": list(self.class_names),
        }

    @property
    def requires(self) -> list[str]:
        """Names of what a reader must know beyond the first readers of the format, so that these refuse the store."""
        needed = {
            MORE_MODALITIES: any(recipe.modality not in KINDS_OF_V1 for recipe in self.recipes.values()),
            MORE_AXES: any(set(recipe.format.axes) - AXES_OF_V1 for recipe in self.recipes.values()),
        }
        return sorted(name for name, is_needed in needed.items() if is_needed)

    @property
    def series(self) -> dict[str, SeriesLayout]:
        """How each modality lies on disk, and the images if they are stored."""
        latents = {name: self.layout.latents(recipe, self.shard_size) for name, recipe in self.recipes.items()}
        return latents | ({} if self.images is None else {IMAGES: self.layout.images()})

    def changed_images(self, rows: Sequence[int], contents: Sequence[bytes]) -> list[int]:
        """Those rows whose stored image does not have the sha256 of the row table; made pictures need not."""
        return self.rows.changed_images(rows, contents) if self.images == ORIGINAL_IMAGES else []

    @property
    def recipe_hashes(self) -> dict[str, str]:
        """What the records of each series say of it."""
        hashes = {name: recipe.hash for name, recipe in self.recipes.items()}
        return hashes | ({} if self.images is None else {IMAGES: self.images.hash})

    def files(self, rows_sha256: str) -> dict[str, bytes]:
        """The metadata files but the row table, by their paths, in the order of writing."""
        facts = self.settings | {"rows_sha256": rows_sha256}
        if self.images is not None:
            facts["images"] = self.images.facts
        written = self.layout.metadata_files(facts, self.recipes, self.rows.end)
        return {
            name: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            for name, value in written.items()
        }


def find_layout(path: Path) -> Layout | None:
    """The layout of the store at `path`; None if there is no store.

    Raises:
        StoreError: if the folder has the main files of two layouts.
    """
    found = [layout for layout in LAYOUTS.values() if (path / layout.main_file).is_file()]
    if len(found) > 1:
        names = " and ".join(f"`{layout.main_file}`" for layout in found)
        raise StoreError(f"`{path}` has both {names}", hint="a folder holds one store: remove what does not belong")
    return found[0] if found else None


def read_metadata(path: Path) -> StoreMetadata:
    """The metadata of the store at `path`.

    Raises:
        StoreError: if there is no store, it is damaged, or its format is not that of this code.
    """
    layout = find_layout(path)
    if layout is None:
        raise StoreError(f"`{path}` is no store", hint="check the path; `dla cache build` makes one")
    try:
        attributes = layout.read_attributes(path)
        if attributes["format"] != FORMAT:
            raise StoreError(
                f"`{path}` has format `{attributes['format']}`, this dla reads `{FORMAT}`",
                hint="upgrade dla if it is newer; if it is older, build it again in a new folder",
            )
        if not isinstance(attributes["requires"], list):
            raise ValueError("`requires` is no list")
        unknown = sorted(set(attributes["requires"]) - {MORE_MODALITIES, MORE_AXES})
        if unknown:
            raise StoreError(f"`{path}` requires {name_some(unknown)} of its readers", hint="upgrade dla")
        if sealed({name: value for name, value in attributes.items() if name != "sha256"}) != attributes:
            raise not_as_written(path, f"class map or another setting in `{layout.main_file}`")
        rows_sha256 = str(attributes["rows_sha256"])
        shard_size = attributes["shard_size"]
        if type(shard_size) is not int or not 0 < shard_size <= LARGEST_SHARD:
            raise ValueError(f"`shard_size` is `{shard_size}`, where 1 to {LARGEST_SHARD:,} is possible")
        unknown = sorted(name for name in attributes["recipes"] if not is_modality(name))  # they become parts of paths
        if unknown:
            named = name_some(unknown)
            raise StoreError(f"`{path}` has modalities that this dla does not know: {named}", hint="upgrade dla")
        recipes = layout.read_recipes(path, attributes)
        if any(recipe.modality != modality for modality, recipe in recipes.items()):
            raise not_as_written(path, "recipe of a modality")
        images = attributes.get("images")
        if images is not None and images["encoding"] not in get_args(ImageEncoding):
            raise StoreError(f"`{path}` holds images as `{images['encoding']}`", hint="upgrade dla")
        return StoreMetadata(
            layout=layout,
            rows=read_rows(path, rows_sha256),
            class_names=tuple(attributes["class_names"]),
            shard_size=shard_size,
            recipes=dict(sorted(recipes.items())),
            images=None if images is None else ImageRecipe.model_validate(images),
            rows_sha256=rows_sha256,
        )
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        fault = f"a file lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StoreError(
            f"the metadata of `{path}` is damaged: {fault} (see `{layout.main_file}`)",
            hint="restore its `.json` files and its folder `rows` from a copy",
        ) from error


def refuse_unfinished_removal(path: Path) -> None:
    """Passes a store from which no image is being removed.

    Raises:
        StoreError: if a removal has begun and is not through, be it that its process was killed.
    """
    if (path / UNFINISHED).is_file():
        raise StoreError(
            f"images are being removed from `{path}`",
            hint="if nobody is at it any more: `dla cache takedown` with this store finishes it",
        )


def how_to_go_on(path: Path) -> str:
    """The hint where a shard is not committed: never built, or taken back by a removal that goes on or was killed."""
    if (path / UNFINISHED).is_file():
        return "images are being removed: `dla cache takedown` again finishes it"
    return "run `dla cache build` with the same spec again"


@contextmanager
def sole_writer(path: Path, opened: StoreMetadata | None = None) -> Iterator[None]:
    """Keeps everybody else from writing to a store, once those that do are through: see `unchanged_rows`.

    Args:
        opened: passes only if no images were removed since, as `unchanged_rows` does.

    Raises:
        StoreError: if they were, or the block is refused by the disk.
    """
    with writing_to(path):
        refuse_links(path)
        make_folder(path / "commits")
        with locked_folder(path), locked_folder(path / "commits"):
            if opened is not None:
                _refuse_changed_rows(path, opened)
            yield


@contextmanager
def unchanged_rows(path: Path, opened: StoreMetadata) -> Iterator[None]:
    """Keeps images from being removed during the block, and passes if none were since the store was opened.

    Any number of processes may be in such a block. A removal, which is `sole_writer`, waits for all of them, and who
    comes meanwhile waits for it; so nothing is written by a row table that has been replaced.

    Raises:
        StoreError: if the row table is another by now, or the block is refused by the disk.
    """
    with writing_to(path):
        refuse_links(path)
        with locked_folder(path):  # a removal holds it while it waits for the other lock, so that nobody overtakes it
            descriptor = os.open(path / "commits", os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            _refuse_changed_rows(path, opened)
            yield
        finally:
            os.close(descriptor)


def _refuse_changed_rows(path: Path, opened: StoreMetadata) -> None:
    if not has_rows_of(path, opened, _present_rows_sha256(path, opened.layout)):
        raise StoreError(
            f"images were removed from `{path}` while this worked on it; what it had committed before stays",
            hint="run the same command again: it goes on without them",
        )


def has_rows_of(path: Path, opened: StoreMetadata, rows_sha256: str) -> bool:
    """Whether a row table on disk is the one that a store was opened with, be it that images were appended since."""
    if rows_sha256 == opened.rows_sha256:
        return True
    try:
        present = read_rows(path, rows_sha256)
    except (OSError, ValueError, KeyError, StoreError):
        return False
    known, found = ([part.entry and part.entry["sha256"] for part in rows.parts] for rows in (opened.rows, present))
    return found[: len(known)] == known


def _present_rows_sha256(path: Path, layout: Layout) -> str:
    try:
        return str(layout.read_attributes(path)["rows_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise not_as_written(path, f"main file `{layout.main_file}`") from error
