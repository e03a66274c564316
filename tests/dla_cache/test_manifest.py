"""The image list: what goes in comes out, and what contradicts itself does not go in."""

from dataclasses import replace
from pathlib import Path

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
