"""What a store says of itself: row table, class map, shard size, and a recipe per modality.

The main file of the layout is written last, so a folder that has it is a whole store. It holds the
hashes of all the rest, and one of its own attributes: commit records cover latents, these cover the
labels, splits and class names that a run takes from the store without a manifest.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dla_cache.durable import is_temporary, locked_folder, make_folder, write_durably, writing_to
from dla_cache.errors import RecipeMismatchError, StoreError
from dla_cache.spec import Modality, Recipe, canonical_json
from dla_cache.store.layout import (
    FORMAT,
    IMAGES,
    NO_IMAGES,
    Layout,
    SeriesLayout,
    commits_folder,
    not_as_written,
    sealed,
)
from dla_cache.store.parts import UNFINISHED
from dla_cache.store.rows import RowTable
from dla_cache.store.webdataset_layout import WebDatasetLayout
from dla_cache.store.zarr_layout import ZarrLayout

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ZarrLayout(), WebDatasetLayout())}

ENCODINGS = (NO_IMAGES, "original")
"""How a store may hold the images' own bytes."""


@dataclass(frozen=True, slots=True)
class StoreMetadata:
    """What decides the place of every payload and the meaning of its numbers."""

    layout: Layout
    rows: RowTable
    class_names: tuple[str, ...]
    shard_size: int
    recipes: dict[str, Recipe]
    """By modality, in alphabetical order."""
    images: str = NO_IMAGES
    """How the store holds the images' own bytes: `original`, the bytes of their files, or `none`."""

    @property
    def settings(self) -> dict[str, Any]:
        """What every layout says in plain words, and is the same for the life of a store."""
        return {"format": FORMAT, "shard_size": self.shard_size, "class_names": list(self.class_names)}

    @property
    def series(self) -> dict[str, SeriesLayout]:
        """How each modality lies on disk, and the images if they are stored."""
        latents = {name: self.layout.latents(recipe, self.shard_size) for name, recipe in self.recipes.items()}
        return latents | ({} if self.images == NO_IMAGES else {IMAGES: self.layout.images()})

    def files(self, rows_sha256: str) -> dict[str, bytes]:
        """The metadata files but the row table, by their paths, in the order of writing."""
        # Of the row table's bytes as they lie there: another version of Parquet's writer would make others.
        facts = self.settings | {"rows_sha256": rows_sha256}
        if self.images != NO_IMAGES:
            facts["images"] = self.images
        written = self.layout.metadata_files(facts, self.recipes, len(self.rows))
        return {
            name: json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            for name, value in written.items()
        }


def hash_of_images(encoding: str) -> str:
    """The recipe hash of the series of images."""
    return hashlib.sha256(canonical_json({"encoding": encoding}).encode()).hexdigest()


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


def read_metadata(path: Path, *, rows_sha256: str | None = None) -> StoreMetadata:
    """The metadata of the store at `path`.

    Args:
        rows_sha256: of the row table that is to lie there, where it has been replaced and the main file not yet.

    Raises:
        StoreError: if there is no store, it is damaged, or its format is not that of this code.
    """
    try:
        layout = find_layout(path)
        if layout is None:
            raise StoreError(f"`{path}` is no store", hint="check the path; `dla cache build` makes one")
        attributes = layout.read_attributes(path)
        if attributes["format"] != FORMAT:
            raise StoreError(
                f"`{path}` has format `{attributes['format']}`, this dla reads `{FORMAT}`",
                hint="upgrade dla if it is newer; if it is older, build it again in a new folder",
            )
        if sealed({name: value for name, value in attributes.items() if name != "sha256"}) != attributes:
            raise not_as_written(path, f"class map or another setting in `{layout.main_file}`")
        rows = (path / "rows.parquet").read_bytes()
        if hashlib.sha256(rows).hexdigest() != (rows_sha256 or attributes["rows_sha256"]):
            if (path / UNFINISHED).is_file():
                raise StoreError(
                    f"images are being removed from `{path}`",
                    hint="if nobody is at it any more: `dla cache takedown` with this store finishes it",
                )
            raise not_as_written(path, "row table `rows.parquet`")
        for modality in attributes["recipes"]:
            Modality(modality)  # it becomes a part of paths
        recipes = layout.read_recipes(path, attributes)
        if any(recipe.modality != modality for modality, recipe in recipes.items()):
            raise not_as_written(path, "recipe of a modality")
        if attributes.get("images", NO_IMAGES) not in ENCODINGS:
            raise StoreError(f"`{path}` holds images as `{attributes['images']}`", hint="upgrade dla")
        return StoreMetadata(
            layout=layout,
            rows=RowTable.from_parquet(rows),
            class_names=tuple(attributes["class_names"]),
            shard_size=attributes["shard_size"],
            recipes=dict(sorted(recipes.items())),
            images=attributes.get("images", NO_IMAGES),
        )
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"the metadata of `{path}` is damaged: {error}",
            hint="restore its `.json` files and `rows.parquet` from a copy",
        ) from error


