"""Labels of a manifest: one class an image, or any number of them, and never both."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_cache.errors import ManifestError
from dla_cache.manifest import Label, ManifestRow, read_manifest, write_manifest

ROW = ManifestRow("a", "images/a.png", 0, "train", "0" * 64, 8, 8)
MULTI_LABEL_ROW = replace(ROW, label=(0, 1))

LABELS = st.none() | st.sets(st.integers(0, 4)).map(lambda indices: tuple(sorted(indices)))


def rows_with(*labels: Label | None) -> list[ManifestRow]:
    return [replace(ROW, image_id=f"image-{number}", label=label) for number, label in enumerate(labels)]


@given(labels=st.lists(LABELS, min_size=1, max_size=6))
@settings(max_examples=40)
def test_any_sets_of_labels_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, labels: list[tuple[int, ...] | None]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    written = write_manifest(path, rows_with(*labels), list("abcde"), multi_label=True)
    read = read_manifest(path)
    assert list(read.rows()) == rows_with(*labels)
    assert read.is_multi_label
    assert read.digest == written.digest


def test_a_manifest_of_one_class_an_image_is_what_it_was_before_there_were_several(tmp_path: Path) -> None:
    rows = [ROW, ManifestRow("b", "images/b.png", None, "test", "1" * 64, 9, 8)]
    manifest = write_manifest(tmp_path / "manifest.parquet", rows, ["cat", "Kröte"])
    assert manifest.digest == "abfe316ddd42eae98281539b611f206a3f397e1fccef41a7d2e594873edd46c4"
    schema = pq.read_schema(tmp_path / "manifest.parquet")
    assert schema.field("label") == pa.field("label", pa.int32())
    assert schema.metadata == {b"dla": rb'{"class_names":["cat","Kr\u00f6te"],"format":1}'}


@pytest.mark.parametrize(
    ("labels", "asked", "is_multi_label"),
    [
        ((0, None), None, False),
        (((0,), None), None, True),
        (((), None), None, True),
        ((None, None), None, False),
        ((None, None), True, True),
        ((None, None), False, False),
    ],
)
def test_the_type_of_the_column_says_whether_images_may_have_several_classes(
    tmp_path: Path, labels: tuple[Label | None, ...], asked: bool | None, is_multi_label: bool
) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, rows_with(*labels), ["cat"], multi_label=asked)
    several = pa.list_(pa.field("element", pa.int32(), nullable=False))
    assert pq.read_schema(path).field("label").type == (several if is_multi_label else pa.int32())
    assert read_manifest(path).is_multi_label == is_multi_label


@pytest.mark.parametrize(
    ("labels", "asked", "stray"),
    [((0, (0,)), None, "image-0"), (((0,), 0), True, "image-1"), ((0, (0,)), False, "image-1")],
)
def test_labels_of_two_kinds_are_refused_and_named(
    tmp_path: Path, labels: tuple[Label, ...], asked: bool | None, stray: str
) -> None:
    with pytest.raises(ManifestError, match=f"two kinds.*`{stray}`"):
        write_manifest(tmp_path / "manifest.parquet", rows_with(*labels), ["cat"], multi_label=asked)
    assert not (tmp_path / "manifest.parquet").exists()


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ((1, 0), "out of order, or one twice"),
        ((1, 1), "out of order, or one twice"),
        ((0, 2), "label outside"),
        ((-1, 0), "label outside"),
    ],
)
def test_a_faulty_tuple_is_refused_and_named(tmp_path: Path, label: tuple[int, ...], fault: str) -> None:
    with pytest.raises(ManifestError, match=f"{fault}.*`image-1`") as refused:
        write_manifest(tmp_path / "manifest.parquet", rows_with((0, 1), label), ["cat", "dog"])
    assert refused.value.hint


@pytest.mark.parametrize("label", [(None,), (0.5,), ("cat",), (float("nan"),), (2**40,), ((0,),), (True,), [0], {0}])
def test_a_label_that_no_column_holds_is_not_written(tmp_path: Path, label: object) -> None:
    rows = [replace(ROW, label=label), replace(MULTI_LABEL_ROW, image_id="b")]
    with pytest.raises(ManifestError, match=r"do not fit the manifest's columns|two kinds"):
        write_manifest(tmp_path / "manifest.parquet", rows, ["cat", "dog"])
    assert not (tmp_path / "manifest.parquet").exists()


def rewrite_labels(path: Path, labels: pa.Array) -> None:
    """The manifest at `path` with another column `label`, as a foreign writer may make it."""
    metadata = pq.read_schema(path).metadata
    table = pq.read_table(path)
    changed = table.set_column(table.column_names.index("label"), "label", labels)
    pq.write_table(changed.replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.list_(pa.uint8()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)]
)
def test_lists_that_only_their_writer_made_wider_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [MULTI_LABEL_ROW], ["cat", "dog"])
    rewrite_labels(path, pa.array([[0, 1]], kind))
    manifest = read_manifest(path)
    assert manifest.is_multi_label
    assert list(manifest.rows()) == [MULTI_LABEL_ROW]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([[0, None]], pa.list_(pa.int32())),
        pa.array([[2**40]]),
        pa.array([[0.5]]),
        pa.array([["cat"]]),
        pa.array([[[0]]]),
        pa.array([[{"index": 0}]]),
        pa.array([[("a", 0)]], pa.map_(pa.string(), pa.int32())),
    ],
    ids=["null", "too large", "fraction", "text", "lists in lists", "struct", "map"],
)
def test_lists_of_anything_but_class_indices_are_refused(tmp_path: Path, labels: pa.Array) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [MULTI_LABEL_ROW], ["cat", "dog"])
    rewrite_labels(path, labels)
    with pytest.raises(ManifestError, match="does not have the columns of a manifest") as refused:
        read_manifest(path)
    assert "lists of int32" in str(refused.value.hint)


def test_lists_of_other_making_that_are_out_of_order_are_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.parquet"
    write_manifest(path, [MULTI_LABEL_ROW], ["cat", "dog"])
    rewrite_labels(path, pa.array([[1, 0]]))
    with pytest.raises(ManifestError, match=r"out of order.*`a`"):
        read_manifest(path)


def test_selecting_splits_keeps_labels_as_they_are(tmp_path: Path) -> None:
    rows = [MULTI_LABEL_ROW, replace(MULTI_LABEL_ROW, image_id="b", split="test", label=None)]
    selected = write_manifest(tmp_path / "manifest.parquet", rows, ["cat", "dog"]).select(["test"])
    assert selected.is_multi_label
    assert list(selected.rows()) == rows[1:]


def test_an_image_may_have_a_hundred_thousand_classes(tmp_path: Path) -> None:
    names = [str(number) for number in range(100_000)]
    row = replace(ROW, label=tuple(range(100_000)))
    write_manifest(tmp_path / "manifest.parquet", [row], names)
    assert list(read_manifest(tmp_path / "manifest.parquet").rows()) == [row]
