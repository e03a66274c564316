"""The image list: one Parquet file, checked whole whenever it is written or read."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from dla_cache.durable import locked_folder, make_folder, write_durably
from dla_cache.errors import ManifestError, name_some
from dla_cache.parquet import from_parquet, to_parquet
from dla_cache.spec import canonical_json

FORMAT = 1

Label = int | tuple[int, ...]
"""Index into the class names; a sorted tuple of distinct ones where images may have several, the empty tuple for an
image that has none of the classes."""


def label_type(*, is_multi_label: bool) -> pa.DataType:
    """What a column of labels holds: class indices, or lists of them."""
    return pa.list_(pa.field("element", pa.int32(), nullable=False)) if is_multi_label else pa.int32()


def label_of_cell(cell: int | list[int] | None) -> Label | None:
    """A label as Arrow hands it out."""
    return tuple(cell) if isinstance(cell, list) else cell


def schema_of(*, is_multi_label: bool) -> pa.Schema:
    """The columns of a manifest."""
    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("label", label_type(is_multi_label=is_multi_label)),
            pa.field("split", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
        ]
    )


COLUMNS = schema_of(is_multi_label=False).names

COLUMNS_HINT = (
    f"they are {', '.join(f'`{field.name}` {field.type}' for field in schema_of(is_multi_label=False))}; only `label`"
    " may be null, and holds lists of int32 where images may have several"
)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One image."""

    image_id: str
    """`[A-Za-z0-9_-]+`, unique: the key that joins everything."""
    uri: str
    """POSIX path relative to the manifest's folder."""
    label: Label | None
    """None for an unlabelled image; of one manifest all others are indices, or all are tuples."""
    split: str
    sha256: str
    """Of the file's bytes, hexadecimal."""
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked image list and the one class map; `root` is the folder that URIs start from."""

    table: pa.Table
    class_names: tuple[str, ...]
    root: Path

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def image_ids(self) -> list[str]:
        return list(self.table["image_id"].to_pylist())

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes: then labels are tuples."""
        return is_list(self.table.schema.field("label").type)

    @property
    def digest(self) -> str:
        """sha256 of all rows and class names. It identifies a build only: a join needs less."""
        digest = hashlib.sha256(canonical_json(self.class_names).encode())
        for row in self.rows():
            digest.update(canonical_json(asdict(row)).encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[ManifestRow]:
        """All rows in order."""
        for batch in self.table.to_batches():
            for row in batch.to_pylist():
                yield ManifestRow(**row | {"label": label_of_cell(row["label"])})

    def select(self, splits: Sequence[str]) -> "Manifest":
        """The rows of some splits, in the same order.

        Raises:
            ManifestError: if a split has no image.
        """
        present = self.table["split"].to_pylist()
        absent = sorted(set(splits) - set(present))
        if absent:
            raise ManifestError(
                f"the manifest has no image of split {name_some(absent)}",
                hint=f"its splits are {', '.join(f'`{split}`' for split in sorted(set(present)))}",
            )
        return Manifest(
            self.table.filter(pa.array([split in splits for split in present])), self.class_names, self.root
        )

    def path_of(self, uri: str) -> Path:
        """The file behind a URI; see `path_of`."""
        return path_of(self.root, uri)


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def path_of(root: Path, uri: str) -> Path:
    """The file behind a URI that starts from the folder `root`.

    Raises:
        ManifestError: if the URI is absolute or leaves the folder.
    """
    if not is_safe_uri(uri):
        raise ManifestError(f"uri `{uri}` leaves the folder `{root}`", hint="write it relative to the manifest")
    return root / uri


def is_safe_uri(uri: str) -> bool:
    """Whether a URI is a relative POSIX path that does not climb out of its folder."""
    path = PurePosixPath(uri)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(uri) & {"\\", "\0"}


def write_manifest(
    path: Path, rows: Iterable[ManifestRow], class_names: Sequence[str], *, multi_label: bool | None = None
) -> Manifest:
    """Checks the rows and writes them, whole or not at all.

    Args:
        multi_label: whether images may have several classes; None takes it from the rows, so that one without any
            label is a manifest of one class an image.

    Raises:
        ManifestError: if the rows contradict themselves, or the file cannot be written.
    """
    rows = list(rows)
    if multi_label is None:
        multi_label = any(isinstance(row.label, tuple) for row in rows)
    strays = [
        str(row.image_id) for row in rows if row.label is not None and isinstance(row.label, tuple) != multi_label
    ]
    if strays:
        raise ManifestError(
            f"labels are of two kinds, or not of the one asked for: {name_some(strays)} and others",
            hint="give every image one class index, or every image a tuple of them; None to one without a label",
        )
    values = [asdict(row) for row in rows]
    schema = schema_of(is_multi_label=multi_label)
    try:
        table = pa.Table.from_pylist(values, schema=schema).cast(schema)  # the cast sees nulls
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ManifestError(f"rows do not fit the manifest's columns: {error}", hint=COLUMNS_HINT) from error
    manifest = Manifest(table, tuple(class_names), path.parent)
    altered = [str(row.image_id) for row, kept in zip(rows, manifest.rows(), strict=True) if row != kept]
    if altered:  # Arrow cuts a label of .5 down to 0
        raise ManifestError(f"rows do not fit the manifest's columns: {name_some(altered)}", hint=COLUMNS_HINT)
    check_manifest(manifest)
    facts = canonical_json({"format": FORMAT, "class_names": list(class_names)})
    content = to_parquet(table.replace_schema_metadata({"dla": facts}))
    try:
        make_folder(path.parent)
        with locked_folder(path.parent):
            write_durably(path, content)
    except OSError as error:
        raise ManifestError(f"`{path}` cannot be written: {error.strerror}", hint="choose a writable folder") from error
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`, all checked again; images are not opened.

    Raises:
        ManifestError: if the file is missing, no manifest, of a newer format, or contradicts itself.
    """
    try:
        table = from_parquet(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"`{path}` cannot be read as a manifest: {error}", hint="check the path; `dla data` writes one"
        ) from error
    class_names = _read_class_names(table, path)
    try:
        table = table.select(COLUMNS)
        is_multi_label = is_list(table.schema.field("label").type)
        table = table.cast(schema_of(is_multi_label=is_multi_label))
        if is_multi_label and pc.list_flatten(table["label"]).null_count:  # which the cast lets pass
            raise ValueError("a list of `label` has a null in it")
        table.validate(full=True)  # else broken UTF-8 is noticed by whoever reads the row
    except (pa.ArrowException, KeyError, ValueError, NotImplementedError) as error:
        raise ManifestError(
            f"`{path}` does not have the columns of a manifest: {error.args[0]}", hint=COLUMNS_HINT
        ) from error
    manifest = Manifest(table, class_names, path.parent)
    check_manifest(manifest)
    return manifest


def _read_class_names(table: pa.Table, path: Path) -> tuple[str, ...]:
    """What stands under `dla` in the schema's metadata, once its format is known."""
    try:
        facts = json.loads((table.schema.metadata or {}).get(b"dla", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"`{path}` has metadata `dla` that is no JSON: {error}", hint="write the manifest again"
        ) from error
    if not isinstance(facts, dict):
        raise ManifestError(f"`{path}` has metadata `dla` that is no JSON object", hint="write the manifest again")
    found = json.dumps(facts.get("format", "none of ours"))
    if found != str(FORMAT):
        raise ManifestError(
            f"`{path}` is a manifest of format `{found}`, this dla reads `{FORMAT}`",
            hint="upgrade dla, or write the manifest again",
        )
    if not isinstance(facts.get("class_names"), list):
        raise ManifestError(
            f"`{path}` has no list of class names in its metadata `dla`", hint="write the manifest again"
        )
    return tuple(facts["class_names"])


def check_manifest(manifest: Manifest) -> None:
    """Passes a manifest that does not contradict itself.

    Raises:
        ManifestError: on the first kind of fault found, naming the images that have it.
    """
    _check_class_names(manifest.class_names)
    if not len(manifest):
        raise ManifestError("the manifest has no image", hint="list at least one")
    n_classes = len(manifest.class_names)
    seen: set[str] = set()

    def is_first(row: ManifestRow) -> bool:
        known = row.image_id in seen
        seen.add(row.image_id)
        return not known

    faults: dict[str, tuple[Callable[[ManifestRow], bool], str]] = {
        "have an unsafe ID": (
            lambda row: bool(re.fullmatch("[A-Za-z0-9_-]+", row.image_id)),
            "use letters, digits, `_` and `-` only",
        ),
        "stand twice": (is_first, "give each image its own `image_id`"),
        "have an absolute or escaping `uri`": (
            lambda row: is_safe_uri(row.uri),
            "write it with `/`, relative to the manifest's folder",
        ),
        "have a list of labels out of order, or one twice in it": (
            lambda row: not isinstance(row.label, tuple) or _is_sorted_set(row.label),
            "list the class indices of an image in ascending order, each once",
        ),
        "have a label outside the class map": (
            lambda row: all(0 <= index < n_classes for index in classes_of(row.label)),
            f"labels lie in [0, {n_classes}); leave it null for an unlabelled image",
        ),
        "have no split": (lambda row: bool(row.split), "name a split for each image"),
        "have no sha256": (
            lambda row: bool(re.fullmatch("[0-9a-f]{64}", row.sha256)),
            "it is the SHA-256 of the file's bytes, 64 hexadecimal digits",
        ),
        "have no size": (lambda row: row.width > 0 and row.height > 0, "`width` and `height` are in pixels"),
    }
    faulty: dict[str, list[str]] = {fault: [] for fault in faults}
    for row in manifest.rows():
        for fault, (holds, _) in faults.items():
            if not holds(row):
                faulty[fault].append(row.image_id)
    for fault, image_ids in faulty.items():
        if image_ids:
            raise ManifestError(f"images {fault}: {name_some(image_ids)}", hint=faults[fault][1])


def classes_of(label: Label | None) -> tuple[int, ...]:
    """The class indices of an image, none if it is unlabelled or has none of the classes."""
    if label is None:
        return ()
    return label if isinstance(label, tuple) else (label,)


def _is_sorted_set(indices: Sequence[int]) -> bool:
    return all(first < second for first, second in pairwise(indices))


def _check_class_names(class_names: Sequence[object]) -> None:
    nameless = [repr(name) for name in class_names if not _is_text(name)]
    if nameless:
        raise ManifestError(f"class names that are no text: {name_some(nameless)}", hint="write each name as text")
    twice = [str(name) for name, count in Counter(class_names).items() if count > 1]
    if twice:
        raise ManifestError(f"class names that stand twice: {name_some(twice)}", hint="give each class its own name")


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
