"""What is found where images are sought: a candidate, something quarantined, or something skipped."""

import ast
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from dla_cache.errors import ManifestError, name_some
from dla_cache.image_ids import escape_id
from dla_cache.manifest import is_safe_uri

RAW_SUFFIXES = frozenset({".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"})
"""Files of cameras: many are TIFF outside, and what Pillow reads of them is a thumbnail."""

IMAGE_SUFFIXES = RAW_SUFFIXES.union(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    (".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".psd", ".exr", ".hdr"),
    (".avif", ".heic", ".heif", ".jxl", ".svg"),
)
"""Names of images, those of formats that cannot be decoded among them: such are quarantined, for they were meant."""

RANGE = re.compile(r"(.+)#([0-9]{1,18})\+([0-9]{1,18})", re.DOTALL)
"""A URI of bytes inside a file: `shards/000.tar#1536+20480` is 20,480 bytes from byte 1,536 on."""

IS_FOLDER = "is a folder"
LEADS_OUT = "leads out of the folder"


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a table's columns, or of the fields of a WebDataset sample's JSON; None for the usual ones."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    image_id: str | None = None
    label_separator: str | None = None
    """What stands between the labels of a text; None if a text is one label."""


USUAL_COLUMNS = {
    "path": ("path", "file_name", "filename", "file", "image"),
    "label": ("label", "class", "class_name"),
    "split": ("split",),
    "image_id": ("image_id", "id"),
}
COLUMN_OPTIONS = {role: f"--{role.removeprefix('image_')}-column" for role in USUAL_COLUMNS}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that should be an image."""

    image_id: str
    uri: str
    """POSIX path relative to the listing's root, or a byte range of a file there, see `RANGE`."""
    where: str
    """Where it was found, for people."""
    class_names: tuple[str, ...] | None = None
    """Sorted, each once; empty if the image is labelled and has none of the classes, None if it is not labelled."""
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Something that should be an image and cannot be used."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that does not seem to be an image."""

    where: str
    kind: str
    """`hidden`, a suffix as `.txt`, or what else it is."""


Found = Candidate | Quarantined | Skipped


def fault_of_name(uri: str) -> str | None:
    """Why a path, from the root, cannot stand in a manifest; None if it can."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    if "\\" in uri or "\0" in uri:
        return "has a backslash or a null in its name"
    if not is_safe_uri(uri):
        return LEADS_OUT
    if PurePosixPath(uri).suffix.lower() in RAW_SUFFIXES:
        return "is a camera's raw file"
    return "has a name that ends like a byte range" if RANGE.fullmatch(uri) else None


def fault_of_file(path: str, real_root: str) -> str | None:
    """Why a path is no file of the tree; None if it is one, of whatever content."""
    try:
        target = os.path.realpath(path, strict=True)
        mode = os.stat(target).st_mode
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if os.path.commonpath([real_root, target]) != real_root:
        return LEADS_OUT
    if stat.S_ISDIR(mode):
        return IS_FOLDER
    return None if stat.S_ISREG(mode) else "is a pipe, a socket or a device"


def choose_columns(present: Sequence[str], asked: Columns, usual: Mapping[str, Sequence[str]]) -> Columns:
    """For each role the column that was asked for, or the first of the usual ones that is there, or none.

    Raises:
        ManifestError: if one that was asked for is not there.
    """
    chosen: dict[str, str | None] = {}
    for role, option in COLUMN_OPTIONS.items():
        name = getattr(asked, role)
        if name is not None and name not in present:
            raise ManifestError(
                f"there is no column or field `{name}`",
                hint=f"give {option} one of {name_some(present, shown=10)}" if present else "there is none at all",
            )
        chosen[role] = name or next((name for name in usual.get(role, ()) if name in present), None)
    if asked.label_separator is not None and chosen["label"] is None:
        raise ManifestError("there is no column or field of labels to split", hint="name it by `--label-column`")
    return replace(asked, **chosen)


def make_candidate(where: str, uri: str, id_text: str, cells: Mapping[str, Any], columns: Columns) -> Found:
    """The candidate that a row of cells describes; `id_text` is its ID where no column has one.

    Raises:
        ManifestError: if a cell is not what its column is for.
    """
    text = id_text if columns.image_id is None else text_of(cells.get(columns.image_id))
    if text is None:
        return Quarantined(where, "has no ID")
    names = class_names_of(cells.get(columns.label), columns.label, columns.label_separator) if columns.label else None
    if names is not None and None in names:
        return Quarantined(where, "has a list of labels in which one is null, empty or no name")
    class_names = None if names is None else tuple(sorted({name for name in names if name is not None}))
    split = text_of(cells.get(columns.split)) if columns.split else None
    return Candidate(escape_id(text), uri, where, class_names, split)


def describe_columns(columns: Columns, id_text: str, *, is_multi_label: bool) -> str:
    """Where classes, splits and IDs come from, for people."""
    number = "any number of classes" if is_multi_label else "classes"
    classes = f"{number} from `{columns.label}`" if columns.label else "no classes"
    splits = f"splits from `{columns.split}`" if columns.split else "no splits"
    return f"{classes}, {splits}, IDs from {f'`{columns.image_id}`' if columns.image_id else id_text}"


def class_names_of(value: object, column: str, separator: str | None) -> list[str | None] | None:
    """The classes that a cell lists, None among them for what cannot be one; None for a cell that is empty.

    Args:
        separator: splits a text, whose empty pieces count for nothing; None takes a text for one name.

    Raises:
        ManifestError: if the cell holds something that is neither a name nor a list of them.
    """
    if isinstance(value, list | tuple):
        return [None if _is_no_name(element) else class_name_of(element, column) for element in value]
    name = class_name_of(value, column)
    if name is None:
        return None
    if separator is None:
        refuse_written_list(name, column)
        return [name]
    return [piece.strip() for piece in name.split(separator) if piece.strip()] or None


def refuse_written_list(text: str, column: str) -> None:
    """Refuses a text that is a list in JSON or Python, as tables get when they are written without thinking of it.

    Raises:
        ManifestError: if it is one.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return
    try:
        written = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return
    if isinstance(written, list):
        raise ManifestError(
            f"`{column}` holds lists written as text: `{text[:60]}`",
            hint="write lists as JSON lines or Parquet have them, or `red|green` and `--label-separator '|'`",
        )


def refuse_vectors(cells: Iterable[object], column: str) -> None:
    """Refuses a column of lists that say yes or no for every class: read as classes, they would be `0` and `1`.

    Those are lists that hold nothing but 0 and 1, one of them twice in some list, or all of one length above 1.

    Raises:
        ManifestError: if the lists are such.
    """
    lists = [cell for cell in cells if isinstance(cell, list)]
    if not all(isinstance(element, int | float) and element in (0, 1) for cell in lists for element in cell):
        return
    lengths = {len(cell) for cell in lists}
    are_of_one_length = len(lengths) == 1 and max(lengths) > 1 and any(cell != [0, 1] for cell in lists)
    if are_of_one_length or any(len(set(cell)) < len(cell) for cell in lists):
        raise ManifestError(
            f"every list in `{column}` holds nothing but 0 and 1: yes or no for every class",
            hint="list the names or indices of the classes that an image has, in place of `[0, 1, 0]` that is `[1]`",
        )


def _is_no_name(element: object) -> bool:
    """Whether it is a truth value or a fraction, as in a list that says yes or no, or how much, for every class."""
    return isinstance(element, bool) or (isinstance(element, float) and not element.is_integer())


def class_name_of(value: object, column: str) -> str | None:
    """The class that a cell names, in Unicode's composed form; None if it is empty.

    Raises:
        ManifestError: if the cell holds something that is no name.
    """
    if isinstance(value, list | tuple | Mapping | bytes):
        raise ManifestError(
            f"`{column}` holds neither class names nor lists of them", hint="name another column by `--label-column`"
        )
    text = text_of(value)
    return None if text is None else unicodedata.normalize("NFC", text)


def text_of(value: object) -> str | None:
    """A cell as text; None if it is empty. A whole number is one also where a gap made its column a float's.

    Raises:
        ManifestError: if it holds half of a surrogate pair.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ManifestError(f"a label, split or ID is no text: {text!a}", hint="mend it in its file") from error
    return text or None
