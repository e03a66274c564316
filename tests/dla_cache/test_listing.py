"""Finding images: what a folder, a table and tar shards hold, and what is said of the rest."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dla_cache.candidates import Columns
from dla_cache.errors import ManifestError
from dla_cache.listing import Listing, list_images
from dla_cache.tars import read_range

JPEG_START = b"\xff\xd8\xff"  # nothing is decoded here


def write_files(folder: Path, *names: str, content: bytes = JPEG_START) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def classes_of(listing: Listing) -> dict[str, str | None]:
    return {candidate.uri: candidate.class_name for candidate in listing.candidates}


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
    assert (candidate.class_name, candidate.split) == (class_name, split)


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
    assert [(candidate.image_id, candidate.uri, candidate.class_name) for candidate in listing.candidates] == [
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
    assert [(candidate.image_id, candidate.class_name, candidate.split) for candidate in listing.candidates] == [
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


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_several_labels_an_image_are_refused_for_now(tmp_path: Path, suffix: str) -> None:
    write_files(tmp_path, "a.jpg")
    table = write_table(tmp_path / f"list{suffix}", [{"path": "a.jpg", "label": ["cat", "dog"]}])
    with pytest.raises(ManifestError, match="several labels are not supported yet") as refused:
        list_images([table])
    assert "--label-column" in str(refused.value.hint)


def test_embedded_images_in_a_table_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a.jpg"}]}), tmp_path / "list.parquet")
    with pytest.raises(ManifestError, match="`image` holds no paths"):
        list_images([tmp_path / "list.parquet"])


def test_a_label_that_is_no_name_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    with pytest.raises(ManifestError, match="`label` holds no class names"):
        list_images([write_table(tmp_path / "list.jsonl", [{"path": "a.jpg", "label": {"cat": 1}}])])


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    table = write_table(tmp_path / "list.jsonl", [{"path": "a.jpg"}])
    with pytest.raises(ManifestError, match="`kind`") as refused:
        list_images([table], columns=Columns(label="kind"))
    assert refused.value.hint == "give --label-column one of `path`"


# WebDataset shards


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_a_sample_is_a_byte_range_of_its_shard_and_nothing_is_copied(tmp_path: Path) -> None:
    first = {"0001.jpg": b"\xff\xd8\xff first", "0001.cls": b"3\n", "./0002.PNG": b"\x89PNG", "./0002.cls": b"dog"}
    write_shard(tmp_path / "shards" / "000.tar", first)
    write_shard(tmp_path / "shards" / "001.tar", {"0003.jpg": b"third", "0003.cls": b""})
    write_files(tmp_path, "notes.txt", content=b"words")
    listing = list_images([tmp_path])
    assert listing.layout == "webdataset"
    assert listing.remark == "shards 2, classes from `cls`, no splits, IDs from the name in the shard"
    assert [(candidate.image_id, candidate.class_name) for candidate in listing.candidates] == [
        ("0001-pjpg", "3"),
        ("0002-pPNG", "dog"),
        ("0003-pjpg", None),
    ]
    uris = [candidate.uri for candidate in listing.candidates]
    assert uris[0] == "shards/000.tar#512+9"
    assert [read_range(tmp_path, uri) for uri in uris] == [b"\xff\xd8\xff first", b"\x89PNG", b"third"]
    assert (listing.n_found, listing.skipped) == (4, {".txt": 1})


def test_shards_can_be_listed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write_shard(tmp_path / name / "0.tar", {f"{name}.jpg": b"x"}) for name in ("b", "a")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    listing = list_images(shards)
    assert [candidate.uri for candidate in listing.candidates] == ["a/0.tar#512+1", "b/0.tar#512+1"]
    assert read_range(listing.root, "b/0.tar#512+1") == b"x"


def test_classes_splits_and_ids_can_come_from_json(tmp_path: Path) -> None:
    facts = {"label": "cat", "split": "test", "url": "https://example.org"}
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.json": json.dumps(facts).encode()})
    [candidate] = list_images([shard]).candidates
    assert (candidate.image_id, candidate.class_name, candidate.split) == ("1-pjpg", "cat", "test")
    [candidate] = list_images([shard], columns=Columns(label="split", image_id="url")).candidates
    assert (candidate.image_id, candidate.class_name) == ("https-3a--_-_example-porg", "test")


def test_a_caption_is_a_class_only_if_asked_for(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.txt": b"a cat on a mat"})
    assert list_images([shard]).candidates[0].class_name is None
    [candidate] = list_images([shard], columns=Columns(label="txt")).candidates
    assert candidate.class_name == "a cat on a mat"


def test_where_names_repeat_between_shards_ids_begin_with_the_shard(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, {"1.jpg": b"x"})
    listing = list_images([tmp_path])
    assert [candidate.image_id for candidate in listing.candidates] == ["a-ptar-_1-pjpg", "b-ptar-_1-pjpg"]
    assert "IDs from shard and name" in listing.remark


def test_samples_that_are_no_single_image_are_counted(tmp_path: Path) -> None:
    members = {
        "good.jpg": b"x",
        "good.seg.png": b"x",
        "both.jpg": b"x",
        "both.png": b"x",
        "sound.wav": b"x",
        "broken.jpg": b"x",
        "broken.json": b"{",
        "label.jpg": b"x",
        "label.cls": b"\xff",
        ".hidden.jpg": b"x",
        "README": b"x",
    }
    shard = write_shard(tmp_path / "0.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = list_images([shard])
    assert [candidate.image_id for candidate in listing.candidates] == ["good-pjpg"]
    assert [thing.where for thing in listing.quarantined] == ["0.tar/both.jpg", "0.tar/broken.jpg", "0.tar/label.jpg"]
    assert listing.skipped == {"in a tar, of no sample": 3, "sample without an image": 1}
    assert listing.n_found == 8


def test_a_sparse_member_is_quarantined_for_its_bytes_are_no_range(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        entry = tarfile.TarInfo("1.jpg")
        entry.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(entry)
    [quarantined] = list_images([tmp_path / "0.tar"]).quarantined
    assert quarantined.reason == "is stored as a sparse file"


def test_a_huge_label_is_refused_before_it_is_read(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.json": bytes(2**20 + 1)})
    with pytest.raises(ManifestError, match=r"`1\.json` has 1048577 bytes, too many for a label"):
        list_images([shard])


def test_a_loose_image_beside_shards_decides_the_layout_unless_it_is_forced(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"1.jpg": b"x"})
    write_files(tmp_path, "cover.jpg")
    assert (list_images([tmp_path]).layout, list_images([tmp_path]).skipped) == ("flat", {".tar": 1})
    listing = list_images([tmp_path], layout="webdataset")
    assert [candidate.image_id for candidate in listing.candidates] == ["1-pjpg"]
    assert listing.skipped == {"not in a tar": 1}


def test_several_labels_a_sample_are_refused_for_now(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", {"1.jpg": b"x", "1.json": b'{"label": [1, 2]}'})
    with pytest.raises(ManifestError, match="several labels"):
        list_images([shard])


@pytest.mark.parametrize("damage", ["cut in a header", "cut in a payload", "garbled", "appended", "zipped", "text"])
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    # tarfile itself stops without a word at a garbled header and at the end of the first of two tars.
    shard = write_shard(tmp_path / "0.tar", {f"{number}.jpg": bytes(600) for number in range(3)})
    whole = shard.read_bytes()
    second = 512 + 1024
    damaged = {
        "cut in a header": whole[: second + 100],
        "cut in a payload": whole[: second + 700],
        "garbled": whole[:second] + b"\x55" * 512 + whole[second + 512 :],
        "appended": whole + whole,
        "zipped": b"\x1f\x8b" + whole,
        "text": b"not a tar at all",
    }
    shard.write_bytes(damaged[damage])
    with pytest.raises(ManifestError, match=r"0\.tar` cannot be read") as refused:
        list_images([shard])
    assert "uncompressed" in str(refused.value.hint)


def test_a_shard_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {"1.jpg": b"x"})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").symlink_to(tmp_path / "0.tar")
    with pytest.raises(ManifestError, match="leads out"):
        list_images([tmp_path / "in"])


def test_several_sources_are_shards_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="2 sources"):
        list_images([tmp_path, tmp_path])
