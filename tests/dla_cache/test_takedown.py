"""Images taken out of a store: no byte is left, everybody else's latents are, and death at any step changes nothing."""

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import zarr

from dla_cache.build import build_cache
from dla_cache.errors import CorruptShardError, MissingLatentError, StoreError
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

N_IMAGES = 12
DOOMED = ("image-1", "image-7", "image-10", "image-11")
"""One of the first shard, one of the second, and the whole short tail."""


@pytest.fixture
def images(tmp_path: Path, made: SimpleNamespace) -> Manifest:
    return made.manifest(tmp_path / "data", N_IMAGES)


@pytest.fixture
def built(tmp_path: Path, images: Manifest, spec: CacheSpec, open_source: Callable) -> Path:
    """A store of three shards, the images' bytes in it."""
    whole = spec.model_copy(update={"images": "original"})
    build_cache(images, whole, tmp_path / "s", open_source=open_source)
    return tmp_path / "s"


def without(manifest: Manifest, image_ids: tuple[str, ...]) -> Manifest:
    kept = pa.array([image_id not in image_ids for image_id in manifest.image_ids])
    return Manifest(manifest.table.filter(kept), manifest.class_names, manifest.root)


def payloads_of(path: Path, image_ids: tuple[str, ...]) -> list[bytes]:
    store = open_store(path)
    rows = np.array([store.rows.row_of(image_id) for image_id in image_ids])
    return [latent.tobytes() for latent in store.read("depth", rows)] + store.read_images(rows)


def places_of(folder: Path, payloads: list[bytes]) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files for payload in payloads if payload in path.read_bytes()]


def test_no_byte_of_a_removed_image_is_left_in_any_file(built: Path) -> None:
    payloads = payloads_of(built, DOOMED)
    assert len(set(places_of(built, payloads))) == 6, "the search must find them before"
    (report,) = take_down([built], DOOMED)
    assert report.removed == tuple(sorted(DOOMED))
    assert report.shards_rewritten == 6
    assert places_of(built, payloads) == []
    assert verify_store(open_store(built)).problems == ()
    assert list(built.rglob(".*")) == []


def test_hash_and_statistics_are_those_of_a_store_built_without_them(
    tmp_path: Path, built: Path, images: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    (report,) = take_down([built], DOOMED)
    fresh = build_cache(without(images, DOOMED), spec, tmp_path / "t", open_source=open_source)
    assert report.content_hash == fresh.content_hash
    store, other = open_store(built), open_store(tmp_path / "t")
    for split in ("train", "validation", "test"):
        one, two = store.statistics("depth", [split]), other.statistics("depth", [split])
        assert one.count == two.count
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-12)  # the parts merge in another grouping
        np.testing.assert_allclose(one.std, two.std, rtol=1e-12)
    rows = store.rows_of()
    np.testing.assert_array_equal(store.read("depth", rows), other.read("depth", other.rows_of()))
    assert store.read_images(rows) == other.read_images(other.rows_of()) if other.has_images else True


def test_who_stays_keeps_latents_and_bytes(built: Path) -> None:
    before = open_store(built)
    staying = tuple(image_id for image_id in before.rows.image_ids if image_id not in DOOMED)
    payloads = payloads_of(built, staying)
    take_down([built], DOOMED)
    assert payloads_of(built, staying) == payloads


def test_a_removed_image_is_in_no_split_and_refused_by_row_and_id(built: Path) -> None:
    row = open_store(built).rows.row_of("image-7")
    take_down([built], ["image-7"])
    store = open_store(built)
    assert row not in store.rows_of()
    with pytest.raises(MissingLatentError, match=r"1 images were removed from .*: `image-7`"):
        store.read("depth", np.array([0, row]))
    with pytest.raises(MissingLatentError, match="were removed"):
        store.read_images(np.array([row]))
    with pytest.raises(MissingLatentError, match="`image-7` was removed"):
        store.rows.row_of("image-7")


