"""The class of every image of a store, for controls: from the store, and where it hides them from a table."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import ManifestError, SpecError, name_some
from dla_cache.spec import canonical_json
from dla_cache.store import LatentStore
from dla_cache.tables import read_table


def read_labels(path: Path, class_names: Sequence[str]) -> dict[str, int]:
    """Class indices by image ID, from a table with columns `image_id` and `label`.

    A label is the name of a class, or its index where the table has numbers, as a Parquet file may.

    Raises:
        ManifestError: if it is no such table, a label is no class, or an image has two.
    """
    table = read_table(path)
    if not {"image_id", "label"} <= set(table.columns):
        raise ManifestError(
            f"`{path}` has the columns {name_some(table.columns, shown=10)}", hint="it needs `image_id` and `label`"
        )
    index_of: dict[object, int] = {name: index for index, name in enumerate(class_names)}
    labels: dict[str, int] = {}
    for number, row in enumerate(table.rows, start=1):
        image_id, label = str(row.get("image_id")), row.get("label")
        is_index = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(class_names)
        if not (is_index or (isinstance(label, str) and label in index_of)):
            raise ManifestError(
                f"`{path}` says label `{label}` of image `{image_id}` in row {number}, and the store has no such class",
                hint=f"its classes are {name_some(class_names, shown=10)}; a number is an index from 0",
            )
        chosen = label if isinstance(label, int) else index_of[label]
        if labels.setdefault(image_id, chosen) != chosen:
            raise ManifestError(f"`{path}` says two labels of image `{image_id}`", hint="an image has one class")
    return labels


def known_classes(
    store: LatentStore, rows: NDArray[np.int64], labels: Mapping[str, int] | None, what_for: str
) -> NDArray[np.int64]:
    """The class index of each of these rows, [n].

    Args:
        labels: by image ID, of those that the store tells nothing of; others must agree with it.
        what_for: names the control in messages.

    Raises:
        SpecError: if an image has no known class, or may have several, or two are said of it.
    """
    if store.rows.is_multi_label:
        raise SpecError(
            f"`{what_for}` goes by the class of an image, and images of `{store.place}` may have several",
            hint="`gaussian` and `fabricated` ask for no class",
        )
    classes = store.rows.label_numbers(rows).copy()
    image_ids = store.rows.ids_of(rows)
    said = np.array([(labels or {}).get(image_id, -1) for image_id in image_ids], np.int64)
    differing = np.flatnonzero((classes >= 0) & (said >= 0) & (classes != said))
    if len(differing):
        raise SpecError(
            f"the labels differ from the store's for {len(differing)} images:"
            f" {name_some([image_ids[place] for place in differing.tolist()])}",
            hint="they are of another set of images or classes",
        )
    classes = np.where(classes < 0, said, classes)
    unknown = np.flatnonzero(classes < 0)
    if len(unknown):
        splits = sorted(set(store.rows.splits_of(rows[unknown])))
        raise SpecError(
            f"`{what_for}` needs the class of every image, and {len(unknown)} have none, in split"
            f" {name_some(splits, shown=10)}: {name_some([image_ids[place] for place in unknown.tolist()])}",
            hint="name a table of `image_id` and `label`: --labels TABLE",
        )
    return classes


def hash_of_groups(image_ids: Sequence[str], splits: Sequence[str], classes: NDArray[np.int64]) -> str:
    """sha256 of which image has which split and class, whatever their order: a store's content hash tells neither."""
    told = sorted(zip(image_ids, splits, classes.tolist(), strict=True))
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()
