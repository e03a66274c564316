"""A plan is made: sources are opened, the store is looked at, and a few real batches are timed. Nothing is written."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dla_cache import __version__
from dla_cache.encoding import Encoder, check_latents
from dla_cache.errors import ImageError, SourceError
from dla_cache.images import Pixels, centre_square, decode_image, read_image_bytes
from dla_cache.manifest import path_of
from dla_cache.plan import CachePlan, ModalityPlan, SeriesPlan, read_listed
from dla_cache.remote import is_remote
from dla_cache.sources.catalog import SOURCES
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store.layout import IMAGES
from dla_cache.store.rows import StoredImage
from dla_cache.survey import Survey, Todo, survey_build

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource


@dataclass(frozen=True, slots=True)
class Terms:
    """What a plan is to reckon with, beside what it measures."""

    devices: int = 1
    price_per_hour: float = 0.0
    epochs: int = 100
    students: int = 1


def make_plan(
    manifest_path: Path,
    spec: CacheSpec,
    store_place: str,
    *,
    open_source: "Callable[[LatentSpec, str], LatentSource]",
    image_root: Path | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    n_batches: int = 3,
    append: bool = False,
    terms: Terms = Terms(),
    on_batch: Callable[[int, int, str], None] = lambda _done, _total, _modality: None,
) -> CachePlan:
    """Opens the sources, looks at store and manifest, and times a few batches after one to warm up. Writes nothing.

    Args:
        device: what the build is to run on; of several the first is timed.
        on_batch: told after each batch how many of how many are done, and of which modality.

    Raises:
        ManifestError, ImageError: if the manifest cannot be read, or none of the looked-at images can.
        SourceError: if a source cannot be opened, fails, or puts out no latent at all.
        StoreError: if the build would be refused: another spec, other things at the place, no access.
    """
    manifest, manifest_sha256 = read_listed(manifest_path, image_root)
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(open_source(entry, device.split(",")[0]))) for entry in spec.latents]
        recipes = {source.recipe.modality.value: source.recipe for source in sources}
        survey = survey_build(manifest, spec, store_place, recipes, append=append)
        n_timed = sum(bool(survey.todo[name].n_images) for name in recipes) * (n_batches + 1)
        n_done = 0
        latents = {}
        for source, entry in zip(sources, spec.latents, strict=True):
            name = source.recipe.modality.value
            todo, encoder = survey.todo[name], Encoder(source, batch_size)
            timed = []
            for images in _batches(survey, todo, (n_batches + 1) if todo.n_images else 0, batch_size):
                timed.append(_time_batch(encoder, images, manifest.root))
                n_done += 1
                on_batch(n_done, n_timed, name)
            latents[name] = _modality_plan(entry, encoder, todo, timed[1:])  # the first one warms up
    return CachePlan(
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        dla=__version__,
        manifest=str(manifest_path),
        manifest_sha256=manifest_sha256,
        images=None if image_root is None else str(image_root),
        store=store_place,
        is_there=survey.is_there,
        append=append,
        repair=survey.has_damage,
        device=device,
        batch_size=batch_size,
        devices=terms.devices,
        price_per_hour=terms.price_per_hour,
        epochs=terms.epochs,
        students=terms.students,
        n_images=survey.rows.n_kept,
        free_bytes=free_bytes(store_place),
        spec=spec,
        latents=latents,
        stored_images=_series_plan(survey.todo[IMAGES]) if IMAGES in survey.todo else None,
    )


@dataclass(frozen=True, slots=True)
class _Timed:
    """What one batch took."""

    read_seconds: float
    """Of an image, on one core."""
    seconds: float
    """Of an image, on the device."""


def _batches(survey: Survey, todo: Todo, n_batches: int, batch_size: int) -> list[list[StoredImage]]:
    """Batches of images that lie evenly among those to do; the same ones again where these are too few."""
    places = np.linspace(0, todo.n_images - 1, n_batches * batch_size).astype(int)
    mixed = places.reshape(batch_size, n_batches).T  # a batch has images of all parts, as one of a shuffled list
    return [survey.rows.images_of(todo.rows[batch]) for batch in mixed]


def _time_batch(encoder: Encoder, images: Sequence[StoredImage], root: Path) -> _Timed:
    started = time.perf_counter()
    views: list[tuple[str, Pixels]] = []
    fault = None
    for image in images:
        try:
            content = read_image_bytes(path_of(root, image.uri), image)
            view = centre_square(decode_image(content, image.image_id), encoder.recipe.source_view_size)
            views.append((image.image_id, view))
        except ImageError as error:  # one of many is what the build tells of, and puts aside
            fault = error
    if not views and fault is not None:
        raise fault
    read_seconds = (time.perf_counter() - started) / len(views)
    filled = [views[place % len(views)] for place in range(len(images))]
    ids = [image_id for image_id, _ in filled]
    seeds = [list(of_draw) for of_draw in zip(*map(encoder.seeds_of, ids), strict=True)]
    put_out = encoder.put_out(np.stack([view for _, view in filled]), seeds, ids)
    latents = check_latents(put_out, encoder.recipe.format, ids)
    if len(latents.bad) == len(ids):
        raise SourceError(
            f"`{encoder.recipe.source}` has no latent for any of {len(views)} images: {latents.bad[0]}",
            hint="look at them and at the source's parameters",
        )
    return _Timed(read_seconds, put_out.seconds / len(images))


def _modality_plan(entry: LatentSpec, encoder: Encoder, todo: Todo, timed: Sequence[_Timed]) -> ModalityPlan:
    known = SOURCES.get(entry.source)
    return ModalityPlan(
        **_series_plan(todo).model_dump(),
        source=entry.source,
        licence=(known.licence if known is not None else "") or "not known to dla",
        is_gated=known is not None and known.is_gated,
        recipe=encoder.recipe,
        batch_size=encoder.batch_size,
        batch_seconds=tuple(one.seconds * encoder.batch_size for one in timed),
        read_seconds=float(np.median([one.read_seconds for one in timed])) if timed else 0.0,
    )


def _series_plan(todo: Todo) -> SeriesPlan:
    return SeriesPlan(
        images=todo.n_images, reasons=todo.reasons, size_bytes=todo.size_bytes, bytes_per_image=todo.bytes_per_image
    )


def free_bytes(store_place: str) -> int | None:
    """Of the disk that a store lies on, or would; None below a prefix of an object store."""
    if is_remote(store_place):
        return None
    path = Path(store_place).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
