"""Images are appended to a store: from a new shard on, under whoever has it open, and what was there stays."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import BuildReport, build_cache
from dla_cache.errors import RecipeMismatchError, StoreError
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.pairs import PairStream
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

N_FIRST, N_ALL = 12, 19
"""Of shards of 5: two whole ones and one of 2, then one whole one and one of 2."""


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is played here, and there are many builds."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def every(tmp_path: Path, made: SimpleNamespace) -> Manifest:
    return made.manifest(tmp_path / "data", N_ALL)


@pytest.fixture
def listed(every: Manifest) -> Callable[[int], Manifest]:
    """A manifest of the first images."""
    rows = list(every.rows())
    return lambda n_images: write_manifest(every.root / f"{n_images}.parquet", rows[:n_images], every.class_names)


@pytest.fixture
def build(tmp_path: Path, spec: CacheSpec, open_source: Callable) -> Callable[..., BuildReport]:
    whole = spec.model_copy(update={"images": "original"})

    def run(manifest: Manifest, name: str = "s", **options: object) -> BuildReport:
        return build_cache(manifest, whole, tmp_path / name, **{"open_source": open_source, "batch_size": 2, **options})

    return run


@pytest.fixture
def appended(tmp_path: Path, every: Manifest, listed: Callable, build: Callable) -> LatentStore:
    build(listed(N_FIRST))
    report = build(every, append=True)
    assert (report.images_encoded, report.images_stored, report.n_images) == (7, 7, N_ALL)
    return open_store(tmp_path / "s")


def test_the_new_images_begin_with_a_shard_and_the_old_shards_stay_byte_for_byte(
    tmp_path: Path, every: Manifest, listed: Callable, build: Callable
) -> None:
    build(listed(N_FIRST))
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.suffix in (".tar", ".blob")}
    before |= {path: path.read_bytes() for path in (tmp_path / "s").rglob("c.*")}
    build(every, append=True)
    store = open_store(tmp_path / "s")
    assert [(shard.start, shard.stop) for shard in store.shards] == [(0, 5), (5, 10), (10, 12), (15, 20), (20, 22)]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert before
    assert verify_store(store, every).problems == ()


def test_its_content_is_that_of_a_store_built_at_once(
    tmp_path: Path, every: Manifest, appended: LatentStore, build: Callable
) -> None:
    assert build(every, "once").content_hash == appended.content_hash()
    once = open_store(tmp_path / "once")
    assert once.rows.kept_ids == appended.rows.kept_ids
    pairs = zip(appended.rows_of(), once.rows_of(), strict=True)
    for mine, theirs in (tuple(np.array([row]) for row in rows) for rows in pairs):
        np.testing.assert_array_equal(appended.read("depth", mine), once.read("depth", theirs))
        assert appended.read_images(mine) == once.read_images(theirs)
    one, other = (store.statistics("depth", ["train"]) for store in (appended, once))
    np.testing.assert_allclose(one.mean, other.mean)


def test_whoever_has_the_store_open_reads_and_writes_on(
    tmp_path: Path, every: Manifest, listed: Callable, build: Callable
) -> None:
    build(listed(N_FIRST))
    reader, writer = (open_store(tmp_path / "s") for _ in range(2))
    latents = reader.read("depth", np.arange(5))
    writer.withdraw("depth", {1: writer.committed("depth")[1]})
    build(every, append=True, rank=1, world_size=2)
    np.testing.assert_array_equal(reader.read("depth", np.arange(5)), latents)
    np.testing.assert_array_equal(reader.read("depth", np.array([11])), open_store(tmp_path / "s").read("depth", [11]))
    assert not writer.write_shard("depth", writer.shards[0], latents, seconds=0, device="cpu")


def test_a_stream_has_each_image_once_across_the_gap(appended: LatentStore) -> None:
    stream = PairStream(appended, None, None, 4, seed=0, decode=None)
    batches = list(stream.epoch_once())
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    assert sorted(ids) == sorted(appended.rows.kept_ids)
    for batch in batches:
        for image_id, latent in zip(batch.image_ids, batch.latents["depth"], strict=True):
            row = appended.rows.row_of(image_id)
            np.testing.assert_array_equal(latent.numpy(), appended.read("depth", np.array([row]))[0])


def test_rows_of_the_gap_are_no_images(appended: LatentStore) -> None:
    for row in (12, 14):
        with pytest.raises(StoreError, match=r"rows lie in"):
            appended.read("depth", np.array([row]))
        with pytest.raises(IndexError, match="no row"):
            _ = appended.rows[row]


def test_it_goes_on_with_a_manifest_in_any_order_and_appends_nothing_twice(
    tmp_path: Path, every: Manifest, appended: LatentStore, build: Callable
) -> None:
    rows = list(every.rows())
    random.Random(0).shuffle(rows)
    mixed = write_manifest(every.root / "mixed.parquet", rows, every.class_names)
    for options in ({}, {"append": True}):
        report = build(mixed, **options)
        assert (report.images_encoded, report.content_hash) == (0, appended.content_hash())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1:], "1 images of `.*` are not in the manifest: `image-0`"),
        (lambda rows: [replace(rows[0], sha256="0" * 64), *rows[1:]], "are otherwise in the manifest: `image-0`"),
        (lambda rows: [replace(rows[3], label=1 - (rows[3].label or 0)), *rows[:3], *rows[4:]], "`image-3`"),
    ],
)
def test_a_manifest_that_does_not_list_what_is_there_is_refused_and_nothing_changes(
    tmp_path: Path, every: Manifest, listed: Callable, build: Callable, change: Callable, said: str
) -> None:
    build(listed(N_FIRST))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "s").rglob("*"))
    other = write_manifest(every.root / "other.parquet", change(list(every.rows())), every.class_names)
    with pytest.raises(RecipeMismatchError, match=said):
        build(other, append=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "s").rglob("*")) == before


def test_images_are_removed_from_it_and_it_is_converted_like_any_other(
    tmp_path: Path, every: Manifest, appended: LatentStore, build: Callable
) -> None:
    (report,) = take_down([appended.path], ["image-3", "image-18"])
    other = "zarr" if appended.layout_name == "webdataset" else "webdataset"
    assert convert_store(open_store(appended.path), tmp_path / "other", other).content_hash == report.content_hash
    assert verify_store(open_store(tmp_path / "other"), every).problems == ()
    assert build(every, append=True).images_encoded == 0


def test_a_build_that_dies_while_it_appends_is_gone_on_with(
    tmp_path: Path, every: Manifest, listed: Callable, build: Callable, dies_before: Callable
) -> None:
    whole = build(every, "whole").content_hash
    for deaths in range(1, 30, 3):
        name = f"killed-at-{deaths}"
        build(listed(N_FIRST), name)
        if not dies_before(deaths, lambda name=name: build(every, name, append=True)):
            break
        assert open_store(tmp_path / name).read("depth", np.arange(12)).shape[0] == 12
        assert build(every, name, append=True).content_hash == whole
    assert deaths > 15
