"""The image list: what goes in comes out, and what contradicts itself does not go in."""

import contextlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import ImageError, ManifestError
from dla_cache.images import read_image_bytes
from dla_cache.manifest import Manifest, ManifestRow, read_manifest, write_manifest

ROW = ManifestRow("a", "images/a.png", 0, "train", "0" * 64, 8, 8)

ROWS = st.lists(
    st.builds(
        ManifestRow,
        image_id=st.from_regex("[A-Za-z0-9_-]{1,12}", fullmatch=True),
        uri=st.from_regex("[a-z]{1,5}/[^/\\\\\0]{1,5}[a-z]", fullmatch=True).filter(lambda uri: ".." not in uri),
        label=st.none() | st.integers(0, 2),
        split=st.text(st.characters(codec="utf-8"), min_size=1, max_size=5),
        sha256=st.from_regex("[0-9a-f]{64}", fullmatch=True),
        width=st.integers(1, 2**31 - 1),
        height=st.integers(1, 2**31 - 1),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda row: row.image_id,
)


@given(rows=ROWS)
def test_rows_and_class_names_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[ManifestRow]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    written = write_manifest(path, rows, ["cat", "dog", "Kröte"])
    read = read_manifest(path)
    assert list(read.rows()) == rows
    assert read.class_names == ("cat", "dog", "Kröte")
    assert read.digest == written.digest


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"image_id": "a b"}, "unsafe ID"),
        ({"image_id": "a/b"}, "unsafe ID"),
        ({"image_id": "a.png"}, "unsafe ID"),
        ({"image_id": "a\n"}, "unsafe ID"),
        ({"image_id": ""}, "unsafe ID"),
        ({"uri": "/etc/passwd"}, "escaping `uri`"),
        ({"uri": "../secret.png"}, "escaping `uri`"),
        ({"uri": "images/../../secret.png"}, "escaping `uri`"),
        ({"uri": "images\\a.png"}, "escaping `uri`"),
        ({"uri": ""}, "escaping `uri`"),
        ({"label": 2}, "label outside"),
        ({"label": -1}, "label outside"),
        ({"split": ""}, "no split"),
        ({"sha256": "0" * 63}, "no sha256"),
        ({"sha256": "F" * 64}, "no sha256"),
        ({"width": 0}, "no size"),
        ({"height": -8}, "no size"),
    ],
)
def test_a_faulty_row_is_refused_and_named(tmp_path: Path, changes: dict[str, object], fault: str) -> None:
    faulty = replace(ROW, **{"image_id": "bad", **changes})
    with pytest.raises(ManifestError, match=fault) as raised:
        write_manifest(tmp_path / "manifest.parquet", [ROW, faulty], ["cat", "dog"])
    assert faulty.image_id in str(raised.value)
    assert not (tmp_path / "manifest.parquet").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": None},
        {"split": None},
        {"sha256": None},
        {"width": None},
        {"image_id": "\ud800"},
        {"uri": "\ud800"},
        {"uri": 3},
        {"label": "cat"},
        {"label": 2**40},
        {"label": 0.5},
        {"label": float("nan")},
        {"width": []},
    ],
)
def test_a_value_that_no_column_holds_is_not_written(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ManifestError, match="do not fit the manifest's columns") as refused:
        write_manifest(tmp_path / "manifest.parquet", [replace(ROW, **changes)], ["cat"])
    assert refused.value.hint
    assert not (tmp_path / "manifest.parquet").exists()


def test_a_duplicate_id_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="stand twice: `a`"):
        write_manifest(tmp_path / "manifest.parquet", [ROW, replace(ROW, uri="other.png")], ["cat"])


def test_of_many_faulty_rows_some_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    rows = [replace(ROW, image_id=f"image-{number}", label=7) for number in range(10)]
    with pytest.raises(ManifestError, match="`image-0`, `image-1`, `image-2` and 7 more"):
        write_manifest(tmp_path / "manifest.parquet", rows, ["cat"])


def test_a_faulty_file_of_other_making_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    doubled = pa.concat_tables([table, table])
    pq.write_table(doubled.replace_schema_metadata(pq.read_schema(path).metadata), path)
    with pytest.raises(ManifestError, match="stand twice"):
        read_manifest(path)


def test_a_class_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="class name"):
        write_manifest(tmp_path / "manifest.parquet", [ROW], ["cat", "cat"])


def test_a_manifest_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no image"):
        write_manifest(tmp_path / "manifest.parquet", [], ["cat"])


def test_a_missing_file_and_one_that_is_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("nowhere.parquet", "notes.txt"):
        with pytest.raises(ManifestError, match=name):
            read_manifest(tmp_path / name)


