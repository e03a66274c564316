"""Latents that somebody else made, from a folder of files into a store; the images are not opened."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from dla_cache.card import write_card
from dla_cache.errors import (
    LatentShapeError,
    MissingLatentError,
    NonFiniteLatentError,
    RecipeMismatchError,
    SourceError,
    SpecError,
    WorkInterrupted,
    name_some,
)
from dla_cache.latent_files import SUFFIXES, LatentFiles, match_files, read_latent, shown
from dla_cache.manifest import Manifest
from dla_cache.modality import KINDS
from dla_cache.repair import require_shards
from dla_cache.shards import Shard
from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import LatentStore, create_store
from dla_cache.store.content import checked_latents
from dla_cache.store.creation import stored_rows, with_removed
from dla_cache.store.metadata import refuse_unfinished_removal, unchanged_rows
from dla_cache.store.rows import RowTable

ALIASES = {"pc": Modality.SHAPE, "3d": Modality.SHAPE}
"""What the published training release calls modalities."""

Kind = Literal["continuous", "codes"]

DEFAULT_AXES: dict[tuple[Kind, int], tuple[str, ...]] = {
    ("continuous", 1): ("channel",),
    ("continuous", 3): ("channel", "height", "width"),
    ("codes", 2): ("codebook", "step"),
}
"""By kind and number of axes. A continuous matrix has none: both [token, channel] and its transpose are common."""

LOOSE_RECORDS = 1000
"""Commit records are consolidated once so many lie about as single files."""


@dataclass(frozen=True, slots=True)
class ImportedFormat:
    """What the first file and the user say that a latent is."""

    format: LatentFormat
    file_dtype: str
    """As the file has it: `bfloat16`, `float32`, `int64`."""
    drops_leading_axis: bool
    """A file holds [1, *shape]: a batch of one."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did."""

    n_images: int
    """Images of the store, without those that were removed."""
    images_left_out: int
    """That the manifest lists and that were removed from the store before."""
    images_imported: int
    """Committed by this run."""
    missing: tuple[str, ...]
    """IDs of images that were left out for want of a latent."""
    extra: tuple[str, ...]
    ignored: tuple[str, ...]
    recipe: Recipe
    seconds: float
    content_hash: str | None
    """None while another modality of the store misses shards."""


def parse_modality(text: str) -> Modality:
    """The modality of that name, or of the name that the published release has for it.

    Raises:
        SpecError: if there is none.
    """
    if text in ALIASES:
        return ALIASES[text]
    try:
        return Modality(text)
    except ValueError:
        names = [*KINDS, *ALIASES]
        hint = f"it is one of {name_some(names, len(names))}, maybe with a label, as `features-dinov2`"
        raise SpecError(f"there is no modality `{text}`", hint=hint) from None


def find_format(
    path: Path,
    *,
    key: str | None,
    kind: Kind,
    vocabulary: int | None,
    axes: Sequence[str] | None,
    dtype: Literal["float16", "float32"] | None,
) -> ImportedFormat:
    """The format of all latents, from the first file and what the user says of it.

    Codes take the smallest integer that holds them; float16 stays so, and all other floats become float32, unless
    `dtype` says otherwise. Where a file has one axis more than `axes` names and that is one long, it is a batch of one.

    Raises:
        SourceError: if the file cannot be read.
        LatentShapeError: if axes, kind or vocabulary do not fit what lies there.
    """
    latent, file_dtype = read_latent(path, key)
    if (latent.dtype.kind == "f") != (kind == "continuous"):
        raise LatentShapeError(
            f"`{shown(path)}` holds `{file_dtype}`: no {'codes' if kind == 'codes' else 'continuous latents'}",
            hint="codes are whole numbers: `--kind codes --vocabulary N`"
            if kind == "continuous"
            else "leave out --kind",
        )
    shape = latent.shape
    drops = axes is not None and len(shape) == len(axes) + 1 and shape[0] == 1
    shape = shape[1:] if drops else shape
    # A first axis of one may be a batch of one, and then the others would be taken for what they are not.
    is_clear = axes is not None or shape[:1] != (1,)
    named = tuple(axes) if axes is not None else DEFAULT_AXES.get((kind, len(shape))) if is_clear else None
    if named is None:
        raise LatentShapeError(
            f"`{shown(path)}` holds {list(shape)}, and nothing says which axis is which",
            hint="name them, one for each: `--axes channel,height,width`, `--axes token,channel`,"
            " `--axes codebook,step`; of a batch of one, without the batch",
        )
    needed = "codebook" if kind == "codes" else "channel"
    if needed not in named:
        raise LatentShapeError(f"`--axes {','.join(named)}` names no `{needed}`", hint="statistics are kept along it")
    if kind == "codes":
        stored = "uint8" if (vocabulary or 0) <= 2**8 else "int16" if (vocabulary or 0) <= 2**15 else "int32"
    else:
        stored = dtype or ("float16" if file_dtype == "float16" else "float32")
    try:
        latent_format = LatentFormat.model_validate(
            {"kind": kind, "shape": shape, "axes": named, "dtype": stored, "vocabulary": vocabulary}
        )
    except ValidationError as error:
        told = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
        raise LatentShapeError(
            f"`{shown(path)}` holds {list(shape)}: {told}", hint="`--axes` names every axis once"
        ) from error
    return ImportedFormat(latent_format, file_dtype, drops)


