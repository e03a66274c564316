"""Finding images: what a folder, a table or WebDataset shards hold, before anything is decoded."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from dla_cache.candidates import (
    IMAGE_SUFFIXES,
    IS_FOLDER,
    Candidate,
    Columns,
    Found,
    Quarantined,
    Skipped,
    class_name_of,
    fault_of_file,
    fault_of_name,
)
from dla_cache.errors import ManifestError, name_some
from dla_cache.image_ids import escape_id
from dla_cache.tables import TABLE_SUFFIXES, find_rows
from dla_cache.tars import find_samples

FOLDER_REMARKS = {
    "flat": "no classes",
    "folders": "the first folder is the class",
    "split-folders": "the first folder is the split, the second the class",
}
LAYOUTS = (*FOLDER_REMARKS, "table", "webdataset")

SPLIT_FOLDERS = {
    *("train", "training", "labelled", "labeled", "unlabelled", "unlabeled", "transfer"),
    *("val", "valid", "validation", "dev", "test", "testing", "eval"),
}
"""First folders that are splits, not classes, if all of them are among these, in upper or lower case."""

IMAGE_SIGNATURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM.{4}\0{4}"
    rb"|\0{3}\x0cjP  |.{4}ftyp(?:avif|hei[cx])",
    re.DOTALL,
)
"""First bytes of a file that is an image whatever its name."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All that was found, in the order of image IDs."""

    layout: str
    remark: str
    """How classes, splits and IDs come from it, one line."""
    is_multi_label: bool
    """Whether an image may have any number of classes."""
    root: Path
    """Folder that the URIs start from."""
    n_found: int
    """Files, rows of the table, or samples."""
    candidates: tuple[Candidate, ...]
    quarantined: tuple[Quarantined, ...]
    skipped: Mapping[str, int]
    """How many of each kind."""


def list_images(
    sources: Sequence[Path], *, layout: str | None = None, columns: Columns | None = None, images: Path | None = None
) -> Listing:
    """What `sources` hold.

    Args:
        sources: one folder, one table, or tar files.
        layout: one of `LAYOUTS`; None finds it out.
        images: folder that a table's paths start from; None for the table's own.

    Raises:
        ManifestError: if there is no image, the sources do not fit the layout, or a table or a shard is damaged.
    """
    columns = columns or Columns()
    source = sources[0]
    for path in sources:
        if not os.path.exists(path):
            raise ManifestError(f"`{path}` does not exist", hint="check the path")
    is_table = _is_file(source, TABLE_SUFFIXES if layout is None else ("",)) and layout in (None, "table")
    if images is not None and not is_table:
        raise ManifestError(f"`{source}` is no table, so its images lie in itself", hint="drop `--images`")
    if layout in (None, "webdataset") and all(_is_file(path, (".tar",)) for path in sources):
        parents = {path.absolute().parent for path in sources}
        root = source.parent if len(parents) == 1 else Path(os.path.relpath(os.path.commonpath(parents)))
        shards = [os.path.relpath(path, root) for path in sources]
        return _listing("webdataset", root, *find_samples(root, shards, columns))
    if len(sources) > 1:
        raise ManifestError(f"{len(sources)} sources, not all of them `.tar`", hint="give one folder or one table")
    if is_table:
        root = images or source.parent
        return _listing("table", root, *find_rows(source, root, columns))
    if os.path.isdir(source) and layout != "table":
        return _list_folder(source, layout, columns)
    fault = f"no source of layout `{layout}`" if layout else "neither a folder, nor a table, nor a `.tar`"
    raise ManifestError(f"`{source}` is {fault}", hint=f"a table ends in {', '.join(TABLE_SUFFIXES)}")


def _is_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    return os.path.isfile(path) and path.name.lower().endswith(suffixes)


def _listing(layout: str, root: Path, found: Sequence[Found], remark: str, is_multi_label: bool = False) -> Listing:
    """Sorts what was found into three, and quarantines all candidates of one ID but the first."""
    candidates: dict[str, Candidate] = {}
    quarantined: list[Quarantined] = []
    skipped: Counter[str] = Counter()
    for thing in found:
        if isinstance(thing, Skipped):
            skipped[thing.kind] += 1
        elif isinstance(thing, Quarantined):
            quarantined.append(thing)
        elif thing.image_id in candidates:
            first = candidates[thing.image_id].where
            quarantined.append(Quarantined(thing.where, f"has the same ID as {first}: `{thing.image_id}`"))
        else:
            candidates[thing.image_id] = thing
    if not candidates and not quarantined:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())) or "nothing at all"
        raise ManifestError(f"`{root}` holds no image, but {kinds}", hint="check the path, or force a `--layout`")
    in_order = tuple(candidates[image_id] for image_id in sorted(candidates))
    kinds_skipped = dict(sorted(skipped.items()))
    return Listing(layout, remark, is_multi_label, root, len(found), in_order, tuple(quarantined), kinds_skipped)


