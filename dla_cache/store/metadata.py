"""What a store says of itself: row table, class map, shard size, and a recipe per modality.

The main file of the layout is written last, so a folder that has it is a whole store. It holds the
hashes of all the rest, and one of its own attributes: commit records cover latents, these cover the
labels, splits and class names that a run takes from the store without a manifest.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dla_cache.durable import is_temporary, locked_folder, make_folder, write_durably, writing_to
from dla_cache.errors import RecipeMismatchError, StoreError, name_some
from dla_cache.spec import LARGEST_SHARD, Modality, Recipe, canonical_json
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
from dla_cache.store.rows import RowTable, StoredImage
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
    rows_sha256: str = ""
    """Of the row table's bytes as they were read; empty where none were."""

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
        found_sha256 = hashlib.sha256(rows).hexdigest()
        if found_sha256 != (rows_sha256 or attributes["rows_sha256"]):
            refuse_unfinished_removal(path)
            raise not_as_written(path, "row table `rows.parquet`")
        shard_size = attributes["shard_size"]
        if type(shard_size) is not int or not 0 < shard_size <= LARGEST_SHARD:
            raise ValueError(f"`shard_size` is `{shard_size}`, where 1 to {LARGEST_SHARD:,} is possible")
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
            shard_size=shard_size,
            recipes=dict(sorted(recipes.items())),
            images=attributes.get("images", NO_IMAGES),
            rows_sha256=found_sha256,
        )
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"the metadata of `{path}` is damaged: {error}",
            hint="restore its `.json` files and `rows.parquet` from a copy",
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
        with locked_folder(path):  # a removal holds it while it waits for the other lock, so that nobody overtakes it
            descriptor = os.open(path / "commits", os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            _refuse_changed_rows(path, opened)
            yield
        finally:
            os.close(descriptor)


def _refuse_changed_rows(path: Path, opened: StoreMetadata) -> None:
    if _present_rows_sha256(path, opened.layout) != opened.rows_sha256:
        raise StoreError(
            f"images were removed from `{path}` while this worked on it; what it had committed before stays",
            hint="run the same command again: it goes on without them",
        )


def _present_rows_sha256(path: Path, layout: Layout) -> str:
    """Of the row table on disk: the main file tells it, and need not be up to date while images are being removed."""
    if (path / UNFINISHED).is_file():
        return hashlib.sha256((path / "rows.parquet").read_bytes()).hexdigest()
    try:
        return str(layout.read_attributes(path)["rows_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise not_as_written(path, f"main file `{layout.main_file}`") from error


def stored_rows(path: Path) -> RowTable | None:
    """The row table of the store at `path`; None if there is no store yet.

    Raises:
        StoreError: as `read_metadata` does.
    """
    return None if find_layout(path) is None else read_metadata(path).rows


def with_removed(stored: RowTable | None, wanted: RowTable) -> RowTable:
    """The rows of a manifest as a store that goes on with it has them: its removed images are there as removed.

    The rule: removed images aside, manifest and store list the same images in the same order. Whether the manifest
    still lists removed ones does not matter, they stay removed. Rows that do not agree so come back as they are.
    """
    return stored if stored is not None and agree_but_for_removed(stored, wanted) else wanted


def agree_but_for_removed(one: RowTable, other: RowTable) -> bool:
    """Whether two tables have the same images in the same order, without those that either has as removed."""
    kept = [_without(rows, one.removed_ids | other.removed_ids) for rows in (one, other)]
    return (
        one.is_multi_label == other.is_multi_label
        and len(kept[0]) == len(kept[1])
        and all(_is_same_image(*pair) for pair in zip(*kept, strict=True))
    )


def _without(rows: RowTable, image_ids: frozenset[str]) -> list[StoredImage]:
    return [image for image in rows if image.image_id not in image_ids]


def _is_same_image(one: StoredImage, other: StoredImage) -> bool:
    return one == replace(other, row=one.row)


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
    if stored.rows != wanted.rows and not agree_but_for_removed(stored.rows, wanted.rows):
        differences.append(f"row table: {_first_difference(stored.rows, wanted.rows)}")
    for modality in stored.recipes.keys() & wanted.recipes.keys():
        old, new = (metadata.recipes[modality].model_dump(mode="json") for metadata in (stored, wanted))
        differences += changed_fields(old, new, f"{modality}.")
    if NO_IMAGES not in (stored.images, wanted.images) and stored.images != wanted.images:
        differences.append(f"`images` `{stored.images}` → `{wanted.images}`")
    if differences:
        raise RecipeMismatchError(
            f"`{path}` was built from another spec, source or manifest: {'; '.join(differences)}",
            hint="name a new store, or go back to the old settings; a store is never changed in place",
        )
    if stored.rows != wanted.rows:
        one_sided = sorted(stored.rows.removed_ids ^ wanted.rows.removed_ids)
        raise RecipeMismatchError(
            f"{len(one_sided)} images were removed from `{path}` and not from what goes into it, or the other way"
            f" round: {name_some(one_sided)}",
            hint="run the same command again if they were removed just now; else `dla cache takedown` removes them"
            " from the other store, too",
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
    """Of two tables that do not agree; images that were removed from the old one do not count."""
    before, after = (_without(rows, old.removed_ids) for rows in (old, new))
    if len(before) != len(after):
        return f"`{len(before)}` images → `{len(after)}`"
    if old.is_multi_label != new.is_multi_label:
        return "one label an image → several" if new.is_multi_label else "several labels an image → one"
    pairs = zip(before, after, strict=True)
    one, other = next((one, other) for one, other in pairs if not _is_same_image(one, other))
    if one.image_id != other.image_id:
        return f"row {one.row} is `{one.image_id}` → `{other.image_id}`"
    changed = changed_fields(asdict(one), asdict(other) | {"row": one.row, "removed": one.removed})
    return f"image `{one.image_id}`: {', '.join(changed)}"
