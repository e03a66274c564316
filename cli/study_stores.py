"""The stores of a study: those it names, those made from them, and the embedded data where it asks for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.demo import build_embedded_cache, build_embedded_store
from cli.render import ProgressReporter
from dla_cache.errors import SpecError, name_some
from dla_cache.remote import is_remote

if TYPE_CHECKING:
    from dla_cache.store import LatentStore
    from trainer.study_entries import StoreEntry
    from trainer.study_plan import StudyStore
    from trainer.study_spec import StudySpec

MODALITIES = {"relief-digits": None, "relief-digits-depth": ("depth",)}
"""Whose latents are built of the embedded data."""


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store of a study, and what is to be known of it."""

    store: "LatentStore"
    facts: "StudyStore"
    """What addresses of runs depend on."""
    build_seconds: Mapping[str, float]
    """Modality → seconds that building its latents took."""


def open_stores(
    spec: "StudySpec", base: Path, out: Path, *, should_stop: Callable[[], bool]
) -> dict[str | None, OpenedStore]:
    """The stores by the names that arms give them, None for the study's own.

    Embedded data and controls are made in `out`, unless they are there.

    Args:
        base: folder that places in the spec are relative to.

    Raises:
        StoreError: if a store cannot be opened or written.
        SpecError: if a control makes no sense of the store.
        WorkInterrupted: if `should_stop` said so.
    """
    from dla_cache.data.export import TRUTH_NAME
    from dla_cache.store import open_store
    from trainer.study_plan import store_facts
    from trainer.study_records import build_seconds

    check_entries(spec.stores)
    opened: dict[str | None, LatentStore] = {}
    places: dict[str | None, str] = {}
    images: str | None
    if spec.data is not None:
        places[None], images = str((out / "cache.zarr").absolute()), str((out / "data").absolute())
        opened[None], _, _ = build_embedded_cache(out, modalities=MODALITIES[spec.data], should_stop=should_stop)
    else:
        assert spec.store is not None
        places[None] = place_of(spec.store, base)
        images = None if spec.images is None else str(base / spec.images)
        opened[None] = open_store(places[None])
    for name, entry in spec.stores.items():
        if entry.path is not None:
            places[name] = place_of(entry.path, base)
            opened[name] = open_store(places[name])
            check_images(name, opened[name], opened[None])
            continue
        if entry.source is not None:
            folder = build_of_source(name, entry, out, should_stop)
        else:
            truth = None if spec.data is None else out / "data" / TRUTH_NAME
            folder = build_control(name, entry, opened[None], base, out, truth, should_stop)
        places[name], opened[name] = str(folder.absolute()), open_store(folder)
    return {
        name: OpenedStore(store, store_facts(store, places[name], images), build_seconds(store))
        for name, store in opened.items()
    }


def check_images(name: str, store: "LatentStore", own: "LatentStore") -> None:
    """Looks whether a store has the images of the study's own, in whatever order: runs are paired by them, and the
    leak audit looks at those alone.

    Raises:
        SpecError: if an image, its bytes, label or split differ.
    """
    rows = [{(row.image_id, row.sha256, row.split, row.label, row.removed) for row in one.rows} for one in (store, own)]
    differing = sorted({row[0] for row in rows[0] ^ rows[1]})
    if differing:
        raise SpecError(
            f"`stores.{name}` is not of the same images as the study's own store, or not with the same splits and "
            f"labels: {len(differing)} differ, {name_some(differing)}",
            hint="build it from the same manifest; what was removed from one store, remove from the other",
        )


def place_of(place: str, base: Path) -> str:
    """A place in the spec, as seen from anywhere."""
    return place if is_remote(place) else str(base / place)


def check_entries(entries: "Mapping[str, StoreEntry]") -> None:
    """Looks at all names of controls and sources, before anything is built.

    Raises:
        SpecError: if there is no such control, or no such embedded source.
    """
    from dla_cache.control_recipe import MEANINGS
    from dla_cache.sources.catalog import SOURCES

    embedded = [name for name in SOURCES if name.startswith("embedded-")]
    for name, entry in entries.items():
        for what, said, known in (("control", entry.control, [*MEANINGS]), ("source", entry.source, embedded)):
            if said is not None and said not in known:
                raise SpecError(
                    f"`stores.{name}.{what}` is `{said}`, which is no {what}",
                    hint=f"one of {name_some(known, shown=len(known))}",
                )


def build_of_source(name: str, entry: "StoreEntry", out: Path, should_stop: Callable[[], bool]) -> Path:
    """Builds what another source makes of the embedded data, or goes on with it, and gives its folder.

    Raises:
        WorkInterrupted: if `should_stop` said so.
    """
    from dla_cache.sources.catalog import SOURCES
    from dla_cache.spec import CacheSpec, LatentSpec

    assert entry.source is not None
    known = [one for one in SOURCES if one.startswith("embedded-")]
    if entry.source not in known:
        raise SpecError(
            f"`stores.{name}.source` is `{entry.source}`, which is no embedded source",
            hint=f"one of {name_some(known)}",
        )
    latents = LatentSpec(modality=SOURCES[entry.source].modality, source=entry.source, seed=entry.seed)
    folder = out / "stores" / f"{name}-{entry.source}-{entry.seed}.zarr"
    build_embedded_store(out, CacheSpec(latents=(latents,)), folder, should_stop=should_stop)
    return folder


def build_control(
    name: str,
    entry: "StoreEntry",
    real: "LatentStore",
    base: Path,
    out: Path,
    truth: Path | None,
    should_stop: Callable[[], bool],
) -> Path:
    """Makes a control store of the study's own, or goes on with it, and gives its folder.

    The folder is named by all that decides the control: another seed is another store.

    Args:
        truth: table of the labels of all images, where they are known.

    Raises:
        SpecError: if it makes no sense of the store.
    """
    from dla_cache.control_recipe import MEANINGS
    from dla_cache.controls import USED_BY, control_store
    from dla_cache.store import open_store
    from trainer.study_plan import address_of

    kind = next(known for known in MEANINGS if known == entry.control)
    decides: dict[str, Any] = entry.model_dump(mode="json") | {"real": real.content_hash()}
    folder = out / "stores" / f"{name}-{address_of(decides)[:8]}.zarr"
    labels = None if entry.labels is None else base / entry.labels
    if labels is None and kind in USED_BY["labels"]:
        labels = truth
    with ProgressReporter(f"control {name}", "shards") as reporter:
        control_store(
            real,
            folder,
            kind=kind,
            seed=entry.seed,
            modalities=entry.modalities,
            labels=labels,
            noise=entry.noise,
            features=None if entry.features is None else open_store(place_of(entry.features, base)),
            on_progress=reporter.update,
            should_stop=should_stop,
        )
    return folder