def _list_folder(root: Path, layout: str | None, columns: Columns) -> Listing:
    found = sorted(_walk(root), key=lambda thing: thing.where)
    layout = layout or _detect_layout(found)
    if layout != "webdataset":
        if columns.label_separator is not None:
            raise ManifestError(f"`{root}` has its classes from folders, one an image", hint="drop `--label-separator`")
        return _listing(layout, root, [_with_class(thing, layout) for thing in found], FOLDER_REMARKS[layout])
    shards = {thing.where for thing in found if isinstance(thing, Skipped) and thing.kind == ".tar"}
    samples, remark, is_multi_label = find_samples(root, sorted(shards), columns)
    others = [thing for thing in found if thing.where not in shards]
    loose = [Skipped(thing.where, "not in a tar") if isinstance(thing, Candidate) else thing for thing in others]
    return _listing(layout, root, [*samples, *loose], remark, is_multi_label)


def _walk(root: Path) -> Iterator[Found]:
    """Every entry below a folder but the folders; a hidden one counts once, links to folders are not followed."""
    real_root = os.path.realpath(root)
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as opened:
                entries = list(opened)
        except OSError as error:
            yield Quarantined(folder or ".", f"folder cannot be read: {error.strerror}")
            continue
        for entry in entries:
            where = posixpath.join(folder, entry.name)
            if entry.name.startswith("."):
                yield Skipped(where, "hidden")
            elif entry.is_dir(follow_symlinks=False):
                pending.append(where)
            else:
                yield _classify(entry.path, where, real_root)


def _classify(path: str, where: str, real_root: str) -> Found:
    suffix = posixpath.splitext(where)[1].lower()
    fault = fault_of_file(path, real_root)
    if fault == IS_FOLDER:  # a link to one in the tree, whose images are found where they are
        return Skipped(where, "link to a folder")
    # What cannot be opened may be an image unless its name denies it; a link out of the tree, a folder of them.
    if fault is not None and (not suffix or suffix in IMAGE_SUFFIXES or os.path.isdir(path)):
        return Quarantined(where, fault)
    if suffix in IMAGE_SUFFIXES or (fault is None and _has_image_signature(path)):
        fault = fault_of_name(where)
        return Quarantined(where, fault) if fault is not None else Candidate(escape_id(where), where, where)
    return Skipped(where, suffix if re.fullmatch(r"\.[a-z0-9_-]{1,12}", suffix) else "of other names")


def _has_image_signature(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(IMAGE_SIGNATURE.match(file.read(16)))
    except OSError:  # nothing says that it should be an image
        return False


def _detect_layout(found: Sequence[Found]) -> str:
    uris = [PurePosixPath(thing.uri) for thing in found if isinstance(thing, Candidate)]
    folders = {uri.parts[0].lower() for uri in uris if len(uri.parts) > 1}
    if len(folders & SPLIT_FOLDERS) > 1 and not folders <= SPLIT_FOLDERS:  # one alone may be a class
        others = sorted(folders - SPLIT_FOLDERS)
        raise ManifestError(
            f"some folders are named like splits, {name_some(sorted(folders & SPLIT_FOLDERS))}, others are not:"
            f" {name_some(others)}",
            hint="move the others away, or say what folders are: `--layout folders` or `--layout split-folders`",
        )
    if folders:
        return "split-folders" if folders <= SPLIT_FOLDERS else "folders"
    has_shards = any(isinstance(thing, Skipped) and thing.kind == ".tar" for thing in found)
    return "webdataset" if has_shards and not uris else "flat"


def _with_class(thing: Found, layout: str) -> Found:
    """A candidate with the class and split that its folders say."""
    if not isinstance(thing, Candidate):
        return thing
    folders = PurePosixPath(thing.uri).parts[:-1]
    depth = {"flat": 0, "folders": 1, "split-folders": 2}[layout]
    class_name = class_name_of(folders[depth - 1], "folder") if depth and len(folders) >= depth else None
    class_names = None if class_name is None else (class_name,)
    return replace(thing, class_names=class_names, split=folders[0] if depth == 2 and folders else None)
