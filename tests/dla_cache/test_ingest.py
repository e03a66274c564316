"""From what was found to a manifest: each image checked once, all accounted for, the same bytes every time."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dla_cache.candidates import Candidate
from dla_cache.errors import ImageError, ManifestError, StoreError, WorkInterrupted
from dla_cache.ingest import ManifestReport, make_manifest, quarantine_path, read_class_names
from dla_cache.listing import list_images
from dla_cache.manifest import ManifestRow, read_manifest
from dla_cache.shares import parse_allowance, parse_split
from dla_cache.tars import read_range
from tests.hostile import encoded, picture, write_hostile_files


def write_images(folder: Path, **seeds: int) -> Path:
    """A PNG of 8 x 8 for each name, `cat__1` is `cat/1.png`; an equal seed gives equal bytes."""
    for name, seed in seeds.items():
        path = folder / f"{name.replace('__', '/')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("PNG", picture((8, 8), seed)))
    return folder


def make(source: Path, out: Path | None = None, *, layout: str | None = None, **settings: Any) -> ManifestReport:
    return make_manifest(list_images([source], layout=layout), out or source.with_suffix(".parquet"), **settings)


def rows_of(report: ManifestReport) -> dict[str, ManifestRow]:
    assert report.manifest is not None
    return {row.uri: row for row in read_manifest(Path(report.manifest)).rows()}


def test_every_hostile_file_is_listed_quarantined_or_skipped_as_it_should_be(tmp_path: Path) -> None:
    expected = {entry.name: entry for entry in write_hostile_files(tmp_path / "photos")}
    report = make(tmp_path / "photos", allowance=parse_allowance("100%"))
    rows = rows_of(report)
    assert set(rows) == {name for name, entry in expected.items() if entry.outcome == "listed"}
    assert {uri: (row.width, row.height) for uri, row in rows.items()} == {uri: expected[uri].size for uri in rows}
    quarantined = {thing.where: thing.reason for thing in report.quarantined}
    assert set(quarantined) == {name for name, entry in expected.items() if entry.outcome == "quarantined"}
    assert [(name, reason) for name, reason in quarantined.items() if expected[name].detail not in reason] == []
    kinds = [entry.detail for entry in expected.values() if entry.outcome == "skipped"]
    assert report.skipped == {kind: kinds.count(kind) for kind in sorted(kinds)}
    assert report.n_found == len(expected)
    assert report.layout == "flat"


def test_neither_threads_nor_the_order_of_a_listing_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hostile_files(tmp_path / "photos")
    write_images(tmp_path / "photos", cat__1=101, cat__2=102, dog__1=103)
    settings = {"split": parse_split("train=0.5,test=0.5"), "allowance": parse_allowance("100%")}
    make(tmp_path / "photos", tmp_path / "one.parquet", threads=1, **settings)

    class Backwards:
        def __init__(self, path: Path, scan: Any = os.scandir) -> None:
            with scan(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    make(tmp_path / "photos", tmp_path / "other.parquet", threads=7, **settings)
    for suffix in (".parquet", ".quarantine.jsonl"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()


def test_an_image_in_a_shard_is_checked_where_it_lies(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in {"1.png": encoded("PNG"), "1.cls": b"4", "2.png": encoded("PNG")[:60]}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    report = make(tmp_path / "0.tar", allowance=parse_allowance("50%"))
    [row] = rows_of(report).values()
    assert read_range(tmp_path, row.uri) == encoded("PNG")
    assert (row.width, row.height, row.label) == (40, 20, 0)
    assert report.quarantined[0].where == "0.tar/2.png"


# Classes


def test_classes_are_sorted_and_counted(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", dog__1=1, cat__1=2, cat__2=3, ant__1=4))
    assert list(report.images_per_class.items()) == [("ant", 1), ("cat", 2), ("dog", 1)]
    assert rows_of(report)["dog/1.png"].label == 2


def test_classes_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", **{f"{number}__a": number for number in (10, 9, 2)}))
    assert list(report.images_per_class) == ["2", "9", "10"]


def test_a_class_whose_images_are_all_bad_or_not_taken_keeps_its_index(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ant__1=1, cat__1=2, dog__1=3)
    (tmp_path / "in" / "ant" / "1.png").write_bytes(b"")
    report = make(tmp_path / "in", limit=2, allowance=parse_allowance("1"))
    assert report.images_per_class == {"ant": 0, "cat": 1, "dog": 0}


def test_a_second_manifest_can_have_the_classes_of_the_first(tmp_path: Path) -> None:
    first = make(write_images(tmp_path / "in", ant__1=1, cat__1=2))
    second = make(write_images(tmp_path / "more", cat__1=3), class_names=read_class_names(Path(first.manifest or "")))
    assert second.images_per_class == {"ant": 0, "cat": 1}
    assert rows_of(second)["cat/1.png"].label == 1


def test_classes_can_come_from_a_list(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\r\ncat\n\n", encoding="utf-8-sig")
    report = make(write_images(tmp_path / "in", cat__1=1), class_names=read_class_names(tmp_path / "classes.txt"))
    assert report.images_per_class == {"dog": 0, "cat": 1}


def test_a_class_that_is_not_in_the_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="1 classes are not among the 2 given: `cow`"):
        make(write_images(tmp_path / "in", cat__1=1, cow__1=2), class_names=["cat", "dog"])


@pytest.mark.parametrize(
    ("content", "fault"), [(b"a\nb\na\n", "stand twice in .*: `a`"), (b"\xff", "UTF-8"), (None, "cannot be read")]
)
def test_a_list_that_is_no_class_map_is_refused(tmp_path: Path, content: bytes | None, fault: str) -> None:
    if content is not None:
        (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ManifestError, match=fault):
        read_class_names(tmp_path / "classes.txt")


# Splits and limits


def test_without_a_word_of_splits_all_images_are_for_training(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", cat__1=1, b=2))
    assert report.images_per_split == {"train": 2}
    assert report.unlabelled_per_split == {"train": 1}


def test_one_split_for_all_comes_before_that_of_the_source(tmp_path: Path) -> None:
    write_images(tmp_path / "in", train__cat__1=1, test__cat__1=2)
    assert make(tmp_path / "in").images_per_split == {"test": 1, "train": 1}
    write_images(tmp_path / "in", stray=3)
    assert make(tmp_path / "in", split="holdout").images_per_split == {"holdout": 3}


def test_an_image_without_a_split_among_those_with_one_is_quarantined(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", train__cat__1=1, stray=2), allowance=parse_allowance("1"))
    assert [(thing.where, thing.reason) for thing in report.quarantined] == [("stray.png", "has no split")]
    assert set(rows_of(report)) == {"train/cat/1.png"}


def test_more_images_move_none_to_another_split_and_duplicates_stay_together(tmp_path: Path) -> None:
    shares = parse_split("train=0.5,test=0.5")
    write_images(tmp_path / "in", **{f"a__{number}": number for number in range(0, 40, 2)})
    before = rows_of(make(tmp_path / "in", split=shares))
    write_images(tmp_path / "in", **{f"b__{number}": number for number in range(40)})
    after = rows_of(make(tmp_path / "in", split=shares))
    assert {uri: after[uri].split for uri in before} == {uri: row.split for uri, row in before.items()}
    assert {row.split for row in before.values()} == {"train", "test"}
    assert [
        number for number in range(0, 40, 2) if after[f"a/{number}.png"].split != after[f"b/{number}.png"].split
    ] == []


def test_a_limit_takes_images_evenly_from_all_folders(tmp_path: Path) -> None:
    seeds = {f"{name}__{number}": 10 * index + number for index, name in enumerate("abc") for number in range(4)}
    report = make(write_images(tmp_path / "in", **seeds), limit=6)
    assert list(rows_of(report)) == [f"{name}/{number}.png" for name in "abc" for number in (0, 2)]
    assert (report.n_found, report.skipped) == (12, {"beyond the limit": 6})
    assert make(tmp_path / "in", limit=13).n_images == 12


# Duplicates


def test_duplicates_are_kept_and_reported(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", cat__1=1, cat__2=2, cat__3=1, dog__1=3))
    assert report.n_images == 4
    [repeat] = report.repeats
    assert repeat.where == ("cat/1.png", "cat/3.png")
    assert report.conflicts == report.leaks == ()


def test_dropping_duplicates_keeps_the_first_by_id_and_counts_the_rest(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", a=1, b=2, c=1, d=2, e=1), drop_duplicates=True)
    assert list(rows_of(report)) == ["a.png", "b.png"]
    assert report.skipped == {"duplicate": 3}
    assert len(report.repeats) == 2


def test_one_content_of_several_classes_is_a_conflict_and_in_several_splits_a_leak(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", train__cat__1=1, train__dog__1=1, train__dog__2=2, test__dog__1=2))
    assert [repeat.labels for repeat in report.conflicts] == [(("cat",), ("dog",))]
    assert [repeat.where for repeat in report.leaks] == [("test/dog/1.png", "train/dog/2.png")]


# What is bad


@pytest.mark.parametrize(("allowed", "is_written"), [("0", False), ("1", True), ("19%", False), ("20%", True)])
def test_a_manifest_is_written_if_no_more_is_bad_than_allowed(tmp_path: Path, allowed: str, is_written: bool) -> None:
    write_images(tmp_path / "in", a=1, b=2, c=3, d=4, e=5)
    (tmp_path / "in" / "e.png").write_bytes(b"")
    report = make(tmp_path / "in", allowance=parse_allowance(allowed))
    assert (report.manifest is not None) == (tmp_path / "in.parquet").exists() == is_written
    assert report.quarantine is not None
    assert json.loads(Path(report.quarantine).read_text()) == {"where": "e.png", "reason": "is empty: 0 bytes"}


def test_an_old_manifest_stays_and_an_old_quarantine_does_not(tmp_path: Path) -> None:
    out = tmp_path / "in.parquet"
    make(write_images(tmp_path / "in", a=1, b=2))
    manifest = out.read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(b"")
    assert make(tmp_path / "in").manifest is None
    assert quarantine_path(out).exists()
    assert out.read_bytes() == manifest
    write_images(tmp_path / "in", b=2)
    assert make(tmp_path / "in").quarantine is None
    assert not quarantine_path(out).exists()


def test_a_source_with_no_good_image_makes_no_manifest_whatever_is_allowed(tmp_path: Path) -> None:
    write_images(tmp_path / "in", a=1)
    (tmp_path / "in" / "a.png").write_bytes(b"")
    assert make(tmp_path / "in", allowance=parse_allowance("100%")).manifest is None


@pytest.mark.parametrize("change", [Path.unlink, lambda path: (path.unlink(), os.mkfifo(path))])
def test_a_file_that_goes_between_finding_and_reading_is_quarantined(tmp_path: Path, change: Any) -> None:
    listing = list_images([write_images(tmp_path / "in", a=1, b=2)])
    change(tmp_path / "in" / "a.png")
    report = make_manifest(listing, tmp_path / "in.parquet", allowance=parse_allowance("1"))
    assert [thing.where for thing in report.quarantined] == ["a.png"]


def test_an_image_that_is_counted_twice_is_an_error(tmp_path: Path) -> None:
    listing = list_images([write_images(tmp_path / "in", a=1)])
    object.__setattr__(listing, "candidates", (*listing.candidates, Candidate("b", "a.png", "a.png")))
    with pytest.raises(ManifestError, match="of 1 found, 2 are listed"):
        make_manifest(listing, tmp_path / "in.parquet")


def test_nothing_is_written_when_interrupted(tmp_path: Path) -> None:
    write_images(tmp_path / "in", a=1, b=2, c=3)
    (tmp_path / "in" / "a.png").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    with pytest.raises(WorkInterrupted, match="2 of 3 images are checked, nothing is written"):
        make(
            tmp_path / "in",
            on_progress=lambda done, total: seen.append((done, total)),
            should_stop=lambda: len(seen) == 2,
        )
    assert seen == [(1, 3), (2, 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_place_that_cannot_be_written_is_named_before_the_images_are_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checked: list[int] = []
    with pytest.raises(StoreError, match="cannot be written"):
        make(
            write_images(tmp_path / "in", a=1),
            tmp_path / "file" / "in.parquet",
            on_progress=lambda done, _: checked.append(done),
        )
    assert checked == []


@pytest.mark.parametrize("content", ["a table", "a text", "a folder", "a broken link"])
def test_a_file_that_is_no_manifest_is_not_overwritten(tmp_path: Path, content: str) -> None:
    out = tmp_path / "list.parquet"
    if content == "a table":
        pq.write_table(pa.table({"path": ["in/a.png"]}), out)
    elif content == "a folder":
        out.mkdir()
    elif content == "a broken link":
        out.symlink_to("gone")
    else:
        out.write_text("hello")
    with pytest.raises(ManifestError, match="is no manifest"):
        make(write_images(tmp_path / "in", a=1), out)


def test_a_manifest_is_overwritten(tmp_path: Path) -> None:
    make(write_images(tmp_path / "in", a=1))
    assert make(write_images(tmp_path / "in", b=2)).n_images == 2


def test_the_folder_can_be_moved_with_its_manifest(tmp_path: Path) -> None:
    report = make(write_images(tmp_path / "in", a=1), tmp_path / "in" / "list.parquet")
    shutil.move(tmp_path / "in", tmp_path / "moved")
    manifest = read_manifest(tmp_path / "moved" / "list.parquet")
    assert [read_range(manifest.root, row.uri) for row in manifest.rows()] == [encoded("PNG", picture((8, 8), 1))]
    assert report.root == str(tmp_path / "in")


# Ranges


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("a.png#0+9999", "is cut off"),
        ("a.png#9999+1", "is cut off"),
        ("a.png#0+9999999999", "more than an image"),
        ("gone.png", "cannot be read: No such file"),
        ("pipe.png", "no regular file"),
        ("pipe.png#0+5", "no regular file"),
        (".", "cannot be read: Is a directory"),
    ],
)
def test_a_range_that_is_not_there_is_an_image_error(tmp_path: Path, uri: str, fault: str) -> None:
    write_images(tmp_path, a=1)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=fault):
        read_range(tmp_path, uri)


def test_a_range_is_read_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a#b").write_bytes(b"0123456789")
    assert [read_range(tmp_path, uri) for uri in ("a#b", "a#b#2+3", "a#b#10+0")] == [b"0123456789", b"234", b""]
