"""A store comes into being, or is gone on with: whether what is wanted agrees with what is there.

What was built stays as it is: a series may be added, and images behind the others. Anything else is another store.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dla_cache.durable import is_temporary, locked_folder, make_folder, read_file, write_durably, writing_to
from dla_cache.errors import RecipeMismatchError, StoreError, name_some
from dla_cache.store.adopted import as_stored
from dla_cache.store.layout import Layout, commits_folder
from dla_cache.store.metadata import NEW_FOLDER, StoreMetadata, find_layout, read_metadata, refuse_unfinished_removal
from dla_cache.store.parts import refuse_links
from dla_cache.store.row_files import drop_former_rows, is_of_rows, write_rows
from dla_cache.store.rows import RowTable, StoredImage


def stored_rows(path: Path) -> RowTable | None:
    """The row table of the store at `path`; None if there is no store yet.

    Raises:
        StoreError: as `read_metadata` does.
    """
    return None if find_layout(path) is None else read_metadata(path).rows


def with_removed(stored: RowTable | None, wanted: RowTable) -> RowTable:
    """The rows of a manifest as a store that goes on with it has them: its removed images are there as removed.

    The rule: removed images aside, manifest and store list the same images, in the same order unless images were
    appended. Whether the manifest still lists removed ones does not matter, they stay removed. Rows that do not agree
    so come back as they are.
    """
    return stored if stored is not None and agree_but_for_removed(stored, wanted) else wanted


def agree_but_for_removed(one: RowTable, other: RowTable) -> bool:
    """Whether two tables have the same images, in the same order, without those that either has as removed.

    A table to which images were appended may have any order: it has its own for good.
    """
    if one == other:
        return True
    kept = [_without(rows, one.removed_ids | other.removed_ids) for rows in (one, other)]
    if any(len(rows.spans) > 1 for rows in (one, other)):
        kept = [sorted(images, key=lambda image: image.image_id) for images in kept]
    return (
        one.is_multi_label == other.is_multi_label
        and len(kept[0]) == len(kept[1])
        and all(_is_same_image(*pair) for pair in zip(*kept, strict=True))
    )


def appended_rows(path: Path, stored: RowTable, wanted: RowTable, shard_size: int) -> RowTable:
    """The rows of a store and, from the next shard on, those images of a manifest that it has not.

    Raises:
        RecipeMismatchError: if the manifest does not list all images of the store as they are there.
    """
    known, listed = ({image.image_id: image for image in rows} for rows in (stored, wanted))
    kept = [image for image in known.values() if not image.removed]
    lost = [image.image_id for image in kept if image.image_id not in listed]
    changed = [
        image.image_id
        for image in kept
        if image.image_id in listed and not _is_same_image(image, listed[image.image_id])
    ]
    for images, what in ((lost, "are not in the manifest"), (changed, "are otherwise in the manifest")):
        if images:
            raise RecipeMismatchError(
                f"{len(images)} images of `{path}` {what}: {name_some(images)}",
                hint="append to the list that the store was built from; `dla cache explain` tells what an image is",
            )
    new = [image for image in wanted if image.image_id not in known]
    first = -(-stored.end // shard_size) * shard_size
    added = RowTable([replace(image, row=first + place) for place, image in enumerate(new)],
                     is_multi_label=wanted.is_multi_label)  # fmt: skip
    return RowTable.of_parts([*stored.parts, *added.parts], is_multi_label=stored.is_multi_label)


def _without(rows: RowTable, image_ids: frozenset[str]) -> list[StoredImage]:
    return [image for image in rows if image.image_id not in image_ids]


def _is_same_image(one: StoredImage, other: StoredImage) -> bool:
    return one == replace(other, row=one.row)


def create_metadata(path: Path, wanted: StoreMetadata, *, append: bool = False) -> None:
    """Makes an empty store, or passes one that agrees; a series it does not have yet is added.

    Processes that do so at the same time wait for each other, so all get the same answer.

    Args:
        append: adds to a store the images of `wanted.rows` that it has not. Who has it open reads and writes on.

    Raises:
        RecipeMismatchError: if the store differs, saying in what: old → new.
        StoreError: if the folder holds other things or cannot be written.
    """
    with writing_to(path):
        make_folder(path)
        refuse_links(path)
        with locked_folder(path):
            if find_layout(path) is not None:
                stored = read_metadata(path)
                if append:
                    refuse_unfinished_removal(path)
                    stored = _extended(path, stored, wanted)
                    wanted = replace(wanted, rows=stored.rows)
                wanted = replace(wanted, recipes=as_stored(path, stored.recipes, wanted.recipes))
                check_agrees(path, stored, wanted)
                recipes = dict(sorted((stored.recipes | wanted.recipes).items()))
                images = wanted.images if stored.images is None else stored.images
                whole = replace(stored, recipes=recipes, images=images)
            else:
                check_is_new(path, wanted.layout)
                whole = wanted
            if not whole.rows_sha256:
                whole = replace(whole, rows_sha256=write_rows(path, whole.rows))
            for series, layout in whole.series.items():
                folder = (path / layout.files(0)[0]).parent
                if not commits_folder(path, series).is_dir():
                    check_holds_nothing(folder)
                make_folder(commits_folder(path, series))
                make_folder(folder)
            for name, content in whole.files(whole.rows_sha256).items():
                make_folder((path / name).parent)
                # Left alone where it agrees: a finished store may be on a read-only disk and still be "built" again.
                if not ((path / name).is_file() and read_file(path / name) == content):
                    write_durably(path / name, content)
            drop_former_rows(path, whole.rows_sha256)


def _extended(path: Path, stored: StoreMetadata, wanted: StoreMetadata) -> StoreMetadata:
    """A store's metadata with the images that it has not."""
    if stored.rows.is_multi_label != wanted.rows.is_multi_label or stored.class_names != wanted.class_names:
        return stored  # which does not agree, and is refused for it
    rows = appended_rows(path, stored.rows, wanted.rows, stored.shard_size)
    return stored if len(rows) == len(stored.rows) else replace(stored, rows=rows, rows_sha256="")


