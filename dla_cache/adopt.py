"""Harmless changes, declared: another recipe is taken for a store's own, or its images have other paths."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_cache.durable import write_durably
from dla_cache.errors import RecipeMismatchError, StoreError, name_some
from dla_cache.manifest import Manifest
from dla_cache.recompute import compare_live, draw_rows
from dla_cache.spec import Recipe
from dla_cache.store import LatentStore
from dla_cache.store.adopted import Adoption, Evidence, add_adoption, adopted_recipes
from dla_cache.store.metadata import sole_writer
from dla_cache.store.row_files import row_files, write_rows
from dla_cache.store.rows import RowTable, StoredImage

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource

WORDS_ONLY = ("format.space",)
"""Fields of a recipe that say in words what the numbers are, and decide none."""

OF_BYTES = ("modality", "writer_version", "format.")
"""Fields, or what they begin with, that decide how the bytes are read: no evidence makes another one harmless."""


def adopt_source(
    store: LatentStore,
    source: "LatentSource",
    image_root: Path | None,
    *,
    n_images: int | None,
    why: str,
    who: str,
    tolerance: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dry_run: bool = False,
) -> Adoption | None:
    """Declares that a source makes what the store holds, and records it; None if the store's recipe is this one anyway.

    A field that decides numbers needs evidence: random images are computed again and compared.

    Args:
        image_root: folder that the images' URIs start from; None for a store that holds their files.
        n_images: to compute again; None for none.
        tolerance: in the units of `dla_cache.recompute.Recomputed`.

    Raises:
        RecipeMismatchError: if a field differs that says how bytes are read, or the numbers differ beyond `tolerance`.
        StoreError: if evidence is needed and `n_images` is None, or the store cannot be written.
        MissingLatentError, ImageError, CorruptShardError: as `recompute`.
    """
    store.require_folder()
    modality = source.recipe.modality.value
    stored = store.recipe(modality)
    if source.recipe == stored or source.recipe in adopted_recipes(store.path, stored):
        return None
    changed = dict(_changed(stored.model_dump(mode="json"), source.recipe.model_dump(mode="json")))
    never = [name for name in changed if name.startswith(OF_BYTES) and name not in WORDS_ONLY]
    if never:
        raise RecipeMismatchError(
            f"`{store.path}` cannot adopt another {name_some(never)} of `{modality}`: it says how its bytes are read",
            hint="build a new store; `dla cache convert` changes layout and dtype",
        )
    decisive = [name for name in changed if name not in WORDS_ONLY]
    if decisive and n_images is None:
        raise StoreError(
            f"{name_some(decisive)} of `{modality}` decides the numbers, so that it is harmless has to be shown",
            hint="`--recompute 20` computes the latents of 20 random images again and compares them",
        )
    evidence = None
    if decisive and n_images is not None:
        rows = draw_rows(store, modality, n_images, seed)
        found = compare_live(store, source, image_root, rows)
        if found.largest_difference > tolerance:
            raise RecipeMismatchError(
                f"the change of {name_some(decisive)} is not harmless: {found.n_images - found.n_equal} of"
                f" {found.n_images} images have other latents of `{modality}`, the largest difference is"
                f" {found.largest_difference:.3g}, of `{found.worst}`",
                hint="nothing is adopted; build a new store, or say by `--tolerance` what difference does not matter",
            )
        evidence = Evidence(
            n_images=found.n_images,
            n_equal=found.n_equal,
            largest_difference=found.largest_difference,
            tolerance=tolerance,
            seed=seed,
            device=device,
        )
    adoption = Adoption(
        what=modality,
        changed=changed,
        n_images=store.rows.n_kept,
        stored_recipe=stored.hash,
        recipe=Recipe.model_validate(source.recipe.model_dump()),
        evidence=evidence,
        why=why,
        who=who,
        when=_now(),
    )
    if not dry_run:
        with sole_writer(store.path, store.metadata):
            add_adoption(store.path, adoption)
    return adoption


def adopt_paths(
    store: LatentStore, manifest: Manifest, *, why: str, who: str, dry_run: bool = False
) -> Adoption | None:
    """Gives the images of a store the paths that a manifest has for them, and records it; None if they have them.

    The bytes of an image are known by their sha256, so where they lie is harmless. Whoever has the store open is asked
    to open it again.

    Raises:
        RecipeMismatchError: if the manifest says anything else of an image that it lists, or lists not all of them.
        StoreError: if the store cannot be written.
    """
    store.require_folder()
    listed = {row.image_id: row for row in manifest.rows() if row.split in store.rows.splits}
    wanted: list[StoredImage] = []
    moved: list[tuple[str, str]] = []
    for image in store.rows:
        if image.removed:
            wanted.append(image)
            continue
        row = listed.get(image.image_id)
        if row is None or (row.sha256, row.split, row.label) != (image.sha256, image.split, image.label):
            fault = "does not list it" if row is None else "says otherwise of its bytes, split or label"
            raise RecipeMismatchError(
                f"only paths can be adopted from a manifest: of `{image.image_id}` it {fault}",
                hint="`dla cache explain` with this ID and `--manifest` shows what; build a new store from that",
            )
        if row.uri != image.uri:
            moved.append((image.uri, row.uri))
        wanted.append(replace(image, uri=row.uri))
    if not moved:
        return None
    adoption = Adoption(what="uri", changed={"uri": moved[0]}, n_images=len(moved), why=why, who=who, when=_now())
    if not dry_run:
        with sole_writer(store.path, store.metadata):
            add_adoption(store.path, adoption)
            _replace_rows(store, RowTable(wanted, is_multi_label=store.rows.is_multi_label))
    return adoption


def _replace_rows(store: LatentStore, rows: RowTable) -> None:
    """Puts another row table in place of the store's: it counts once the main file has its hash."""
    rows_sha256 = write_rows(store.path, rows)
    for name, content in replace(store.metadata, rows=rows).files(rows_sha256).items():
        write_durably(store.path / name, content)
    kept = row_files(LatentStore(store.path).rows, rows_sha256)
    for name in set(row_files(store.rows, store.metadata.rows_sha256)) - set(kept):
        (store.path / name).unlink()


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", (before, after)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
