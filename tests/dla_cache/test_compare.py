"""Two stores differ in what they hold, not in how it lies on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dla_cache.compare import compare_stores
from dla_cache.errors import IncompleteBuildError
from dla_cache.spec import Modality
from dla_cache.store import open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.rows import RowTable
from dla_cache.takedown import take_down

LAYOUTS = ["zarr"]


@pytest.fixture
def make(tmp_path: Path, made: SimpleNamespace) -> Callable:
    """A store of nine images with latents from a seed, some of which `change` may have changed."""

    def make_store(name: str, shard_size: int = 4, *, rows=None, change=lambda latents: latents, seed=0):
        recipe = made.recipe(seed=seed)
        table = made.rows(9) if rows is None else rows
        store = made.create(tmp_path / name, table, ["a", "b"], shard_size, {"depth": recipe})
        latents = change(made.latents(recipe, len(table)))
        for shard in store.shards:
            store.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=0, device="cpu")
        return store

    return make_store


def test_layout_and_shards_are_no_difference(make: Callable, tmp_path: Path) -> None:
    before = make("a")
    convert_store(before, tmp_path / "tars", "webdataset")
    told = []
    for after in (make("b", 5), open_store(tmp_path / "tars")):
        found = compare_stores(before, after, on_progress=lambda done, total: told.append((done, total)))
        assert found.is_empty
        assert found.n_compared == 9
    assert told[-1] == (9, 9)


def test_images_are_joined_by_id_and_each_difference_is_named(make: Callable, made: SimpleNamespace) -> None:
    images = list(made.rows(9))
    order = [8, 0, 3, 4, 5, 6, 7]
    changed = {3: {"label": 1}, 4: {"split": "validation"}, 5: {"sha256": "1" * 64}}
    rows = RowTable([replace(images[number], row=row, **changed.get(number, {})) for row, number in enumerate(order)])

    def in_order(latents):
        twin = made.latents(made.recipe(), 9)[order]
        twin[order.index(6)] += 1
        return twin

    found = compare_stores(make("a"), make("b", rows=rows, change=in_order))
    assert found.only_before == {"images": ("image-1", "image-2")}
    assert found.only_after == {}
    assert found.rows == {"label": ("image-3",), "split": ("image-4",), "sha256": ("image-5",)}
    assert found.latents == {"depth": ("image-6",)}
    assert not found.is_empty


def test_recipes_and_class_maps_differ_field_by_field(make: Callable, made: SimpleNamespace, tmp_path: Path) -> None:
    found = compare_stores(make("a"), make("b", seed=1))
    assert found.settings == ("`depth.seed` `0` → `1`",)
    other = made.create(tmp_path / "c", made.rows(9), ["a", "c"], 4, {"audio": made.recipe(modality=Modality("audio"))})
    found = compare_stores(make("d"), other)
    assert found.settings == ("`class_names` `['a', 'b']` → `['a', 'c']`",)
    assert list(found.only_before) == ["depth"]
    assert list(found.only_after) == ["audio"]


def test_a_removed_image_is_one_that_is_not_there(make: Callable) -> None:
    before, after = make("a"), make("b")
    take_down([after.path], ["image-2"])
    found = compare_stores(before, open_store(after.path))
    assert found.only_before == {"images": ("image-2",)}
    assert found.latents == {"depth": ()}


def test_a_store_that_is_not_whole_cannot_be_compared(make: Callable) -> None:
    before, after = make("a"), make("b")
    after.withdraw("depth", {1: after.committed("depth")[1]})
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 3"):
        compare_stores(before, after)
