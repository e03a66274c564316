"""What of a store's recipes and paths was declared a harmless change, by whom and why: `adopted.json`.

The store stays what it is, with the recipes it was built by; the record says which other ones are taken for them from
then on. It decides nothing for readers, and is no part of the content hash.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dla_cache.durable import write_durably
from dla_cache.errors import StoreError
from dla_cache.spec import Recipe, RecordModel
from dla_cache.store.layout import read_json, sealed
from dla_cache.store.parts import ADOPTED


class Evidence(RecordModel):
    """Latents that were computed again with what was adopted, and compared with those in the store."""

    n_images: int
    n_equal: int
    """With the same bytes."""
    largest_difference: float
    """In the units of `dla_cache.recompute.Recomputed`."""
    tolerance: float
    seed: int
    device: str


class Adoption(RecordModel):
    """One change that was declared harmless."""

    what: str
    """A modality, or `uri` of the row table."""
    changed: dict[str, tuple[Any, Any]]
    """Every field that differs: before and after. Of `uri` the first image that has another one."""
    n_images: int
    """Images of the store that it concerns."""
    stored_recipe: str = ""
    """Hash of the store's own recipe; of modalities only."""
    recipe: Recipe | None = None
    """What is taken for it."""
    evidence: Evidence | None = None
    """None where no field decides numbers."""
    why: str
    who: str
    when: str
    """UTC, ISO 8601."""


def read_adoptions(store: Path) -> tuple[Adoption, ...]:
    """What was adopted so far, the first first.

    Raises:
        StoreError: if the record is not the one that was written.
    """
    path = store / ADOPTED
    if not path.exists():
        return ()
    try:
        record = read_json(path)
        if sealed({name: value for name, value in record.items() if name != "sha256"}) != record:
            raise ValueError("it does not have its hash")
        return tuple(Adoption.model_validate(one) for one in record["adopted"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise StoreError(
            f"`{path}` is not the record that was written: {error}",
            hint="restore it from a copy, or remove it and run `dla cache adopt` again",
        ) from error


def content_of(adoptions: tuple[Adoption, ...]) -> bytes:
    """The bytes of the record."""
    record = sealed({"adopted": [adoption.model_dump(mode="json") for adoption in adoptions]})
    return json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def add_adoption(store: Path, adoption: Adoption) -> None:
    """Records one more. The caller is the store's `sole_writer`.

    Raises:
        OSError: if the disk refuses.
    """
    write_durably(store / ADOPTED, content_of((*read_adoptions(store), adoption)))


def adopted_recipes(store: Path, stored: Recipe) -> list[Recipe]:
    """The recipes that are taken for one of the store's, the last adopted first."""
    return [
        adoption.recipe
        for adoption in reversed(read_adoptions(store))
        if adoption.recipe is not None and adoption.stored_recipe == stored.hash
    ]


def as_stored(store: Path, stored: Mapping[str, Recipe], wanted: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The wanted recipes, with the store's own in place of each that was adopted for it."""
    return {
        modality: stored[modality]
        if modality in stored and recipe in adopted_recipes(store, stored[modality])
        else recipe
        for modality, recipe in wanted.items()
    }
