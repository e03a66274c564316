"""Manifests of images with any number of classes: the class map, the rows and the counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from dla_cache.candidates import Columns
from dla_cache.errors import ManifestError
from dla_cache.ingest import ManifestReport, make_manifest, read_class_names
from dla_cache.listing import list_images
from dla_cache.manifest import Label, read_manifest
from dla_cache.shares import parse_allowance
from tests.hostile import encoded, picture

Cell = list[str] | str | None


def make(folder: Path, *cells: Cell, seeds: list[int] | None = None, **settings: Any) -> ManifestReport:
    """The manifest of one small PNG for each cell; images of equal seeds have equal bytes."""
    lines = []
    for number, cell in enumerate(cells):
        (folder / f"{number}.png").write_bytes(encoded("PNG", picture((8, 8), seeds[number] if seeds else number)))
        lines.append(json.dumps({"path": f"{number}.png", "label": cell}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    columns = settings.pop("columns", None)
    return make_manifest(list_images([folder / "list.jsonl"], columns=columns), folder / "list.parquet", **settings)


def labels_of(report: ManifestReport) -> list[Label | None]:
    assert report.manifest is not None
    return [row.label for row in read_manifest(Path(report.manifest)).rows()]


def test_every_form_of_a_cell_comes_into_the_manifest(tmp_path: Path) -> None:
    report = make(tmp_path, ["dog", "cat", "dog"], "cow", [], None, "", ["cat"])
    assert read_manifest(tmp_path / "list.parquet").class_names == ("cat", "cow", "dog")
    assert labels_of(report) == [(0, 2), (1,), (), None, None, (0,)]


def test_the_counts_are_of_images_and_of_all_their_classes(tmp_path: Path) -> None:
    report = make(tmp_path, ["dog", "cat"], "cow", [], None, ["dog"])
    assert report.is_multi_label
    assert report.images_per_class == {"cat": 1, "cow": 1, "dog": 2}
    assert report.classes_per_image == (2 + 1 + 0 + 1) / 4
    assert report.n_without_class == 1
    assert report.unlabelled_per_split == {"train": 1}


def test_one_class_an_image_is_counted_as_such(tmp_path: Path) -> None:
    report = make(tmp_path, "cat", "dog", None)
    assert labels_of(report) == [0, 1, None]
    assert (report.is_multi_label, report.classes_per_image, report.n_without_class) == (False, 1, 0)
    assert make(tmp_path, None).classes_per_image == 0


def test_the_class_map_is_in_order_whatever_the_order_of_rows_and_lists(tmp_path: Path) -> None:
    make(tmp_path, ["Zebra", "ant"], ["b", "a"])
    assert read_class_names(tmp_path / "list.parquet") == ("Zebra", "a", "ant", "b")
    make(tmp_path, ["10", "9"], ["2"])
    assert read_class_names(tmp_path / "list.parquet") == ("2", "9", "10")


def test_labels_are_sorted_by_the_class_map_not_by_name(tmp_path: Path) -> None:
    report = make(tmp_path, ["ant", "cow"], ["cow"], class_names=("cow", "bee", "ant"))
    assert labels_of(report) == [(0, 2), (0,)]
    assert report.images_per_class == {"cow": 2, "bee": 0, "ant": 1}


def test_classes_that_are_not_in_the_map_are_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="2 classes are not among the 1 given: `bee`, `dog`"):
        make(tmp_path, ["dog", "cat"], ["bee"], class_names=("cat",))


def test_a_separator_alone_makes_a_manifest_multi_label(tmp_path: Path) -> None:
    report = make(tmp_path, "cat", None, columns=Columns(label_separator=","))
    assert labels_of(report) == [(0,), None]


def test_a_multi_label_manifest_may_have_no_label_at_all(tmp_path: Path) -> None:
    report = make(tmp_path, [], ["cat"], limit=1)
    assert labels_of(report) == [()]
    report = make(tmp_path, None, "", columns=Columns(label_separator=","))
    assert labels_of(report) == [None, None]
    assert read_manifest(tmp_path / "list.parquet").is_multi_label


def test_a_limit_keeps_the_kind_and_the_whole_class_map(tmp_path: Path) -> None:
    report = make(tmp_path, "cat", ["dog"], "cow", ["ant", "bee"], limit=2)
    assert labels_of(report) == [(2,), (3,)]
    assert list(report.images_per_class) == ["ant", "bee", "cat", "cow", "dog"]


def test_one_content_with_other_classes_is_a_conflict(tmp_path: Path) -> None:
    cells: list[Cell] = [["dog", "cat"], ["cat", "dog", "cat"], None, ["cat"], []]
    report = make(tmp_path, *cells, ["cow"], "cow", seeds=[0, 0, 0, 0, 0, 1, 1])
    assert [repeat.labels for repeat in report.conflicts] == [((), ("cat",), ("cat", "dog"))]
    assert [len(repeat.where) for repeat in report.repeats] == [5, 2]
    assert make(tmp_path, ["dog", "cat"], ["cat", "dog"], None, seeds=[0, 0, 0]).conflicts == ()


def test_of_duplicates_the_labels_of_the_first_are_kept(tmp_path: Path) -> None:
    report = make(tmp_path, ["dog", "cat"], ["cat"], seeds=[0, 0], drop_duplicates=True)
    assert labels_of(report) == [(0, 1)]


def test_an_image_with_a_bad_list_is_accounted_for(tmp_path: Path) -> None:
    report = make(tmp_path, ["cat", ""], ["dog"], allowance=parse_allowance("1"))
    assert (report.n_found, report.n_images, len(report.quarantined)) == (2, 1, 1)
    assert report.images_per_class == {"dog": 1}


def test_equal_lists_make_equal_bytes_however_many_threads_there_are(tmp_path: Path) -> None:
    contents = set()
    for threads in (1, 4):
        make(tmp_path, ["dog", "cat"], ["cat", "dog"], [], threads=threads)
        contents.add((tmp_path / "list.parquet").read_bytes())
    assert len(contents) == 1