def create_metadata(path: Path, wanted: StoreMetadata) -> None:
    """Makes an empty store, or passes one that agrees; a series it does not have yet is added.

    Processes that do so at the same time wait for each other, so all get the same answer.

    Raises:
        RecipeMismatchError: if the store differs, saying in what: old → new.
        StoreError: if the folder holds other things or cannot be written.
    """
    with writing_to(path):
        make_folder(path)
        with locked_folder(path):
            if find_layout(path) is not None:
                stored = read_metadata(path)
                check_agrees(path, stored, wanted)
                recipes = dict(sorted((stored.recipes | wanted.recipes).items()))
                images = wanted.images if stored.images == NO_IMAGES else stored.images
                whole = replace(stored, recipes=recipes, images=images)
            else:
                check_is_new(path, wanted.layout)
                write_durably(path / "rows.parquet", wanted.rows.to_parquet())
                whole = wanted
            for series, layout in whole.series.items():
                folder = (path / layout.files(0)[0]).parent
                if not commits_folder(path, series).is_dir():
                    check_holds_nothing(folder)
                make_folder(commits_folder(path, series))
                make_folder(folder)
            rows_sha256 = hashlib.sha256((path / "rows.parquet").read_bytes()).hexdigest()
            for name, content in whole.files(rows_sha256).items():
                make_folder((path / name).parent)
                # Left alone where it agrees: a finished store may be on a read-only disk and still be "built" again.
                if not ((path / name).is_file() and (path / name).read_bytes() == content):
                    write_durably(path / name, content)


def check_is_new(path: Path, layout: Layout) -> None:
    """Passes a folder in which a store can begin: an empty one, or what a killed beginning left.

    Raises:
        StoreError: if it holds anything else.
    """
    others = [entry.name for entry in path.iterdir() if entry.name not in layout.parts and entry.suffix != ".tmp"]
    if others:
        raise StoreError(f"`{path}` holds other things, such as `{others[0]}`", hint="name a new or empty folder")
    # A shard is committed only in a whole store, and new metadata could not tell whether it is that of these records.
    if any((path / "commits").glob("*/*")):
        raise StoreError(
            f"`{path}` holds commit records but has lost its `{layout.main_file}`",
            hint="restore it from a copy, or remove the folder and build again",
        )
    for entry in path.iterdir():
        if entry.is_dir() and entry.name != "commits":
            check_holds_nothing(entry)


def check_holds_nothing(folder: Path) -> None:
    """Passes a folder that is absent or has no file but metadata: shards will lie in it, and be removed from it.

    Raises:
        StoreError: if something lies there, which is not ours.
    """
    for path in folder.rglob("*"):
        if not (path.is_dir() and not path.is_symlink()) and path.name != "zarr.json" and not is_temporary(path):
            raise StoreError(f"`{folder}` holds other things, such as `{path.name}`", hint="name a new or empty folder")


def check_agrees(path: Path, stored: StoreMetadata, wanted: StoreMetadata) -> None:
    """Passes if both say the same of everything that both have.

    Raises:
        RecipeMismatchError: naming every field that differs: old → new.
    """
    before, after = ({"layout": metadata.layout.name, **metadata.settings} for metadata in (stored, wanted))
    differences = list(changed_fields(before, after))
    if stored.rows != wanted.rows:
        differences.append(f"row table: {_first_difference(stored.rows, wanted.rows)}")
    for modality in stored.recipes.keys() & wanted.recipes.keys():
        old, new = (metadata.recipes[modality].model_dump(mode="json") for metadata in (stored, wanted))
        differences += changed_fields(old, new, f"{modality}.")
    if NO_IMAGES not in (stored.images, wanted.images) and stored.images != wanted.images:
        differences.append(f"`images` `{stored.images}` → `{wanted.images}`")
    if differences:
        hint = "name a new store, or go back to the old settings; a store is never changed in place"
        if any(row.removed for row in stored.rows):
            hint = "images were taken out of this store, so it is not built on any more: build a new one without them"
        raise RecipeMismatchError(
            f"`{path}` was built from another spec, source or manifest: {'; '.join(differences)}", hint=hint
        )


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every field that differs, by its dotted path: old → new."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from changed_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"`{prefix}{name}` `{before}` → `{after}`"


def _first_difference(old: RowTable, new: RowTable) -> str:
    if len(old) != len(new):
        return f"`{len(old)}` images → `{len(new)}`"
    before, after = next((before, after) for before, after in zip(old, new, strict=True) if before != after)
    return f"row {before.row} `{before}` → `{after}`"
