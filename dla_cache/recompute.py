"""Latents computed again from the images and compared with what the store holds: cache = live, shown on a sample."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dla_cache.encoding import encode_batch
from dla_cache.errors import MissingLatentError, RecipeMismatchError, SourceError
from dla_cache.images import Pixels, centre_square, decode_image
from dla_cache.order import generator
from dla_cache.spec import ORIGINAL_IMAGES, CacheSpec, LatentFormat, LatentSpec
from dla_cache.store import LatentStore
from dla_cache.store.adopted import adopted_recipes
from dla_cache.store.content import as_stored
from dla_cache.store.creation import changed_fields
from dla_cache.store.rows import StoredImage
from dla_cache.stored_images import image_contents

if TYPE_CHECKING:
    from dla_cache.sources import LatentSource

BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What became of a sample of one modality."""

    modality: str
    n_images: int
    n_equal: int
    """With the same bytes."""
    largest_difference: float
    """Of continuous latents in standard deviations of the channel; of codes the largest share of an image's codes that
    differ."""
    worst: str | None
    """The image with the largest difference; None if all are equal."""
    is_within: bool = True
    """Whether no number differs by more than what the source says that other images in its batch may make, and the
    rounding of the numbers that are stored."""


def recompute(
    store: LatentStore,
    image_root: Path | None,
    n_images: int,
    *,
    open_source: Callable[[LatentSpec, str], "LatentSource"],
    modalities: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    spec: CacheSpec | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Recomputed]:
    """Computes the latents of random images again and compares them with those in the store.

    Args:
        image_root: folder that the images' URIs start from; None for a store that holds their files.
        n_images: of each modality; all that are committed if there are fewer.
        modalities: None for all of the store's.
        spec: what the store was built of, where recipes and records do not tell where weights lie: they hold no paths.

    Raises:
        SourceError: if a source cannot be opened here, such as that of imported latents.
        RecipeMismatchError: if the source here is another one, say of other weights.
        MissingLatentError: if nothing is committed, or there is no `image_root` and the store holds no files.
        ImageError: if an image is missing or has changed.
        CorruptShardError: if a stored latent is damaged.
    """
    if image_root is None and not holds_files(store):
        held = f"`{store.place}` holds {'no images' if store.metadata.images is None else 'smaller pictures'}"
        raise MissingLatentError(f"{held}: its sources saw the files", hint="name the folder the images lie in")
    chosen = store.modalities if modalities is None else tuple(modalities)
    rows_of = {name: draw_rows(store, name, n_images, seed) for name in chosen}
    total, before, results = sum(len(rows) for rows in rows_of.values()), 0, []
    for name, rows in rows_of.items():
        with closing(open_again(store, name, open_source, device, spec)) as source:

            def advance(done: int, before: int = before) -> None:
                on_progress(before + done, total)

            results.append(compare_live(store, source, image_root, rows, on_progress=advance))
        before += len(rows)
    return results