def import_latents(
    folder: Path,
    manifest: Manifest,
    modality: Modality,
    store_path: Path,
    *,
    name: str | None = None,
    key: str | None = None,
    kind: Kind = "continuous",
    vocabulary: int | None = None,
    axes: Sequence[str] | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    layout: Literal["zarr", "webdataset"] = "zarr",
    shard_size: int = 512,
    skip_missing: bool = False,
    allow_extra: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ImportReport:
    """Stores the latents of a folder under the manifest's images, all that is not committed yet.

    The recipe's source is `import:<name>`. Its parameters tell what the files are, and nothing tells which numbers
    they hold: under one name belongs one set of latents. Where an import goes on, one file of each stored shard is
    compared with the store.

    Args:
        name: of this set of latents; the folder's when None.
        key: of the tensor in files that hold several.
        skip_missing: build of those images alone that have a latent; else a missing one is an error.
        allow_extra: files without an image are no error.
        on_progress: told how many of how many images are stored.
        should_stop: asked between two shards.

    Raises:
        SourceError: if files and images cannot be matched, or a file cannot be read.
        MissingLatentError: if images have no latent, unless `skip_missing`.
        LatentShapeError, NonFiniteLatentError: if a latent is not like the first, or has a value that cannot be stored.
        StoreError: if the store cannot be written or was built from something else, if a removal of images from it
            was not finished, or if images were removed while this ran.
        WorkInterrupted: if `should_stop` said so.
        In every case what is committed stays, and the same call goes on from there.
    """
    started = time.monotonic()
    name = name or folder.resolve().name
    if not re.fullmatch("[A-Za-z0-9._-]+", name):
        raise SpecError(f"`{name}` is no name for a set of latents", hint="--name with letters, digits, `.`, `_`, `-`")
    before = stored_rows(store_path)
    matched = match_files(folder, manifest)
    files = _without(matched, frozenset() if before is None else before.removed_ids)
    if matched.file_of and not files.file_of:
        raise SourceError(
            f"all {len(matched.file_of)} images with a latent in `{folder}` were removed from `{store_path}`",
            hint="nothing is left to import: a removed image does not come back",
        )
    _check_all_match(folder, files, len(files.file_of) + len(files.missing), skip_missing, allow_extra)
    chosen = Manifest(
        manifest.table.filter(pa.array([image_id in files.file_of for image_id in manifest.image_ids])),
        manifest.class_names,
        manifest.root,
    )
    first = files.file_of[chosen.image_ids[0]]
    found = find_format(first, key=key, kind=kind, vocabulary=vocabulary, axes=axes, dtype=dtype)
    recipe = Recipe(
        modality=modality,
        source=f"import:{name}",
        weights_sha256="",
        parameters={
            "files": ", ".join(sorted({path.suffix.lower() for path in matched.file_of.values()})),
            "file_dtype": found.file_dtype,
            **({"key": key} if key else {}),
            **({"leading_axis": "dropped"} if found.drops_leading_axis else {}),
            "source_view": "not known",
        },
        seed=0,
        source_view_size=1,  # the field must be there; the parameter above says that nothing is known
        format=found.format,
    )
    rows = with_removed(before, RowTable.from_manifest(chosen))
    store = create_store(store_path, rows, chosen.class_names, shard_size, {modality.value: recipe}, layout=layout)
    refuse_unfinished_removal(store_path)
    require_shards(store, modality.value, store.shards)
    committed = store.committed(modality.value)
    todo = [shard for shard in store.shards if shard.index not in committed]
    _check_same_files(store, modality.value, [store.shards[index] for index in sorted(committed)], files, key, found)
    kept_ids = {shard.index: [store.rows.image_ids[row] for row in store.kept_rows(shard).tolist()] for shard in todo}
    total, done = sum(len(image_ids) for image_ids in kept_ids.values()), 0
    imported = 0
    for shard in todo:
        shard_started = time.monotonic()
        image_ids = kept_ids[shard.index]
        latents = _read_shard([files.file_of[image_id] for image_id in image_ids], key, found)
        seconds = time.monotonic() - shard_started
        if store.write_shard(modality.value, shard, latents, seconds=seconds, device="import"):
            imported += len(image_ids)
        store.consolidate(modality.value, at_least=LOOSE_RECORDS)
        done += len(image_ids)
        if on_progress is not None:
            on_progress(done, total)
        if should_stop is not None and done < total and should_stop():
            raise _interrupted(store_path, done, total)
    store.consolidate(modality.value)
    write_card(store)
    is_complete = not any(store.missing(other) for other in store.modalities)
    report = ImportReport(
        n_images=store.rows.n_kept,
        images_left_out=sum(image_id in store.rows.removed_ids for image_id in manifest.image_ids),
        images_imported=imported,
        missing=files.missing,
        extra=files.extra,
        ignored=files.ignored,
        recipe=recipe,
        seconds=time.monotonic() - started,
        content_hash=store.content_hash() if is_complete else None,
    )
    with unchanged_rows(store_path, store.metadata):  # else the report speaks of what is no longer there
        return report


def _without(files: LatentFiles, removed_ids: frozenset[str]) -> LatentFiles:
    """The files but those of images that were removed from the store, which are not missing either."""
    file_of = {image_id: path for image_id, path in files.file_of.items() if image_id not in removed_ids}
    missing = tuple(image_id for image_id in files.missing if image_id not in removed_ids)
    return replace(files, file_of=file_of, missing=missing)


def _check_same_files(
    store: LatentStore,
    modality: str,
    shards: Sequence[Shard],
    files: LatentFiles,
    key: str | None,
    found: ImportedFormat,
) -> None:
    """Passes if the first file of each of these committed shards still holds what was stored of it.

    One file a shard: enough for another set of latents under the old name, at a price that going on can pay.

    Raises:
        RecipeMismatchError: naming the first file that has changed.
    """
    for shard in shards:
        first = store.kept_rows(shard)[:1]
        image_ids = [store.rows.image_ids[row] for row in first.tolist()]
        paths = [files.file_of[image_id] for image_id in image_ids]
        stored = store.read(modality, first)
        now = checked_latents(_read_shard(paths, key, found), found.format, image_ids)
        if now.tobytes() != stored.tobytes():
            raise RecipeMismatchError(
                f"`{shown(paths[0])}` holds another latent than `{store.path}` has of it",
                hint="give these latents a `--name` of their own and a new store, or restore the files",
            )


def _check_all_match(folder: Path, files: LatentFiles, n_images: int, skip_missing: bool, allow_extra: bool) -> None:
    if not files.file_of:
        raise SourceError(
            f"no file in `{folder}` fits one of the {n_images} images; it has {len(files.extra)} latents"
            f"{f', such as {name_some(files.extra)}' if files.extra else ''}",
            hint="a file is named after its image's ID, or lies at its image's path with another extension:"
            f" {', '.join(SUFFIXES)}",
        )
    if files.missing and not skip_missing:
        raise MissingLatentError(
            f"{len(files.missing)} of {n_images} images have no latent in `{folder}`: {name_some(files.missing)}",
            hint="`--missing skip` builds of the others alone; or make them, or drop the images from the manifest",
        )
    if files.extra and not allow_extra:
        raise SourceError(
            f"{len(files.extra)} latents in `{folder}` belong to no image: {name_some(files.extra)}",
            hint="`--allow-extra` leaves them out; or name the manifest that lists their images",
        )


def _read_shard(paths: Sequence[Path], key: str | None, found: ImportedFormat) -> NDArray[np.generic]:
    """The latents of some files, [n, *shape] in the files' dtype; of no file in the stored one."""
    if not paths:
        return np.empty((0, *found.format.shape), found.format.dtype)
    latents: list[NDArray[np.generic]] = []
    for path in paths:
        latent, file_dtype = read_latent(path, key)
        shape = (1, *found.format.shape) if found.drops_leading_axis else found.format.shape
        if latent.shape != shape or file_dtype != found.file_dtype:
            raise LatentShapeError(
                f"`{shown(path)}` holds `{file_dtype}` {list(latent.shape)},"
                f" the first file `{found.file_dtype}` {list(shape)}",
                hint="the latents of a modality are all alike: make this one again, or leave its image out",
            )
        latents.append(latent.reshape(found.format.shape))
    stacked = np.stack(latents)
    vocabulary = found.format.vocabulary
    if vocabulary is None:
        with np.errstate(over="ignore"):
            good = np.isfinite(stacked.astype(found.format.dtype))
    else:
        good = (stacked >= 0) & (stacked < vocabulary)
    bad = np.flatnonzero(~good.reshape(len(paths), -1).all(axis=1)).tolist()
    if bad:
        _refuse_values([shown(paths[position]) for position in bad], found.format)
    return stacked


def _refuse_values(paths: Sequence[str], latent_format: LatentFormat) -> NoReturn:
    if latent_format.vocabulary is not None:
        what, hint = f"a code outside [0, {latent_format.vocabulary})", "`--vocabulary` is the number of codes"
    else:
        what = f"NaN, infinity or a value beyond `{latent_format.dtype}`"
        hint = "make them again, leave their images out, or store `--dtype float32`"
    raise NonFiniteLatentError(f"{len(paths)} latents hold {what}: {name_some(paths)}", hint=hint)


def _interrupted(store_path: Path, done: int, total: int) -> WorkInterrupted:
    return WorkInterrupted(
        f"interrupted: {done} of {total} images are stored in `{store_path}`",
        hint="run the same command again; it goes on from there",
    )