def test_the_tombstone_keeps_the_id_and_nothing_that_tells_of_the_image(built: Path) -> None:
    take_down([built], ["image-7"])
    image = open_store(built).rows[7]
    assert (image.image_id, image.removed, image.sha256, image.uri, image.label) == ("image-7", True, "", "", None)


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_stock_zarr_reads_zeros_under_a_valid_checksum(built: Path) -> None:
    take_down([built], ["image-7"])
    latents = zarr.open_array(built / "latents/depth", mode="r")[:]
    assert [row for row, latent in enumerate(latents) if not latent.any()] == [7]


@pytest.mark.parametrize("layout", ["webdataset"], indirect=True)
def test_stock_tar_readers_find_no_member_of_a_removed_image(built: Path) -> None:
    import tarfile

    take_down([built], ["image-7"])
    names = []
    for path in [*built.glob("depth/*.tar"), *built.glob("images/*.tar")]:
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert len(names) == 2 * (N_IMAGES - 1)
    assert not any("image-7." in name for name in names)


def test_a_store_without_removed_images_converts_with_its_hash(tmp_path: Path, built: Path) -> None:
    (report,) = take_down([built], DOOMED)
    for layout in ("zarr", "webdataset"):
        converted = convert_store(open_store(built), tmp_path / layout, layout)
        assert converted.content_hash == report.content_hash
        assert verify_store(open_store(tmp_path / layout)).problems == ()


def test_removing_again_changes_nothing(built: Path) -> None:
    (first,) = take_down([built], ["image-7"])
    (again,) = take_down([built], ["image-7"])
    assert (again.removed, again.already, again.shards_rewritten) == ((), ("image-7",), 0)
    assert again.content_hash == first.content_hash


def test_removing_one_after_the_other_ends_as_both_at_once(tmp_path: Path, built: Path) -> None:
    shutil.copytree(built, tmp_path / "both")
    for image_id in DOOMED:
        take_down([built], [image_id])
    (both,) = take_down([tmp_path / "both"], DOOMED)
    assert open_store(built).content_hash() == both.content_hash


def test_an_id_that_no_store_knows_stops_it_before_anything_is_done(tmp_path: Path, built: Path) -> None:
    before = tree(built)
    with pytest.raises(MissingLatentError, match="1 images are in none of the 1 stores: `image-99`\nhint: nothing is"):
        take_down([built], ["image-1", "image-99"])
    assert tree(built) == before


