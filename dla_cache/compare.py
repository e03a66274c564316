"""What is different in two stores: recipes, images, labels, latents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dla_cache.store import LatentStore
from dla_cache.store.creation import changed_fields

BATCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class StoreDiff:
    """What two stores differ in; IDs of images that were removed count as absent."""

    settings: tuple[str, ...]
    """Class names and recipes: field, old → new."""
    only_before: dict[str, tuple[str, ...]]
    """`images`, and each modality, that only the first store has: IDs, or all images for a modality."""
    only_after: dict[str, tuple[str, ...]]
    rows: dict[str, tuple[str, ...]]
    """`sha256`, `label` or `split` → the images of both that differ in it."""
    latents: dict[str, tuple[str, ...]]
    """Modality of both → the images of both whose bytes differ."""
    n_compared: int
    """Images of both stores."""

    @property
    def is_empty(self) -> bool:
        """Whether both hold the same, however it lies on disk."""
        return not (self.settings or self.only_before or self.only_after or any(self.rows.values()) or self.has_latents)

    @property
    def has_latents(self) -> bool:
        """Whether a latent differs."""
        return any(self.latents.values())


def compare_stores(
    before: LatentStore, after: LatentStore, *, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> StoreDiff:
    """Reads every latent that both stores have and compares the bytes, joined by image ID.

    Raises:
        IncompleteBuildError: if a modality of both is not whole in one of them.
        CorruptShardError: if a latent is damaged.
    """
    stores = (before, after)
    names = [name for name in before.modalities if name in after.modalities]
    for store in stores:
        store.require_complete(names)
    row_of = [store.rows.row_by_id for store in stores]
    common = [image_id for image_id in row_of[0] if image_id in row_of[1]]
    rows = [np.array([of[image_id] for image_id in common], np.int64) for of in row_of]
    settings = list(changed_fields({"class_names": list(before.class_names)}, {"class_names": list(after.class_names)}))
    latents: dict[str, tuple[str, ...]] = {}
    for number, name in enumerate(names):
        old, new = (store.recipe(name).model_dump(mode="json") for store in stores)
        settings += changed_fields(old, new, f"{name}.")
        differing: list[str] = []
        for start in range(0, len(common), BATCH_SIZE):
            stop = start + BATCH_SIZE
            one, other = (store.read(name, of[start:stop]) for store, of in zip(stores, rows, strict=True))
            differing += [
                image_id
                for image_id, latent, twin in zip(common[start:stop], one, other, strict=True)
                if latent.tobytes() != twin.tobytes()
            ]
            on_progress(number * len(common) + min(stop, len(common)), len(names) * len(common))
        latents[name] = tuple(differing)
    pairs = [(before.rows[int(one)], after.rows[int(other)]) for one, other in zip(*rows, strict=True)]
    return StoreDiff(
        settings=tuple(settings),
        only_before=_only(before, after, row_of[0], row_of[1]),
        only_after=_only(after, before, row_of[1], row_of[0]),
        rows={
            name: tuple(one.image_id for one, other in pairs if getattr(one, name) != getattr(other, name))
            for name in ("sha256", "label", "split")
        },
        latents=latents,
        n_compared=len(common),
    )


def _only(
    store: LatentStore, other: LatentStore, own: dict[str, int], others: dict[str, int]
) -> dict[str, tuple[str, ...]]:
    surplus = {name: store.rows.kept_ids for name in store.modalities if name not in other.modalities}
    images = tuple(image_id for image_id in own if image_id not in others)
    return surplus | ({"images": images} if images else {})
