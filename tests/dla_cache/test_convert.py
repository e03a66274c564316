"""Converting: the other layout holds the same, whenever it was stopped, and nothing damaged passes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import (
    CorruptShardError,
    IncompleteBuildError,
    RecipeMismatchError,
    StoreError,
    WorkInterrupted,
)
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.parts import CARD
from dla_cache.verify import verify_store

OTHER = {"zarr": "webdataset", "webdataset": "zarr"}


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> LatentStore:
    with_images = spec.model_copy(update={"images": "original"})
    build_cache(manifest, with_images, tmp_path / "s", open_source=open_source)
    return open_store(tmp_path / "s")


def test_there_and_back_every_byte_and_record_is_the_same(
    tmp_path: Path, manifest: Manifest, store: LatentStore, layout: str
) -> None:
    report = convert_store(store, tmp_path / "other", OTHER[layout])
    assert (report.content_hash, report.shards_written) == (store.content_hash(), 10)
    other = open_store(tmp_path / "other")
    assert (other.layout_name, other.series) == (OTHER[layout], store.series)
    np.testing.assert_array_equal(other.read("depth", np.arange(23)), store.read("depth", np.arange(23)))
    assert other.read_images(np.arange(23)) == store.read_images(np.arange(23))
    assert verify_store(other, manifest).problems == ()
    for series in store.series:
        for shard, before in store.committed(series).items():
            files = {"size_bytes", "file_sha256"}
            after = other.committed(series)[shard]
            assert after.model_dump(exclude=files) == before.model_dump(exclude=files)
    convert_store(other, tmp_path / "back", layout)
    for path in store.path.rglob("*"):
        if path.is_file() and path.name != CARD:
            assert (tmp_path / "back" / path.relative_to(store.path)).read_bytes() == path.read_bytes()


def test_a_conversion_that_was_stopped_goes_on_where_it_stopped(
    tmp_path: Path, store: LatentStore, layout: str
) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(WorkInterrupted, match="3 of 10 shards"):
        convert_store(
            store,
            tmp_path / "other",
            OTHER[layout],
            on_progress=lambda *at: seen.append(at),
            should_stop=lambda: len(seen) == 3,
        )
    assert convert_store(store, tmp_path / "other", OTHER[layout]).shards_written == 7
    assert convert_store(store, tmp_path / "other", OTHER[layout]).shards_written == 0
    assert verify_store(open_store(tmp_path / "other")).problems == ()


def test_an_incomplete_store_is_refused(tmp_path: Path, store: LatentStore, layout: str) -> None:
    store.withdraw("images", {2: store.committed("images")[2]})
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 5 shards of `images`: `2`"):
        convert_store(store, tmp_path / "other", OTHER[layout])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("series", ["depth", "images"])
def test_damage_is_refused_before_it_is_copied(tmp_path: Path, store: LatentStore, layout: str, series: str) -> None:
    path = store.shard_path(series, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=f"{series}, shard 2 of .* is damaged"):
        convert_store(open_store(store.path), tmp_path / "other", OTHER[layout])
    assert 2 not in open_store(tmp_path / "other").committed(series)


def test_a_target_that_holds_something_else_is_refused(
    tmp_path: Path, store: LatentStore, layout: str, made: SimpleNamespace
) -> None:
    with pytest.raises(StoreError, match=r"is the store to read\nhint: "):
        convert_store(store, tmp_path / "." / "s", OTHER[layout])
    made.create(tmp_path / "other", made.rows(7), [], 5, {}, layout=OTHER[layout])
    with pytest.raises(RecipeMismatchError, match="row table"):
        convert_store(store, tmp_path / "other", OTHER[layout])


def test_a_target_with_shards_of_another_build_is_refused(tmp_path: Path, store: LatentStore, layout: str) -> None:
    other = tmp_path / "other"
    with pytest.raises(WorkInterrupted):
        convert_store(store, other, OTHER[layout], should_stop=lambda: True)
    begun = open_store(other)
    begun.withdraw("depth", {0: begun.committed("depth")[0]})
    latents = store.read("depth", np.arange(5)) + np.float16(1)
    begun.write_shard("depth", store.shards[0], latents, seconds=0, device="cuda")
    with pytest.raises(CorruptShardError, match=r"shard 0 of `depth` in .*other[\s\S]*another build"):
        convert_store(store, other, OTHER[layout])