def check_is_new(path: Path, layout: Layout) -> None:
    """Passes a folder in which a store can begin: an empty one, or what a killed beginning left.

    Raises:
        StoreError: if it holds anything else.
    """
    others = [entry.name for entry in path.iterdir() if not layout.is_part(entry.name) and entry.suffix != ".tmp"]
    if others:
        raise StoreError(f"`{path}` holds other things, such as `{others[0]}`", hint=NEW_FOLDER)
    # A shard is committed only in a whole store, and new metadata could not tell whether it is that of these records.
    if any((path / "commits").glob("*/*")):
        raise StoreError(
            f"`{path}` holds commit records but has lost its `{layout.main_file}`",
            hint="restore it from a copy, or remove the folder and build again",
        )
    for entry in path.iterdir():
        if entry.is_dir() and entry.name not in ("claims", "commits", "rows"):
            check_holds_nothing(entry)
    strangers = [file for file in (path / "rows").glob("*") if not (is_of_rows(path, file) or is_temporary(file))]
    if strangers:
        raise StoreError(f"`{path / 'rows'}` holds other things, such as `{strangers[0].name}`", hint=NEW_FOLDER)


def check_holds_nothing(folder: Path) -> None:
    """Passes a folder that is absent or has no file but metadata: shards will lie in it, and be removed from it.

    Raises:
        StoreError: if something lies there, which is not ours.
    """
    for path in folder.rglob("*"):
        if not (path.is_dir() and not path.is_symlink()) and path.name != "zarr.json" and not is_temporary(path):
            raise StoreError(f"`{folder}` holds other things, such as `{path.name}`", hint=NEW_FOLDER)


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
    if stored.images is not None and wanted.images is not None:
        differences += changed_fields(stored.images.facts, wanted.images.facts, "images.")
    if differences:
        raise RecipeMismatchError(
            f"`{path}` was built from another spec, source or manifest: {'; '.join(differences)}",
            hint="name a new store, or go back to the old settings; `dla cache adopt` takes a change of source or paths"
            f" that is shown to be harmless{_other_ways(stored, wanted)}",
        )
    if stored.rows != wanted.rows:
        one_sided = sorted(stored.rows.removed_ids ^ wanted.rows.removed_ids)
        raise RecipeMismatchError(
            f"{len(one_sided)} images were removed from `{path}` and not from what goes into it, or the other way"
            f" round: {name_some(one_sided)}",
            hint="run the same command again if they were removed just now; else `dla cache takedown` removes them"
            " from the other store, too",
        )


def _other_ways(stored: StoreMetadata, wanted: StoreMetadata) -> str:
    ways = ""
    if len(wanted.rows) > len(stored.rows):
        ways += "; `--append` adds images to those there"
    if None not in (stored.images, wanted.images) and stored.images != wanted.images:
        ways += "; with `images: none` a build leaves the images there as they are"
    return ways


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
