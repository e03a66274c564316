"""What a store says of itself: row table, class map, shard size, and a recipe per modality.

`zarr.json` of the group is written last, so a folder that has it is a whole store. It holds the
hashes of all the rest, and one of its own attributes: commit records cover latents, these cover the
labels, splits and class names that a run takes from the store without a manifest.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dla_cache.durable import locked_folder, make_folder, write_durably, writing_to
from dla_cache.errors import RecipeMismatchError, StoreError
from dla_cache.spec import Recipe, canonical_json
from dla_cache.store.layout import FORMAT, array_folder, array_metadata, commits_folder, group_metadata
from dla_cache.store.rows import RowTable

PARTS = {"zarr.json", "rows.parquet", "latents", "commits"}
"""All that lies in a store's folder."""


@dataclass(frozen=True, slots=True)
class StoreMetadata:
    """What decides the place of every sample and the meaning of its numbers."""

    rows: RowTable
    class_names: tuple[str, ...]
    shard_size: int
    recipes: dict[str, Recipe]
    """By modality, in alphabetical order."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the attribute `dla` of the Zarr group says in plain words."""
        return {"format": FORMAT, "shard_size": self.shard_size, "class_names": list(self.class_names)}


def read_metadata(path: Path) -> StoreMetadata:
    """The metadata of the store at `path`.

    Raises:
        StoreError: if there is no store, it is damaged, or its format is not that of this code.
    """
    try:
        if not (path / "zarr.json").is_file():
            raise StoreError(f"`{path}` is no store", hint="check the path; `dla cache build` makes one")
        attributes = read_json(path / "zarr.json")["attributes"]["dla"]
        if attributes["format"] != FORMAT:
            raise StoreError(
                f"`{path}` has format `{attributes['format']}`, this dla reads `{FORMAT}`",
                hint="upgrade dla if it is newer; if it is older, build it again in a new folder",
            )
        if sealed({name: value for name, value in attributes.items() if name != "sha256"}) != attributes:
            raise _changed(path, "class map or another setting in `zarr.json`")
        rows = (path / "rows.parquet").read_bytes()
        if hashlib.sha256(rows).hexdigest() != attributes["rows_sha256"]:
            raise _changed(path, "row table `rows.parquet`")
        recipes = {}
        for modality, recipe_hash in sorted(attributes["recipes"].items()):
            array = read_json(array_folder(path, modality) / "zarr.json")
            recipes[modality] = Recipe.model_validate(array["attributes"]["dla"]["recipe"])
            if recipes[modality].hash != recipe_hash:
                raise _changed(path, f"recipe of `{modality}`")
        return StoreMetadata(
            rows=RowTable.from_parquet(rows),
            class_names=tuple(attributes["class_names"]),
            shard_size=attributes["shard_size"],
            recipes=recipes,
        )
    except StoreError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"the metadata of `{path}` is damaged: {error}",
            hint="restore its `zarr.json` files and `rows.parquet` from a copy",
        ) from error


def sealed(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with the sha256 of all of them."""
    return {**attributes, "sha256": hashlib.sha256(canonical_json(attributes).encode()).hexdigest()}


def _changed(path: Path, what: str) -> StoreError:
    return StoreError(
        f"the {what} of `{path}` is not the one that was written",
        hint="restore it from a copy, or build again in a new folder",
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def create_metadata(path: Path, wanted: StoreMetadata) -> None:
    """Makes an empty store, or passes one that agrees; a modality it does not have yet is added.

    Processes that do so at the same time wait for each other, so all get the same answer.

    Raises:
        RecipeMismatchError: if the store differs, saying in what: old → new.
        StoreError: if the folder holds other things or cannot be written.
    """
    with writing_to(path):
        make_folder(path)
        with locked_folder(path):
            if (path / "zarr.json").is_file():
                stored = read_metadata(path)
                check_agrees(path, stored, wanted)
                recipes = stored.recipes | wanted.recipes
            else:
                check_is_new(path)
                write_durably(path / "rows.parquet", wanted.rows.to_parquet())
                recipes = wanted.recipes
            make_folder(path / "latents")
            for modality, recipe in wanted.recipes.items():
                make_folder(commits_folder(path, modality))
                make_folder(array_folder(path, modality))
                _write_json(array_folder(path, modality), array_metadata(recipe, len(wanted.rows), wanted.shard_size))
            _write_json(path / "latents", group_metadata({}))
            facts = {
                # Of the bytes as they lie there: another version of Parquet's writer would make others.
                "rows_sha256": hashlib.sha256((path / "rows.parquet").read_bytes()).hexdigest(),
                "recipes": {modality: recipe.hash for modality, recipe in recipes.items()},
            }
            _write_json(path, group_metadata(sealed(wanted.settings | facts)))


def check_is_new(path: Path) -> None:
    """Passes a folder in which a store can begin: an empty one, or what a killed beginning left.

    Raises:
        StoreError: if it holds anything else.
    """
    others = [entry.name for entry in path.iterdir() if entry.name not in PARTS and entry.suffix != ".tmp"]
    if others:
        raise StoreError(f"`{path}` holds other things, such as `{others[0]}`", hint="name a new or empty folder")
    # A shard is committed only in a whole store, and new metadata could not tell whether it is that of these records.
    if any((path / "commits").glob("*/*")):
        raise StoreError(
            f"`{path}` holds commit records but has lost its `zarr.json`",
            hint="restore it from a copy, or remove the folder and build again",
        )


def check_agrees(path: Path, stored: StoreMetadata, wanted: StoreMetadata) -> None:
    """Passes if both say the same of everything that both have.

    Raises:
        RecipeMismatchError: naming every field that differs: old → new.
    """
    differences = list(changed_fields(stored.settings, wanted.settings))
    if stored.rows != wanted.rows:
        differences.append(f"row table: {_first_difference(stored.rows, wanted.rows)}")
    for modality in stored.recipes.keys() & wanted.recipes.keys():
        old, new = (metadata.recipes[modality].model_dump(mode="json") for metadata in (stored, wanted))
        differences += changed_fields(old, new, f"{modality}.")
    if differences:
        raise RecipeMismatchError(
            f"`{path}` was built from another spec, source or manifest: {'; '.join(differences)}",
            hint="name a new store, or go back to the old settings; a store is never changed in place",
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


def _write_json(folder: Path, metadata: Mapping[str, Any]) -> None:
    content = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path = folder / "zarr.json"
    # Left alone where it agrees: a finished store may be on a read-only disk and still be "built" again.
    if not (path.is_file() and path.read_bytes() == content):
        write_durably(path, content)
