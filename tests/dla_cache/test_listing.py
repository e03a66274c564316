"""Finding images: what a folder and a table hold, and what is said of the rest."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dla_cache.candidates import Candidate, Columns
from dla_cache.errors import ManifestError
from dla_cache.listing import Listing, list_images

JPEG_START = b"\xff\xd8\xff"  # nothing is decoded here


def write_files(folder: Path, *names: str, content: bytes = JPEG_START) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def class_name_of(candidate: Candidate) -> str | None:
    """The only class there can be where a listing is not multi-label."""
    if candidate.class_names is None:
        return None
    [class_name] = candidate.class_names
    return class_name


def classes_of(listing: Listing) -> dict[str, str | None]:
    return {candidate.uri: class_name_of(candidate) for candidate in listing.candidates}


# Folders


def test_the_first_folder_is_the_class(tmp_path: Path) -> None:
    listing = list_images([write_files(tmp_path, "cat/a.jpg", "cat/kitten/b.jpg", "dog/a.jpg", "c.jpg")])
    assert listing.layout == "folders"
    assert classes_of(listing) == {"cat/a.jpg": "cat", "cat/kitten/b.jpg": "cat", "dog/a.jpg": "dog", "c.jpg": None}
    assert listing.root == tmp_path
    assert "cat-_a-pjpg" in [candidate.image_id for candidate in listing.candidates]


def test_well_known_split_folders_come_before_the_class(tmp_path: Path) -> None:
    listing = list_images([write_files(tmp_path, "Train/cat/a.jpg", "val/dog/a.jpg", "unlabelled/b.jpg")])
    assert listing.layout == "split-folders"
    assert classes_of(listing) == {"Train/cat/a.jpg": "cat", "val/dog/a.jpg": "dog", "unlabelled/b.jpg": None}
    assert {candidate.uri: candidate.split for candidate in listing.candidates} == {
        "Train/cat/a.jpg": "Train",
        "val/dog/a.jpg": "val",
        "unlabelled/b.jpg": "unlabelled",
    }


def test_a_class_may_be_called_like_a_split_beside_others(tmp_path: Path) -> None:
    listing = list_images([write_files(tmp_path, "train/a.jpg", "bus/a.jpg")])
    assert (listing.layout, set(classes_of(listing).values())) == ("folders", {"train", "bus"})


def test_splits_beside_other_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="`samples`") as refused:
        list_images([write_files(tmp_path, "train/cat/a.jpg", "val/cat/b.jpg", "samples/a.jpg")])
    assert "--layout" in str(refused.value.hint)


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    listing = list_images([write_files(tmp_path, "a.jpg", "b.png")])
    assert (listing.layout, classes_of(listing)) == ("flat", {"a.jpg": None, "b.png": None})


@pytest.mark.parametrize(
    ("layout", "class_name", "split"),
    [("folders", "2024", None), ("split-folders", "may", "2024"), ("flat", None, None)],
)
def test_a_layout_can_be_forced(tmp_path: Path, layout: str, class_name: str | None, split: str | None) -> None:
    [candidate] = list_images([write_files(tmp_path, "2024/may/a.jpg")], layout=layout).candidates
    assert (class_name_of(candidate), candidate.split) == (class_name, split)


def test_what_is_no_image_is_skipped_by_kind_and_an_image_by_any_name_is_not(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "scan", "photo.JPG_large", ".hidden.jpg", ".git/a.jpg", ".git/b.jpg")
    write_files(tmp_path, "notes.txt", "more.TXT", "README", "odd.na me", content=b"words")
    listing = list_images([tmp_path])
    assert list(classes_of(listing)) == ["a.jpg", "photo.JPG_large", "scan"]
    assert listing.skipped == {".txt": 2, "hidden": 2, "of other names": 2}
    assert listing.n_found == 9  # a hidden folder counts once


def test_class_names_of_one_look_are_one_class(tmp_path: Path) -> None:
    listing = list_images([write_files(tmp_path, "Kro\u0308te/a.jpg", "Kr\u00f6te/b.jpg")])
    assert set(classes_of(listing).values()) == {"Kr\u00f6te"}


def test_an_unreadable_folder_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "cat/a.jpg", "dog/a.jpg")

    def scan(path: Path, scan: Any = os.scandir) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    [quarantined] = list_images([tmp_path]).quarantined
    assert (quarantined.where, quarantined.reason) == ("dog", "folder cannot be read: Permission denied")


@pytest.mark.parametrize("names", [(), ("notes.txt", "more.txt")])
def test_a_folder_without_an_image_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(ManifestError, match=r"holds no image, but (nothing|2 \.txt)"):
        list_images([write_files(tmp_path, *names, content=b"")])


@pytest.mark.parametrize(
    ("name", "layout", "fault"),
    [
        ("nowhere", None, "does not exist"),
        ("a.jpg", None, "neither a folder, nor a table"),
        ("a.jpg", "folders", "no source of layout `folders`"),
        (".", "table", "no source of layout `table`"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path: Path, name: str, layout: str | None, fault: str) -> None:
    write_files(tmp_path, "a.jpg")
    with pytest.raises(ManifestError, match=fault):
        list_images([tmp_path / name], layout=layout)


# Tables

ROWS = [
    {"class": "cat", "file_name": "images/a.jpg", "split": "train"},
    {"class": "dog", "file_name": "./images/b.jpg", "split": "test"},
    {"class": "", "file_name": "images/c.jpg", "split": "test"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ", "
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(delimiter.join(line) for line in lines) + "\r\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_images(tmp_path: Path, suffix: str) -> None:
    write_files(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "images/unlisted.jpg")
    listing = list_images([write_table(tmp_path / f"list{suffix}", ROWS)])
    assert (listing.layout, listing.root, listing.n_found) == ("table", tmp_path, 3)
    assert listing.remark == "paths from `file_name`, classes from `class`, splits from `split`, IDs from the path"
    assert [(candidate.image_id, candidate.uri, class_name_of(candidate)) for candidate in listing.candidates] == [
        ("images-_a-pjpg", "images/a.jpg", "cat"),
        ("images-_b-pjpg", "images/b.jpg", "dog"),
        ("images-_c-pjpg", "images/c.jpg", None),
    ]
    assert [candidate.split for candidate in listing.candidates] == ["train", "test", "test"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg")
    rows = [{"where": "a.jpg", "kind": 3, "fold": 0, "key": "x/1"}, {"where": "b.jpg", "kind": 4, "fold": 1, "key": 2}]
    columns = Columns(path="where", label="kind", split="fold", image_id="key")
    listing = list_images([write_table(tmp_path / "list.jsonl", rows)], columns=columns)
    assert [(candidate.image_id, class_name_of(candidate), candidate.split) for candidate in listing.candidates] == [
        ("2", "4", "1"),
        ("x-_1", "3", "0"),
    ]


def test_whole_numbers_stay_whole_where_a_label_is_missing(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    table = pa.table({"path": ["a.jpg", "b.jpg", "c.jpg"], "label": [3.0, float("nan"), None]})
    pq.write_table(table, tmp_path / "list.parquet")
    listing = list_images([tmp_path / "list.parquet"])
    assert classes_of(listing) == {"a.jpg": "3", "b.jpg": None, "c.jpg": None}


def test_paths_may_start_from_another_folder(tmp_path: Path) -> None:
    write_files(tmp_path / "pictures", "a.jpg")
    table = write_table(tmp_path / "list.jsonl", [{"path": "a.jpg"}])
    listing = list_images([table], images=tmp_path / "pictures")
    assert (listing.root, list(classes_of(listing))) == (tmp_path / "pictures", ["a.jpg"])


def test_an_absolute_path_in_the_folder_becomes_relative(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    table = write_table(tmp_path / "list.jsonl", [{"path": str(tmp_path / "a.jpg")}])
    assert list(classes_of(list_images([table]))) == ["a.jpg"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../outside.jpg", "leads out"),
        ("/etc/hostname", "leads out"),
        ("a/../../outside.jpg", "leads out"),
        ("link.jpg", "leads out"),
        (".", "leads out"),
        ("gone.jpg", "No such file"),
        ("folder", "is a folder"),
        ("pipe.jpg", "is a pipe"),
        ("https://example.org/a.jpg", "web address"),
        ("a\0.jpg", "null"),
        ("a\\b.jpg", "backslash"),
        ("\ud800.jpg", "UTF-8"),
        ("x" * 5000, "too long"),
        ("", "has no path"),
        (None, "has no path"),
        (7, "has no path"),
    ],
)
def test_a_row_whose_path_is_no_file_of_the_folder_is_quarantined(tmp_path: Path, path: object, reason: str) -> None:
    folder = write_files(tmp_path, "outside.jpg", "in/a.jpg", "in/folder/b.jpg") / "in"
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    os.mkfifo(folder / "pipe.jpg")
    listing = list_images([write_table(folder / "list.jsonl", [{"path": "a.jpg"}, {"path": path}])])
    [quarantined] = listing.quarantined
    assert reason in quarantined.reason
    assert quarantined.where.startswith("row 2")
    assert (listing.n_found, list(classes_of(listing))) == (2, ["a.jpg"])


def test_a_row_with_the_id_of_another_or_none_is_quarantined(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = [{"path": "b.jpg", "id": 1}, {"path": "a.jpg", "id": 1}, {"path": "c.jpg", "id": " "}]
    listing = list_images([write_table(tmp_path / "list.jsonl", rows)])
    assert list(classes_of(listing)) == ["b.jpg"]
    assert [thing.reason for thing in listing.quarantined] == ["has the same ID as row 1, b.jpg: `1`", "has no ID"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("list.csv", b"path,label\na.jpg\n", "line 2 has 1 cells, the first 2"),
        ("list.csv", b'path,label\n"a.jpg,x\n', "cannot be read as a table"),
        ("list.csv", b"", "has no row"),
        ("list.csv", b"path\n", "has no row"),
        ("list.csv", b"path\ncaf\xe9.jpg\n", "not in UTF-8"),
        ("list.csv", b"name;label\na.jpg;x\n", "no column of paths: its columns are `name;label`"),
        ("list.jsonl", b'{"path": "a.jpg"}\n{"path": \n', "line 2 is no JSON"),
        ("list.jsonl", b"[" * 100_000, "cannot be read as a table"),
        ("list.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("list.jsonl", b'{"path": "a.jpg", "label": "\\ud800"}', "is no text"),
        ("list.parquet", b"PAR1 not", "no Parquet file"),
    ],
)
def test_a_damaged_table_is_one_error(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    write_files(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=fault):
        list_images([tmp_path / name])


def test_embedded_images_in_a_table_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a.jpg"}]}), tmp_path / "list.parquet")
    with pytest.raises(ManifestError, match="`image` holds no paths"):
        list_images([tmp_path / "list.parquet"])


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    table = write_table(tmp_path / "list.jsonl", [{"path": "a.jpg"}])
    with pytest.raises(ManifestError, match="`kind`") as refused:
        list_images([table], columns=Columns(label="kind"))
    assert refused.value.hint == "give --label-column one of `path`"


def test_several_sources_are_shards_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="2 sources"):
        list_images([tmp_path, tmp_path])
