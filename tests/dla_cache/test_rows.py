"""The row table: parts and blocks on disk, read as they are needed, each with its checksum."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dla_cache.errors import StoreError
from dla_cache.parquet import to_parquet
from dla_cache.shards import Shard, ShardPlan
from dla_cache.store import row_blocks, row_files, row_parts, rows
from dla_cache.store.row_files import read_rows, row_problems, write_rows
from dla_cache.store.row_files import row_files as files_of
from dla_cache.store.rows import RowTable, StoredImage

BLOCK, PART = 4, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, row_blocks, row_files, row_parts):
        monkeypatch.setattr(module, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(row_parts, "PART_ROWS", PART)


def image(row: int, split: str = "train", label: int | tuple[int, ...] | None = None) -> StoredImage:
    return StoredImage(row, f"image-{row}", f"{row:064x}", split, label, f"{row}.png")


def gone(row: int) -> StoredImage:
    return replace(image(row, "val"), sha256="", uri="", removed=True)


@st.composite
def tables(draw: st.DrawFn) -> RowTable:
    """Rows in a few stretches, of some splits, some of them removed."""
    is_multi_label = draw(st.booleans())
    labels = st.lists(st.integers(0, 3), unique=True).map(sorted).map(tuple) if is_multi_label else st.integers(0, 3)
    images, row = [], 0
    for length in draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)):
        for _ in range(length):
            one = image(row, draw(st.sampled_from(["train", "train", "val"])), draw(labels | st.none()))
            images.append(draw(st.sampled_from([one] * 9 + [gone(row)])))
            row += 1
        row = -(-row // 16) * 16
    return RowTable(images, is_multi_label=is_multi_label)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_a_table_comes_back_from_disk_and_the_same_rows_are_the_same_bytes(
    table: RowTable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    rows_sha256 = write_rows(one, table)
    back = read_rows(one, rows_sha256)
    images = list(table)
    assert (list(back), len(back), back.end) == (images, len(images), images[-1].row + 1)
    assert back == table
    assert write_rows(two, RowTable(list(back), is_multi_label=back.is_multi_label)) == rows_sha256
    assert list(row_problems(one, rows_sha256)) == []
    assert {path.relative_to(one).as_posix() for path in one.glob("rows/*")} == set(files_of(back, rows_sha256))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), chosen=st.sampled_from([None, ["train"], ["val"], ["train", "val"]]))
def test_what_is_asked_of_a_table_is_what_its_rows_say(table: RowTable, chosen: list[str] | None) -> None:
    images = list(table)
    kept = [row for row in images if not row.removed]
    splits = {row.split for row in kept}
    assert table.splits == splits
    if chosen is None or splits.issuperset(chosen):
        expected = [row.row for row in kept if chosen is None or row.split in chosen]
        assert table.rows_of(chosen).tolist() == expected
    numbers = [row.row for row in images]
    assert table.ids_of(numbers) == tuple(table.image_ids) == tuple(row.image_id for row in images)
    assert table.images_of(numbers[::-1]) == images[::-1]
    assert [table.n_of(split) for split in sorted(splits)] == [
        sum(row.split == split for row in kept) for split in sorted(splits)
    ]
    if not table.is_multi_label:
        expected = [-1 if row.label is None else row.label for row in images]
        assert table.label_numbers(np.array(numbers)).tolist() == expected
    assert table.labels_of(numbers) == [row.label for row in images]
    assert table.splits_of(numbers) == [row.split for row in images]
    assert table.known(np.arange(table.end)).nonzero()[0].tolist() == numbers
    assert [table.row_of(row.image_id) for row in kept] == [row.row for row in kept]
    assert table.removed_ids == {row.image_id for row in images if row.removed}
    assert (table.n_kept, table.kept_ids) == (len(kept), tuple(row.image_id for row in kept))
    start, stop = table.spans[0]
    assert table.kept_ids_of(Shard(0, start, stop)) == tuple(row.image_id for row in kept if row.row < stop)


def test_opening_a_table_reads_no_row_and_one_row_reads_one_block(tmp_path: Path, reads: list[int]) -> None:
    table = read_rows(tmp_path, write_rows(tmp_path, RowTable(image(row) for row in range(20))))
    assert (len(table), table.splits, table.rows_of(["train"]).tolist()) == (20, {"train"}, list(range(20)))
    assert reads == []
    assert table[13].image_id == "image-13"
    assert table.image_ids[14] == "image-14"
    assert reads == [1]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that are read from files, each within its part."""
    numbers: list[int] = []
    original: Callable = row_files._loader

    def counting(*arguments: object) -> Callable:
        load = original(*arguments)
        return lambda number: numbers.append(number) or load(number)

    monkeypatch.setattr(row_files, "_loader", counting)
    return numbers


