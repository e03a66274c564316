"""Housekeeping: stores are found and measured, leftovers go, and nothing else ever does."""

import fcntl
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr

from dla_cache.errors import StoreError
from dla_cache.housekeeping import describe_entry, find_stores, measure_usage, prune_store, remove_store
from dla_cache.store import LatentStore, open_store


@pytest.fixture
def store(tmp_path: Path, made: SimpleNamespace) -> LatentStore:
    return made.store(tmp_path / "caches/s", made.recipe(), made.latents(made.recipe(), 7), 3)


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_stores_are_found_below_folders_and_nothing_else_is(
    tmp_path: Path, store: LatentStore, made: SimpleNamespace
) -> None:
    made.store(tmp_path / "caches/deep/er/t", made.recipe(), made.latents(made.recipe(), 2), 2)
    zarr.create_array(tmp_path / "caches/theirs.zarr", shape=(2,), dtype="u1")
    (tmp_path / "caches/link").symlink_to(store.path)
    found = [tmp_path / "caches/deep/er/t", store.path]
    assert find_stores([tmp_path]) == find_stores([tmp_path / "caches", store.path]) == found


def test_an_entry_tells_what_a_store_is(store: LatentStore) -> None:
    entry = describe_entry(store.path)
    assert (entry.modalities, entry.images, entry.is_complete) == (("depth",), 7, True)
    assert entry.content_hash == store.content_hash()
    assert entry.layout == store.metadata.layout.name
    assert entry.size_bytes == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())


def test_a_damaged_store_is_listed_with_its_fault(store: LatentStore) -> None:
    next(store.path.glob("rows/index-*")).write_bytes(b"")
    entry = describe_entry(store.path)
    assert entry.fault is not None
    assert "row table" in entry.fault


def test_usage_accounts_for_every_byte_once(store: LatentStore) -> None:
    leave_rubbish(store)
    usage = measure_usage(store)
    committed = sum(record.size_bytes for record in store.committed("depth").values())
    assert usage.series == {"depth": committed}
    assert usage.leftovers == 4 + sum(path.stat().st_size for path in store.shard_files("depth", 1))
    assert usage.total == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())


def leave_rubbish(store: LatentStore) -> list[str]:
    """What a killed process leaves: a temporary file, and a shard's files without a record."""
    shard = store.shard_path("depth", 0)
    (shard.parent / f".{shard.name}.tmp").write_bytes(b"half")
    store.withdraw("depth", {1: store.committed("depth")[1]})
    left = [shard.parent / f".{shard.name}.tmp", *store.shard_files("depth", 1)]
    return sorted(path.relative_to(store.path).as_posix() for path in left)


def test_prune_removes_leftovers_and_nothing_else(store: LatentStore) -> None:
    rubbish = leave_rubbish(store)
    (store.shard_path("depth", 0).parent / "c.9.0.0.0").write_bytes(b"of no shard of this store: who knows whose")
    before = tree(store.path)
    assert sorted(prune_store(store, dry_run=True).files) == rubbish
    assert tree(store.path) == before
    assert sorted(prune_store(store).files) == rubbish
    assert tree(store.path) == before - set(rubbish)
    assert open_store(store.path).missing("depth") == [1]


def test_prune_leaves_shards_whose_records_are_lost(store: LatentStore) -> None:
    for record in (store.path / "commits/depth").iterdir():
        record.unlink()
    before = tree(store.path)
    with pytest.raises(StoreError, match="not one record"):
        prune_store(open_store(store.path))
    assert tree(store.path) == before


def test_prune_waits_for_nobody_and_takes_nothing_from_a_build_that_runs(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.create(tmp_path / "s", made.rows(4), [], 2, {"depth": made.recipe()})
    claim = tmp_path / "s/commits/depth/.1.json.tmp"
    with claim.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.shard_path("depth", 1).write_bytes(b"being written")
        with pytest.raises(StoreError, match=r"another process is writing to .*: depth, shard 1"):
            prune_store(store)
    assert store.shard_path("depth", 1).exists()
    prune_store(store)
    assert not store.shard_path("depth", 1).exists()
    assert not claim.exists()


def test_files_of_other_people_are_left_to_verify(store: LatentStore) -> None:
    (store.path / "notes.txt").write_text("mine")
    assert prune_store(store).files == ()
    assert "notes.txt" in tree(store.path)


def test_a_store_is_removed_whole(store: LatentStore) -> None:
    files = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}
    assert set(remove_store(store.path, dry_run=True).files) == files
    assert store.path.is_dir()
    assert set(remove_store(store.path).files) == files
    assert not store.path.exists()


def test_a_store_is_removed_from_within_its_folder(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.path)
    assert store.metadata.layout.main_file in remove_store(Path()).files
    assert not store.path.exists()


def test_a_folder_that_is_no_store_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    zarr.create_group(tmp_path / "theirs.zarr")
    for folder in (tmp_path / "photos", tmp_path / "theirs.zarr", tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="is no store\nhint: nothing is removed"):
            remove_store(folder)
    assert (tmp_path / "photos/cat.jpg").exists()
    assert (tmp_path / "theirs.zarr/zarr.json").exists()


def test_a_store_that_holds_something_else_is_not_removed(store: LatentStore) -> None:
    (store.path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"no part of a store: `thesis.tex`"):
        remove_store(store.path)
    np.testing.assert_equal(open_store(store.path).missing("depth"), [])


def test_what_lies_among_shards_and_a_readme_of_the_owners_keep_a_store_from_being_removed(store: LatentStore) -> None:
    for name in (store.shard_files("depth", 0)[0].parent / "weights.bin", store.path / "README.md"):
        name.write_text("mine")
        with pytest.raises(StoreError, match=rf"no part of a store: .*{name.name}"):
            remove_store(store.path)
        assert name.read_text() == "mine"
        name.unlink()
    remove_store(store.path)


def test_a_store_does_not_begin_where_files_of_others_lie(tmp_path: Path, made: SimpleNamespace, layout: str) -> None:
    series = made.store(tmp_path / "s", made.recipe(), made.latents(made.recipe(), 2), 2).shard_files("depth", 0)[0]
    theirs = tmp_path / "p" / series.relative_to(tmp_path / "s").parent / "photo.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(StoreError, match=r"holds other things, such as `photo\.jpg`"):
        made.store(tmp_path / "p", made.recipe(), made.latents(made.recipe(), 2), 2)
    assert theirs.read_text() == "mine"


def test_a_link_leads_no_removal_out_of_the_store(tmp_path: Path, store: LatentStore) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (tmp_path / "link").symlink_to(store.path)
    with pytest.raises(StoreError, match="is a link"):
        remove_store(tmp_path / "link")
    store.shard_path("depth", 0).parent.joinpath("out").symlink_to(tmp_path / "precious")
    with pytest.raises(StoreError, match="no part of a store"):
        remove_store(store.path)
    assert (tmp_path / "precious/file").exists()


def test_a_removal_that_was_killed_can_be_finished(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            remove_store(store.path)
    assert not (store.path / "commits").exists()
    remove_store(store.path)
    assert not store.path.exists()