def test_a_parquet_file_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match="none of ours"):
        read_manifest(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ("{not json", "metadata `dla` that is no JSON"),
        ("\ud800", "metadata `dla` that is no JSON"),
        ("[" * 100_000, "metadata `dla` that is no JSON"),
        ("[1]", "metadata `dla` that is no JSON"),
        ("null", "metadata `dla` that is no JSON"),
        ('{"class_names": ["cat"]}', "none of ours"),
        ('{"format": "1", "class_names": ["cat"]}', 'of format `"1"`, this dla reads `1`'),
        ('{"format": true, "class_names": ["cat"]}', "of format `true`, this dla reads `1`"),
        ('{"format": [1], "class_names": ["cat"]}', r"of format `\[1\]`, this dla reads `1`"),
        ('{"format": 2, "class_names": ["cat"]}', "of format `2`, this dla reads `1`"),
        ('{"format": 1}', "class names"),
        ('{"format": 1, "class_names": null}', "class names"),
        ('{"format": 1, "class_names": "cat"}', "class names"),
        ('{"format": 1, "class_names": {"cat": 0}}', "class names"),
        ('{"format": 1, "class_names": ["cat", 3]}', "no text: `3`"),
        ('{"format": 1, "class_names": ["cat", ["dog"]]}', "no text"),
        ('{"format": 1, "class_names": ["cat", ""]}', "no text"),
        ('{"format": 1, "class_names": ["cat", "\\ud800"]}', "no text"),
        ('{"format": 1, "class_names": ["cat", "cat"]}', "stand twice: `cat`"),
    ],
)
def test_facts_that_are_not_those_of_a_manifest_are_refused_and_named(tmp_path: Path, facts: str, fault: str) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    pq.write_table(table.replace_schema_metadata({"dla": facts.encode("utf-8", "surrogatepass")}), path)
    with pytest.raises(ManifestError, match=fault) as refused:
        read_manifest(path)
    assert refused.value.hint
    str(refused.value).encode()  # it can be printed


def rewrite(path: Path, table: pa.Table) -> None:
    pq.write_table(table.replace_schema_metadata(pq.read_schema(path).metadata), path)


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    rewrite(path, table.append_column("label", table["label"]))
    with pytest.raises(ManifestError, match=r"columns of a manifest.*\"label\""):
        read_manifest(path)


def broken_text() -> pa.Array:
    """A string that is no UTF-8, as a writer that does not check makes it."""
    return pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff!")]
    )


@pytest.mark.parametrize("column", ["image_id", "uri", "split", "sha256"])
@pytest.mark.parametrize(
    "wrong",
    [
        pa.array([None], pa.string()),
        pa.array([["nested"]]),
        pa.array([{"nested": 1}]),
        pa.array([b"\xff"], pa.binary()),
        broken_text(),
    ],
    ids=["null", "list", "struct", "bytes", "broken text"],
)
def test_a_text_column_of_anything_else_is_refused(tmp_path: Path, column: str, wrong: pa.Array) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    rewrite(path, table.set_column(table.column_names.index(column), column, wrong))
    with pytest.raises(ManifestError, match="does not have the columns of a manifest") as refused:
        read_manifest(path)
    assert refused.value.hint


@pytest.mark.parametrize("column", ["label", "width", "height"])
@pytest.mark.parametrize(
    "wrong",
    [
        pa.array([["nested"]]),
        pa.array(["many"]),
        pa.array([0.5]),
        pa.array([float("nan")]),
        pa.array([2**40]),
        pa.array([datetime(2024, 1, 1)]),
    ],
    ids=["list", "text", "fraction", "NaN", "too large", "time"],
)
def test_a_number_column_of_anything_else_is_refused(tmp_path: Path, column: str, wrong: pa.Array) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    rewrite(path, table.set_column(table.column_names.index(column), column, wrong))
    with pytest.raises(ManifestError, match="does not have the columns of a manifest"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("column", "wider"),
    [
        ("image_id", pa.array(["a"], pa.large_string())),
        ("split", pa.array(["train"]).dictionary_encode()),
        ("label", pa.array([0], pa.int64())),
        ("width", pa.array([8], pa.uint16())),
    ],
)
def test_a_column_that_only_its_writer_made_wider_or_denser_is_read(
    tmp_path: Path, column: str, wider: pa.Array
) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    rewrite(path, table.set_column(table.column_names.index(column), column, wider))
    assert list(read_manifest(path).rows()) == [ROW]


def test_a_damaged_file_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [ROW], ["cat"])
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[random.integers(0, len(whole))] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(damaged)
        with contextlib.suppress(ManifestError):
            read_manifest(path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [ROW], ["cat"])
    pq.write_table(pq.read_table(path).drop_columns("sha256"), path)
    with pytest.raises(ManifestError, match="sha256"):
        read_manifest(path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    table = write_manifest(path, [ROW], ["cat"]).table
    metadata = pq.read_schema(path).metadata
    for wrong in (pa.array([["nested"]]), pa.array([None], pa.string())):
        changed = table.set_column(0, "image_id", wrong).replace_schema_metadata(metadata)
        pq.write_table(changed, path)
        with pytest.raises(ManifestError, match="does not have the columns of a manifest"):
            read_manifest(path)


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.parquet", "two.parquet"):
        write_manifest(tmp_path / name, [ROW], ["cat"])
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_selecting_splits_keeps_the_order(manifest: Manifest) -> None:
    selected = manifest.select(["train", "test"])
    assert [row for row in manifest.rows() if row.split != "validation"] == list(selected.rows())


def test_selecting_an_empty_split_names_it_and_those_there_are(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match=r"`holdout`[\s\S]*`train`"):
        manifest.select(["train", "holdout"])


def test_a_path_that_leaves_the_folder_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match="leaves"):
        manifest.path_of("../secret.png")


def test_a_changed_and_a_missing_image_are_noticed(manifest: Manifest) -> None:
    first, second, *_ = manifest.rows()
    manifest.path_of(first.uri).write_bytes(b"other")
    manifest.path_of(second.uri).unlink()
    for row, fault in ((first, "is not the file of the manifest"), (second, "No such file")):
        with pytest.raises(ImageError, match=f"`{row.image_id}`.*{fault}"):
            read_image_bytes(manifest.path_of(row.uri), row)