def compare_live(
    store: LatentStore,
    source: "LatentSource",
    image_root: Path | None,
    rows: NDArray[np.int64],
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Recomputed:
    """What a source makes of the images of some rows, [n], beside what the store holds of its modality.

    Raises:
        MissingLatentError, ImageError, CorruptShardError: as `recompute`.
    """
    name = source.recipe.modality.value
    stored, live = store.read(name, rows), []
    for start in range(0, len(rows), BATCH_SIZE):
        images = store.rows.images_of(rows[start : start + BATCH_SIZE])
        views = list(views_of(store, image_root, images, source.recipe.source_view_size))
        image_ids = [image.image_id for image in images]
        put_out = encode_batch(source, image_ids, views)
        live.append(as_stored(put_out, store.recipe(name).format, image_ids))
        on_progress(start + len(images))
    latent_format, tolerance = store.recipe(name).format, float(getattr(source, "tolerance", 0.0))
    largest = differences(stored, np.concatenate(live), latent_format)
    worst = int(largest.argmax())
    return Recomputed(
        name,
        len(rows),
        int((largest == 0).sum()),
        float(largest[worst]),
        store.rows.image_ids[rows[worst]] if largest[worst] else None,
        not largest[worst] or is_within(stored, np.concatenate(live), latent_format, tolerance),
    )


def holds_files(store: LatentStore) -> bool:
    """Whether a store holds the very files that its sources saw, and not pictures made of them, or none."""
    return store.metadata.images == ORIGINAL_IMAGES


def draw_rows(store: LatentStore, modality: str, n_images: int, seed: int) -> NDArray[np.int64]:
    """Random rows whose latents are committed, rising, [≤ n_images].

    Raises:
        MissingLatentError: if there is none.
    """
    committed = store.committed(modality)
    kept = [store.kept_rows(shard) for shard in store.shards if shard.index in committed]
    rows = np.concatenate(kept) if kept else np.empty(0, np.int64)
    if not len(rows):
        raise MissingLatentError(f"no latent of `{modality}` is committed in `{store.place}`", hint="build the store")
    return np.sort(generator(seed).permutation(rows)[:n_images])


def open_again(
    store: LatentStore,
    modality: str,
    open_source: Callable[[LatentSpec, str], "LatentSource"],
    device: str,
    of: CacheSpec | None = None,
) -> "LatentSource":
    """The source that made a modality, found by its recipe or by the last one that was adopted for it; its weights
    where the commit records say that they came from, or all of it as a spec says.

    Raises:
        SourceError: if it cannot be opened.
        RecipeMismatchError: if what is found makes other latents.
    """
    recipe = next(iter(adopted_recipes(store.path, store.recipe(modality))), store.recipe(modality))
    spec = next((entry for entry in of.latents if entry.modality == modality), None) if of is not None else None
    if spec is None:
        fields = recipe.model_dump(include={"modality", "source", "seed"})
        if recipe.format.vocabulary is None:
            fields["dtype"] = recipe.format.built_dtype
        draws = {"draws": recipe.format.n_draws}
        parameters = {"parameters": {**recipe.parameters, **weights_of(store, modality)}}
        spec = LatentSpec.model_validate(fields | draws | parameters)
    try:
        source = open_source(spec, device)
    except SourceError as error:
        raise SourceError(
            f"latents of `{modality}` cannot be computed again: {error.message}", hint=error.hint or "name modalities"
        ) from error
    if source.recipe.hash != recipe.as_built.hash:
        old, new = (one.model_dump(mode="json") for one in (recipe.as_built, source.recipe))
        source.close()
        raise RecipeMismatchError(
            f"`{recipe.source}` is another source here than the one that made `{modality}` of `{store.place}`:"
            f" {'; '.join(changed_fields(old, new))}",
            hint="install the version of source and weights that made the store, or show by `dla cache adopt` that this"
            " one makes the same",
        )
    return source


def weights_of(store: LatentStore, modality: str) -> dict[str, str]:
    """The parameters that name repositories of weights and their commits, as the records have them."""
    record = next(iter(store.committed(modality).values()))
    named = {
        name.removesuffix("_commit"): value for name, value in record.made_with.items() if name.endswith("_commit")
    }
    parameters = {}
    for name, commit in named.items():
        parameters[name] = str(record.made_with[name])
        parameters["revision" if name == "model" else f"{name}_revision"] = str(commit)
    return parameters


def views_of(store: LatentStore, image_root: Path | None, images: Sequence[StoredImage], size: int) -> Iterator[Pixels]:
    """What a source sees of each image, uint8 [3, size, size]."""
    contents = image_contents(store, image_root, [image.row for image in images])
    for image, content in zip(images, contents, strict=True):
        yield centre_square(decode_image(content, image.image_id), size)


def is_within(stored: NDArray[np.generic], live: NDArray[np.generic], latent: LatentFormat, tolerance: float) -> bool:
    """Whether latents [B, *shape] are equal but for a tolerance, and the last bit of the dtype that they lie in."""
    if latent.vocabulary is not None or not tolerance:
        return stored.tobytes() == live.tobytes()
    before, after = stored.astype(np.float64), live.astype(np.float64)
    if latent.quantisation is not None:
        last_bit = np.broadcast_to(max(latent.quantisation.scale), before.shape)
    else:
        bits = {"float16": 10, "bfloat16": 7, "float32": 23}[latent.dtype]
        last_bit = np.ldexp(1.0, np.frexp(np.maximum(np.abs(before), np.abs(after)))[1] - 1 - bits)
    return bool((np.abs(before - after) <= tolerance + last_bit).all())


def differences(stored: NDArray[np.generic], live: NDArray[np.generic], latent: LatentFormat) -> NDArray[np.float64]:
    """For each of B images the largest difference, [B], in the units of `Recomputed`; 0 for equal bytes alone."""
    of_image = tuple(range(1, stored.ndim))
    if latent.vocabulary is not None:
        return np.asarray((stored != live).mean(axis=of_image), np.float64)
    is_equal = np.array([one.tobytes() == other.tobytes() for one, other in zip(stored, live, strict=True)])
    before, after = stored.astype(np.float64), live.astype(np.float64)
    channel = latent.channel_axis + 1
    std = before.std(axis=tuple(axis for axis in range(stored.ndim) if axis != channel), keepdims=True)
    smallest = np.finfo(np.float32).tiny  # -0 and 0 differ in their bytes and in nothing else
    distance = (np.abs(before - after) / np.maximum(std, smallest)).max(axis=of_image)
    return np.where(is_equal, 0.0, np.maximum(distance, smallest))
