"""Damaged shards, in one of several stores: all else is done, each of them is named, and nothing untrue is said."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dla_cache.build import build_cache
from dla_cache.errors import CorruptShardError, MissingLatentError
from dla_cache.spec import CacheSpec
from dla_cache.store import open_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

DOOMED = ("image-1", "image-7", "image-11")
"""One of each shard."""


@pytest.fixture
def stores(tmp_path: Path, made: SimpleNamespace, spec: CacheSpec, open_source: Callable) -> list[Path]:
    """Two stores `a` and `b` of three shards, of 5, 5 and 2 images, with the images' bytes."""
    whole = spec.model_copy(update={"images": "original"})
    build_cache(made.manifest(tmp_path / "data", 12), whole, tmp_path / "a", open_source=open_source)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return [tmp_path / "a", tmp_path / "b"]


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def test_every_other_shard_of_every_store_is_rewritten_and_all_damaged_ones_are_named(stores: list[Path]) -> None:
    one, other = map(open_store, stores)
    images = dict(zip(DOOMED, one.read_images([one.rows.row_of(image_id) for image_id in DOOMED]), strict=True))
    spoil(one.shard_path("depth", 1))
    spoil(one.shard_path("images", 0))
    spoil(other.shard_path("depth", 2))
    whole = {path: path.read_bytes() for path in stores[0].rglob("*") if path.is_file()}
    with pytest.raises(CorruptShardError) as caught:
        take_down(stores, DOOMED)
    for named in (f"depth, shard 1 of `{one.path}`", f"images, shard 0 of `{one.path}`"):
        assert named in caught.value.message
    assert f"3 shards are damaged, so they cannot be written anew: depth, shard 1 of `{one.path}`" in str(caught.value)
    assert f"depth, shard 2 of `{other.path}`" in caught.value.message
    for path in stores:
        store = open_store(path)
        assert store.rows.removed_ids == frozenset(DOOMED)
        assert (path / "takedown.json").is_file()
    left = {
        image_id
        for image_id, content in images.items()
        for path in stores
        for file in path.rglob("*")
        if file.is_file() and content in file.read_bytes()
    }
    assert left <= {"image-1"}, "of `images`, shard 0 is damaged"
    assert whole[one.shard_path("depth", 1)] == one.shard_path("depth", 1).read_bytes()


def test_a_store_that_is_through_is_closed_whatever_became_of_the_other(stores: list[Path]) -> None:
    spoil(open_store(stores[0]).shard_path("depth", 1))
    with pytest.raises(CorruptShardError, match="1 shards are damaged"):
        take_down(stores, DOOMED)
    assert [(path / "takedown.json").is_file() for path in stores] == [True, False]
    assert verify_store(open_store(stores[1])).problems == ()


def test_the_same_call_goes_on_when_they_are_restored(stores: list[Path]) -> None:
    path = open_store(stores[0]).shard_path("depth", 1)
    whole = path.read_bytes()
    spoil(path)
    with pytest.raises(CorruptShardError):
        take_down(stores, DOOMED)
    path.write_bytes(whole)
    reports = take_down(stores, DOOMED)
    assert [report.already for report in reports] == [tuple(sorted(DOOMED))] * 2
    assert reports[0].content_hash == reports[1].content_hash
    assert verify_store(open_store(stores[0])).problems == ()


def test_tombstones_are_in_all_stores_before_any_shard_is_told_to_be_rewritten(stores: list[Path]) -> None:
    seen = []

    def look(_done: int, _total: int, store: str) -> None:
        seen.append((store, [open_store(path).rows.removed_ids for path in stores]))

    take_down(stores, DOOMED, on_progress=look)
    assert seen[0] == (str(stores[0]), [frozenset(DOOMED)] * 2)


def test_a_path_from_the_manifest_is_no_id_and_the_id_is_told(stores: list[Path]) -> None:
    with pytest.raises(
        MissingLatentError, match=r"`images/image-7.png` is an image's path; its ID is `image-7`\nhint: give the ID"
    ):
        take_down(stores, ["image-1", "images/image-7.png"])
    assert open_store(stores[0]).rows.removed_ids == frozenset()
