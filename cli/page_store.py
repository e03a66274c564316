"""What a page says of the stores that runs were trained on: provenance, and what the latents cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dla_cache.control_recipe import control_note, first_source
from dla_cache.describe import ModalityStatus, StoreStatus, describe_store
from dla_cache.errors import RecipeMismatchError
from dla_cache.remote import is_remote
from dla_cache.sources import SOURCES
from dla_cache.spec import LatentFormat, Recipe
from dla_cache.store import open_store
from trainer.run_folder import DataFacts, digest_of_rows

UNKNOWN_LICENCE = "Not known to dla: ask whoever published the source"


@dataclass(frozen=True, slots=True)
class ModalityFacts:
    """One modality of a store: what made it and what it cost."""

    recipe: Recipe
    status: ModalityStatus
    build_seconds: float
    """Summed over shards: from the first image decoded to the latents in hand."""
    devices: tuple[str, ...]

    @property
    def images_per_s(self) -> float | None:
        """None for latents that were not computed but brought."""
        return self.status.images / self.build_seconds if self.build_seconds else None

    @property
    def summary(self) -> str | None:
        entry = SOURCES.get(self.recipe.source)
        return None if entry is None else entry.summary

    @property
    def licence(self) -> str:
        entry = SOURCES.get(first_source(self.recipe))
        return entry.licence if entry is not None else UNKNOWN_LICENCE

    @property
    def note(self) -> str | None:
        """A sentence that belongs beside every figure."""
        entry = SOURCES.get(self.recipe.source)
        note = control_note(self.recipe) or (entry.note if entry is not None else "")
        return f"{note[0].upper()}{note[1:]}." if note else None


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """A store as a page shows it. `place` is for telling stores apart, never for showing."""

    place: str
    """Absolute path, or URL."""
    status: StoreStatus
    shard_size: int
    modalities: tuple[ModalityFacts, ...]
    rows_sha256: str
    latents_sha256: dict[str, str]
    """Modality → content hash, where all of it is committed."""

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def identity(self) -> str:
        """What two stores have in common that hold the same."""
        return self.status.content_hash or self.place

    @property
    def spec_yaml(self) -> str | None:
        """A cache spec that builds these latents; None where a source is none of dla's."""
        if any(part.summary is None for part in self.modalities):
            return None
        latents: list[dict[str, Any]] = [
            {
                "modality": part.status.modality,
                "source": part.recipe.source,
                "parameters": dict(part.recipe.parameters),
                "seed": part.recipe.seed,
                # Codes have the dtype that holds them; a spec chooses that of continuous latents only.
                **({"dtype": part.recipe.format.built_dtype} if part.recipe.format.kind == "continuous" else {}),
            }
            for part in self.modalities
        ]
        return yaml.safe_dump({"latents": latents, "shard_size": self.shard_size}, sort_keys=False)

    def images_of(self, splits: Sequence[str]) -> int:
        """How many images some splits have together."""
        return sum(self.status.images_per_split.get(split, 0) for split in splits)


def read_store(place: str | Path) -> StoreFacts:
    """The store at a path or URL.

    Raises:
        StoreError: if there is none or it is damaged.
    """
    store = open_store(place)
    status = describe_store(store)
    modalities = []
    for part in status.modalities:
        records = store.committed(part.modality).values()
        seconds = math.fsum(record.seconds for record in records)
        devices = tuple(sorted({record.device for record in records}))
        modalities.append(ModalityFacts(store.recipe(part.modality), part, seconds, devices))
    whole = [part.modality for part in status.modalities if not part.shards_missing]
    return StoreFacts(
        place_of(place),
        status,
        store.shard_size,
        tuple(modalities),
        digest_of_rows(store),
        {modality: store.content_hash([modality]) for modality in whole},
    )


def place_of(place: str | Path) -> str:
    """A URL as it is, a path as an absolute one."""
    return str(place) if is_remote(str(place)) else str(Path(place).resolve())


def check_trained_on(store: StoreFacts, facts: DataFacts, run: str) -> None:
    """Passes a store that holds the images, labels and latents a run was trained on; it may have gained modalities.

    Raises:
        RecipeMismatchError: if it does not.
    """
    same_images = (facts.class_names, facts.rows_sha256) == (store.status.class_names, store.rows_sha256)
    if not same_images or not facts.latents_sha256.items() <= store.latents_sha256.items():
        what = "latents" if same_images else "images or labels"
        raise RecipeMismatchError(
            f"`{run}` was trained on other {what} than `{store.place}` holds",
            hint="name the store it was trained on with `--store`",
        )


def describe_format(part: LatentFormat) -> str:
    """Shape and dtype in words: `channel 8, height 4, width 4; float16`."""
    shape = ", ".join(f"{axis} {size}" for size, axis in zip(part.shape, part.axes, strict=True))
    codes = "" if part.vocabulary is None else f", {part.vocabulary} codes"
    return f"{shape}; {part.dtype}{codes}"