def test_every_flipped_byte_of_a_table_is_noticed_by_verify_and_never_read(tmp_path: Path) -> None:
    rows_sha256 = write_rows(tmp_path, RowTable(image(row) for row in range(10)))
    images = list(read_rows(tmp_path, rows_sha256))
    for path in sorted(tmp_path.glob("rows/*")):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert list(row_problems(tmp_path, rows_sha256)), (path.name, place)
            try:
                assert list(read_rows(tmp_path, rows_sha256)) == images
            except StoreError as error:
                assert "not the one that was written" in error.message  # noqa: PT017
        path.write_bytes(whole)


def test_a_part_that_is_lost_or_short_is_noticed_when_the_table_is_opened(tmp_path: Path) -> None:
    rows_sha256 = write_rows(tmp_path, RowTable(image(row) for row in range(10)))
    part = sorted(tmp_path.glob("rows/*.arrow"))[1]
    whole = part.read_bytes()
    for damage in (lambda: part.write_bytes(whole[:-1]), part.unlink):
        damage()
        with pytest.raises(StoreError, match=rf"part `rows/{part.name}`.*not the one that was written"):
            read_rows(tmp_path, rows_sha256)


def test_removing_an_image_writes_its_part_anew_and_no_other(tmp_path: Path) -> None:
    before = read_rows(tmp_path, write_rows(tmp_path, RowTable(image(row) for row in range(20))))
    after = read_rows(tmp_path, write_rows(tmp_path, before.without(["image-9"])))
    assert after == RowTable(replace(gone(9), split="train") if row == 9 else image(row) for row in range(20))
    old, new = ([part.entry["file"] for part in table.parts if part.entry] for table in (before, after))
    assert [old[0], old[2]] == [new[0], new[2]]
    assert old[1] != new[1]
    assert (after.n_kept, after.removed_rows) == (19, {9})


def test_an_index_that_another_index_takes_the_place_of_is_refused(tmp_path: Path) -> None:
    one = write_rows(tmp_path, RowTable(image(row) for row in range(3)))
    other = write_rows(tmp_path, RowTable(image(row, "val") for row in range(3)))
    names = [row_files.index_name(sha256) for sha256 in (one, other)]
    (tmp_path / names[0]).write_bytes((tmp_path / names[1]).read_bytes())
    with pytest.raises(StoreError, match=r"index of the row table .* is not the one that was written"):
        read_rows(tmp_path, one)


def test_a_file_that_an_index_names_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    table = read_rows(tmp_path, write_rows(tmp_path, RowTable(image(row) for row in range(3))))
    assert table.parts[0].entry is not None
    table.parts[0].entry["file"] = "rows/../../x.arrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "_is_there", lambda *_: True)
        rows_sha256 = write_rows(tmp_path, table)
        with pytest.raises(ValueError, match=r"names a file `rows/\.\./\.\./x\.arrow`"):
            read_rows(tmp_path, rows_sha256)


def test_a_thousand_million_images_are_planned_from_the_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (part,) = read_rows(tmp_path, write_rows(tmp_path, RowTable(image(row) for row in range(2048)))).parts
    n_parts = 4000
    blocks = {"block_splits": ["train"] * 256, "block_offsets": [*range(0, 257 * 8, 8)], "block_crc32c": [0] * 256}
    assert part.entry is not None
    entries = [{**part.entry, "start": n * 2**18, "n_rows": 2**18, **blocks} for n in range(n_parts)]
    entries = [{**entry, "splits": [{"split": "train", "images": 2**18}]} for entry in entries]
    facts = {"dla": json.dumps({"block_rows": 1024, "is_multi_label": False})}
    content = to_parquet(pa.Table.from_pylist(entries, schema=row_files.INDEX_SCHEMA).replace_schema_metadata(facts))
    rows_sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / row_files.index_name(rows_sha256)).write_bytes(content)
    started = time.process_time()
    table = read_rows(tmp_path, rows_sha256)
    plan = ShardPlan(table.spans, 4096)
    assert time.process_time() - started < 2
    assert (len(table), len(plan), table.n_of("train")) == (n_parts * 2**18, n_parts * 64, n_parts * 2**18)
    assert plan[-1] == Shard(n_parts * 64 - 1, table.end - 4096, table.end)
