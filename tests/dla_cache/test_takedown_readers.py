"""Who has a store open while images are removed from it is told so, and is never given zeros or another's latent."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import MissingLatentError, StoreError
from dla_cache.spec import CacheSpec
from dla_cache.store import LatentStore, open_store
from dla_cache.takedown import take_down

GONE = r"images were removed from `.*` since it was opened\nhint: open it again"


@pytest.fixture
def built(tmp_path: Path, made: SimpleNamespace, spec: CacheSpec, open_source: Callable) -> Path:
    """A store of three shards, of 5, 5 and 2 images, with the images' bytes."""
    whole = spec.model_copy(update={"images": "original"})
    build_cache(made.manifest(tmp_path / "data", 12), whole, tmp_path / "s", open_source=open_source)
    return tmp_path / "s"


@pytest.mark.parametrize("row", [7, 8], ids=["removed", "neighbour"])
@pytest.mark.parametrize("has_read", [False, True], ids=["cold", "another shard read before"])
def test_a_reader_of_before_a_removal_is_told_at_the_next_shard_it_opens(built: Path, row: int, has_read: bool) -> None:
    store = open_store(built)
    if has_read:
        store.read("depth", np.arange(5))
        store.read_images(np.arange(5))
    take_down([built], ["image-7"])
    with pytest.raises(StoreError, match=GONE):
        store.read("depth", np.array([row]))
    with pytest.raises(StoreError, match=GONE):
        store.read_images(np.array([row]))


def test_nor_is_it_given_a_hash_or_statistics_of_both_times(built: Path) -> None:
    store = open_store(built)
    take_down([built], ["image-7"])
    with pytest.raises(StoreError, match=GONE):
        store.content_hash()
    with pytest.raises(StoreError, match=GONE):
        store.statistics("depth", ["train"])


def test_a_reader_that_knows_of_the_removal_reads_on_while_shards_are_rewritten(built: Path) -> None:
    seen: list[tuple[LatentStore, np.ndarray]] = []

    def read(done: int, _total: int, _store: str) -> None:
        if done == 1:
            store = open_store(built)
            seen.append((store, store.read("depth", np.arange(3))))

    take_down([built], ["image-4", "image-7", "image-11"], on_progress=read)
    ((store, before),) = seen
    np.testing.assert_array_equal(store.read("depth", np.arange(3)), before)
    fresh = open_store(built)
    rows = fresh.rows_of()
    np.testing.assert_array_equal(store.read("depth", rows), fresh.read("depth", rows))
    assert store.read_images(rows) == fresh.read_images(rows)


def test_where_a_removal_has_taken_a_shard_back_the_takedown_is_named(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LatentStore, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            take_down([built], ["image-7"])
    store = open_store(built)
    finishes = r"images are being removed: `dla cache takedown` again finishes it"
    with pytest.raises(MissingLatentError, match=rf"shard 1 .* is not committed(?s:.*)hint: {finishes}"):
        store.read("depth", np.array([8]))
    with pytest.raises(StoreError, match=rf"lacks 1 of 3 shards(?s:.*)hint: {finishes}"):
        store.require_complete()
    with pytest.raises(MissingLatentError, match=finishes):
        store.rows.row_of("image-7")


def test_looking_for_a_removal_does_not_read_the_main_file_at_each_shard(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(built)
    read = []
    layout = type(store.metadata.layout)
    original = layout.read_attributes
    monkeypatch.setattr(layout, "read_attributes", lambda self, path: read.append(path) or original(self, path))
    store.read("depth", np.arange(12))
    assert read == [built]