def test_an_id_need_not_be_in_each_of_several_stores(
    tmp_path: Path, built: Path, images: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    some = without(images, ("image-7",))
    build_cache(some, spec, tmp_path / "t", open_source=open_source)
    reports = take_down([built, tmp_path / "t"], ["image-7", "image-1"])
    assert [report.removed for report in reports] == [("image-1", "image-7"), ("image-1",)]


def test_a_dry_run_counts_and_leaves_every_byte(built: Path) -> None:
    before = tree(built)
    (report,) = take_down([built], ["image-7", "image-1"], dry_run=True)
    assert (report.removed, report.shards_rewritten) == (("image-1", "image-7"), 4)
    assert tree(built) == before


def test_leftovers_of_killed_builds_go_too(built: Path) -> None:
    (payload, image) = payloads_of(built, ("image-7",))
    depth = open_store(built).shard_path("depth", 1)
    depth.with_name(f".{depth.name}.tmp").write_bytes(b"half a shard" + payload)
    depth.with_name(f".{open_store(built).shard_path('depth', 0).name}.tmp").write_bytes(image)
    take_down([built], ["image-7"])
    assert places_of(built, [payload, image]) == []


def test_a_damaged_shard_is_named_and_its_images_stay_hidden(tmp_path: Path, built: Path) -> None:
    path = open_store(built).shard_path("depth", 1)
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[len(spoiled) // 3] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(CorruptShardError, match=r"1 shards are damaged.* depth, shard 1 of .*\nhint: restore"):
        take_down([built], ["image-7"])
    with pytest.raises(MissingLatentError, match="were removed"):
        open_store(built).read("depth", np.array([7]))
    assert [problem.where for problem in verify_store(open_store(built)).problems][:1] == ["takedown.json"]
    path.write_bytes(whole)
    take_down([built], [])
    assert verify_store(open_store(built)).problems == ()


def test_death_before_any_step_to_disk_is_finished_by_the_next_run(
    tmp_path: Path,
    images: Manifest,
    spec: CacheSpec,
    open_source: Callable,
    monkeypatch: pytest.MonkeyPatch,
    dies_before: Callable,
    layout: str,
) -> None:
    few = spec.model_copy(update={"images": "original", "splits": ("train",), "shard_size": 2})
    build_cache(images, few, tmp_path / "s", open_source=open_source)  # images 0, 3, 6, 9
    doomed = ("image-3",)
    payloads = payloads_of(tmp_path / "s", doomed)
    shutil.copytree(tmp_path / "s", tmp_path / "unbroken")
    (unbroken,) = take_down([tmp_path / "unbroken"], doomed)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # a hundred removals; no power cut is played here
    deaths = int(layout == "zarr")  # every second step on one layout, the others on the other
    while True:
        path = tmp_path / f"killed-at-{deaths}"
        shutil.copytree(tmp_path / "s", path)
        if not dies_before(deaths, functools.partial(take_down, [path], doomed)):
            break
        deaths += 2
        check_is_hidden(path)
        (report,) = take_down([path], doomed)
        assert report.content_hash == unbroken.content_hash
        assert places_of(path, payloads) == []
        assert list(path.rglob(".*")) == []
        shutil.rmtree(path)
    assert deaths > 30, "the steps of a removal were not watched"


def check_is_hidden(path: Path) -> None:
    """A store half way refuses to be opened, or gives nobody the image whose tombstone it has."""
    try:
        store: LatentStore = open_store(path)
    except StoreError as error:
        if "images are being removed" not in error.message:
            raise
        return
    if not store.rows[1].removed:
        return
    with pytest.raises(MissingLatentError):
        store.read("depth", np.arange(4))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def twins(images: Manifest) -> Manifest:
    """The images, of which 2, 5 and 8 are one file, and 3 and 4 another."""
    rows = list(images.rows())
    same = {5: 2, 8: 2, 4: 3}
    listed = [
        replace(row, uri=rows[same.get(n, n)].uri, sha256=rows[same.get(n, n)].sha256) for n, row in enumerate(rows)
    ]
    return write_manifest(images.root / "twins.parquet", listed, images.class_names)


def test_images_that_hold_the_same_bytes_are_named_and_stay(
    tmp_path: Path, twins: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    build_cache(twins, spec, tmp_path / "s", open_source=open_source)
    build_cache(without(twins, ("image-2",)), spec, tmp_path / "t", open_source=open_source)
    for dry_run in (True, False):
        reports = take_down([tmp_path / "s", tmp_path / "t"], ["image-2", "image-8"], dry_run=dry_run)
        assert [report.same_bytes for report in reports] == [("image-5",), ("image-5",)]
    assert "image-5" in open_store(tmp_path / "s").rows.kept_ids
    (report,) = take_down([tmp_path / "t"], ["image-5", "image-3"])
    assert report.same_bytes == ("image-4",)


def test_they_are_named_by_the_run_that_finishes_a_killed_one(
    tmp_path: Path, twins: Manifest, spec: CacheSpec, open_source: Callable, dies_before: Callable
) -> None:
    build_cache(twins, spec, tmp_path / "s", open_source=open_source)
    assert dies_before(20, lambda: take_down([tmp_path / "s"], ["image-2"]))
    assert dies_before(20, lambda: take_down([tmp_path / "s"], ["image-3"]))
    (report,) = take_down([tmp_path / "s"], [])
    assert report.same_bytes == ("image-4", "image-5", "image-8")
