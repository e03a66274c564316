"""What a cell says of an image's classes: one, any number, none of them, or nothing."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dla_cache.candidates import Columns
from dla_cache.errors import ManifestError
from dla_cache.listing import Listing, list_images

SPLIT_AT_SEMICOLONS = Columns(label_separator=";")


def list_lines(folder: Path, *rows: dict[str, Any], columns: Columns | None = None) -> Listing:
    """What a JSON lines file with a file of that name for each row lists; nothing is decoded here."""
    lines = []
    for number, row in enumerate(rows, start=1):
        (folder / f"{number}.jpg").write_bytes(b"")
        lines.append(json.dumps({"path": f"{number}.jpg", **row}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    return list_images([folder / "list.jsonl"], columns=columns)


def list_text(folder: Path, cell: str, columns: Columns | None = None) -> Listing:
    """What a TSV of one image lists."""
    (folder / "1.jpg").write_bytes(b"")
    (folder / "list.tsv").write_text(f"path\tlabel\n1.jpg\t{cell}\n")
    return list_images([folder / "list.tsv"], columns=columns)


def list_sample(folder: Path, columns: Columns | None = None, **members: bytes) -> Listing:
    """What a shard of one sample lists."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for extension, content in {"jpg": b"", **members}.items():
            entry = tarfile.TarInfo(f"1.{extension}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return list_images([folder / "0.tar"], columns=columns)


def classes_of(listing: Listing) -> list[tuple[str, ...] | None]:
    return [candidate.class_names for candidate in listing.candidates]


@pytest.mark.parametrize(
    ("cell", "classes"),
    [
        (["dog", "cat"], ("cat", "dog")),
        (["cat"], ("cat",)),
        ([], ()),
        (None, None),
        ("", None),
        ("cat", ("cat",)),
        (["cat", " cat ", "cat"], ("cat",)),
        (["Kro\u0308te", "Kr\u00f6te"], ("Kr\u00f6te",)),
        ([3, "3", 3.0, 10], ("10", "3")),
        (["a, b", "a;b"], ("a, b", "a;b")),
    ],
)
def test_a_list_names_the_classes_of_an_image_each_once(
    tmp_path: Path, cell: object, classes: tuple[str, ...] | None
) -> None:
    listing = list_lines(tmp_path, {"label": cell}, {"label": ["other", "list"]})
    assert listing.is_multi_label
    assert classes_of(listing) == [classes, ("list", "other")]


def test_a_column_without_a_list_is_of_one_class_an_image(tmp_path: Path) -> None:
    listing = list_lines(tmp_path, {"label": "cat", "tags": ["a", "b"]}, {"label": None}, {})
    assert not listing.is_multi_label
    assert classes_of(listing) == [("cat",), None, None]
    assert "classes from `label`" in listing.remark


def test_a_column_of_lists_is_said_to_be_one(tmp_path: Path) -> None:
    listing = list_lines(tmp_path, {"label": "cat", "tags": ["a"]}, columns=Columns(label="tags"))
    assert listing.remark == "paths from `path`, any number of classes from `tags`, no splits, IDs from the path"


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("cells", [[["dog", "cat"], [], None], [None, None, None]])
def test_a_parquet_column_of_lists_is_multi_label_whatever_is_in_it(
    tmp_path: Path, kind: Any, cells: list[list[str] | None]
) -> None:
    names = [f"{number}.jpg" for number in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    pq.write_table(pa.table({"path": names, "label": pa.array(cells, kind(pa.string()))}), tmp_path / "list.parquet")
    listing = list_images([tmp_path / "list.parquet"])
    assert listing.is_multi_label
    assert classes_of(listing) == [None if cell is None else tuple(sorted(cell)) for cell in cells]


def test_a_list_in_the_json_of_a_sample_is_its_classes(tmp_path: Path) -> None:
    listing = list_sample(tmp_path, json=b'{"label": ["dog", "cat"]}')
    assert listing.is_multi_label
    assert classes_of(listing) == [("cat", "dog")]
    assert listing.remark.startswith("from 1 shard, any number of classes from `label`")


@pytest.mark.parametrize(
    "cells",
    [
        ([0, 1, 0], [1, 0, 0], None),
        ([0, 0], [0, 1]),
        ([1, 1],),
        ([1.0, 0.0, 0.0],),
        ([1, 0, 1], [0, 0]),
        ([True, False], [False, True]),
    ],
)
def test_lists_that_say_yes_or_no_for_every_class_are_refused(tmp_path: Path, cells: tuple[object, ...]) -> None:
    with pytest.raises(ManifestError, match="every list in `label` holds nothing but 0 and 1") as refused:
        list_lines(tmp_path, *({"label": cell} for cell in cells))
    assert "names or indices of the classes that an image has" in refused.value.hint
    with pytest.raises(ManifestError, match="every list in `label`"):
        list_sample(tmp_path, json=json.dumps({"label": cells[0]}).encode())


@pytest.mark.parametrize(
    "cells",
    [([0, 1], [0, 1]), ([0], [1]), ([], []), ([0, 1], [1], []), ([0, 1], [1, 2]), (["0", "no"], [0, 0]), ([0, 1], [0])],
)
def test_lists_of_few_classes_are_no_vectors(tmp_path: Path, cells: tuple[list[object], ...]) -> None:
    assert list_lines(tmp_path, *({"label": cell} for cell in cells)).is_multi_label


@pytest.mark.parametrize("element", [None, "", " ", float("nan"), True, 0.5])
def test_an_image_with_a_list_in_which_one_is_no_name_is_quarantined(tmp_path: Path, element: object) -> None:
    listing = list_lines(tmp_path, {"label": ["cat", element]}, {"label": "cat"})
    [quarantined] = listing.quarantined
    assert quarantined.where == "row 1, 1.jpg"
    assert quarantined.reason == "has a list of labels in which one is null, empty or no name"
    assert classes_of(listing) == [("cat",)]
    assert listing.is_multi_label


def test_a_sample_with_a_list_in_which_one_is_no_name_is_quarantined(tmp_path: Path) -> None:
    [quarantined] = list_sample(tmp_path, json=b'{"label": ["cat", null]}').quarantined
    assert quarantined.where == "0.tar/1.jpg"


@pytest.mark.parametrize("cell", [{"cat": 1}, [["cat"]], [{"cat": 1}], ["cat", []]])
def test_a_label_that_is_neither_a_name_nor_a_list_of_them_is_refused(tmp_path: Path, cell: object) -> None:
    with pytest.raises(ManifestError, match="`label` holds neither class names nor lists of them") as refused:
        list_lines(tmp_path, {"label": cell})
    assert "--label-column" in str(refused.value.hint)


def test_a_list_with_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is no text"):
        list_lines(tmp_path, {"label": ["\ud800"]})


def test_a_list_may_be_long(tmp_path: Path) -> None:
    [names] = classes_of(list_lines(tmp_path, {"label": [f"class {number}" for number in range(100_000)] * 2}))
    assert len(names or ()) == 100_000


# Texts that are split


@pytest.mark.parametrize(
    ("cell", "classes"),
    [
        ("dog;cat", ("cat", "dog")),
        (" dog ; cat ;", ("cat", "dog")),
        (";;cat;;cat", ("cat",)),
        ("cat", ("cat",)),
        ("Kro\u0308te;Kr\u00f6te", ("Kr\u00f6te",)),
        ("", None),
        (" ; ;", None),
    ],
)
def test_a_separator_splits_texts_of_tables_and_of_samples(
    tmp_path: Path, cell: str, classes: tuple[str, ...] | None
) -> None:
    for listing in (
        list_text(tmp_path, cell, SPLIT_AT_SEMICOLONS),
        list_sample(tmp_path, SPLIT_AT_SEMICOLONS, cls=f"{cell}\n".encode()),
        list_lines(tmp_path, {"label": cell}, columns=SPLIT_AT_SEMICOLONS),
    ):
        assert listing.is_multi_label
        assert classes_of(listing) == [classes]


def test_a_separator_may_be_long_or_a_space(tmp_path: Path) -> None:
    assert classes_of(list_text(tmp_path, "a<br>b c", Columns(label_separator="<br>"))) == [("a", "b c")]
    assert classes_of(list_text(tmp_path, "a  b c", Columns(label_separator=" "))) == [("a", "b", "c")]


def test_without_a_separator_a_text_is_one_class(tmp_path: Path) -> None:
    listing = list_text(tmp_path, "dog;cat")
    assert not listing.is_multi_label
    assert classes_of(listing) == [("dog;cat",)]


def test_a_separator_leaves_lists_as_they_are(tmp_path: Path) -> None:
    listing = list_lines(tmp_path, {"label": ["a;b", "c"]}, {"label": "a;b"}, columns=SPLIT_AT_SEMICOLONS)
    assert classes_of(listing) == [("a;b", "c"), ("a", "b")]


def test_a_separator_without_a_column_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no column or field of labels") as refused:
        list_lines(tmp_path, {"tags": "a;b"}, columns=SPLIT_AT_SEMICOLONS)
    assert "--label-column" in str(refused.value.hint)


def test_a_separator_for_classes_from_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat;dog").mkdir()
    (tmp_path / "cat;dog" / "1.jpg").write_bytes(b"")
    with pytest.raises(ManifestError, match="classes from folders, one an image"):
        list_images([tmp_path], columns=SPLIT_AT_SEMICOLONS)
    assert not list_images([tmp_path]).is_multi_label


@pytest.mark.parametrize("text", ["['red', 'green']", '["red","green"]', "[]", "[1, 2]"])
def test_a_list_written_as_text_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ManifestError, match="holds lists written as text") as refused:
        list_lines(tmp_path, {"label": text})
    assert "--label-separator" in refused.value.hint


@pytest.mark.parametrize("text", ["[red]", "[", "[a] [b]", "(1, 2)"])
def test_a_name_in_brackets_is_a_name(tmp_path: Path, text: str) -> None:
    assert classes_of(list_lines(tmp_path, {"label": text})) == [(text,)]
