"""What is not merged: each refusal says which stores, modalities or images are to blame, and writes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dla_cache.errors import (
    IncompleteBuildError,
    MissingLatentError,
    RecipeMismatchError,
    SpecError,
    StoreError,
)
from dla_cache.merge import merge_stores
from dla_cache.merge_plan import plan_merge
from dla_cache.spec import Modality
from dla_cache.store import LatentStore
from dla_cache.store.parts import ADOPTED, UNFINISHED
from dla_cache.store.rows import RowTable

LAYOUTS = ["zarr"]

Make = Callable[..., LatentStore]


@pytest.fixture
def make(tmp_path: Path, made: SimpleNamespace) -> Make:
    """Stores by name, of some of five images; a latent holds a number."""

    def make_store(
        name: str, numbers: list[int], modality: str = "depth", *, seed: int = 0, value: float = 1, **changes: object
    ) -> LatentStore:
        images = [replace(made.rows(5)[number], row=row, **changes) for row, number in enumerate(numbers)]
        recipes = {modality: made.recipe(modality=Modality(modality), seed=seed)}
        store = made.create(tmp_path / name, RowTable(images), ["a", "b"], 2, recipes)
        for shard in store.shards:
            latents = np.full((len(shard), 3, 2, 2), value, np.float16)
            store.write_shard(modality, shard, latents, seconds=0, device="cpu")
        return store

    return make_store


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seed": 1}, "`depth` of another recipe"),
        ({"sha256": "1" * 64}, "2 images have another `sha256` in .*b`: `image-1`, `image-2`"),
        ({"label": 1}, "2 images have another `label`"),
        ({"split": "validation"}, "2 images have another `split`"),
    ],
)
def test_stores_that_contradict_each_other(tmp_path: Path, make: Make, changes: dict, fault: str) -> None:
    with pytest.raises(RecipeMismatchError, match=fault):
        plan_merge([make("a", [0, 1, 2]), make("b", [1, 2, 3], **changes)], tmp_path / "t")


def test_two_latents_of_one_image_by_one_recipe(tmp_path: Path, make: Make) -> None:
    stores = [make("a", [0, 1]), make("b", [1, 2], value=2)]
    with pytest.raises(RecipeMismatchError, match=r"b` holds another `depth` of 1 images .*: `image-1`"):
        merge_stores(plan_merge(stores, tmp_path / "t"), tmp_path / "t")


def test_other_class_maps(tmp_path: Path, make: Make, made: SimpleNamespace) -> None:
    other = made.create(tmp_path / "b", made.rows(2), ["b", "a"], 2, {})
    with pytest.raises(RecipeMismatchError, match="different class maps"):
        plan_merge([make("a", [0, 1]), other], tmp_path / "t")


def test_an_image_that_lacks_a_modality_unless_it_may_be_left_out(tmp_path: Path, make: Make) -> None:
    stores = [make("a", [0, 1, 2, 3]), make("b", [3, 1, 4], "audio")]
    with pytest.raises(MissingLatentError, match=r"2 lack `audio`: `image-0`, `image-2`[\s\S]*--missing skip"):
        plan_merge(stores, tmp_path / "t")
    plan = plan_merge(stores, tmp_path / "t", missing="skip")
    assert plan.metadata.rows.image_ids == ("image-1", "image-3")
    assert (plan.n_known, plan.coverage) == (5, {"audio": 3, "depth": 4})
    assert plan.left_out == ("2 images without `audio`: `image-0`, `image-2`", "1 image without `depth`: `image-4`")
    with pytest.raises(StoreError, match="no image has every modality"):
        plan_merge([make("c", [0]), make("d", [1], "audio")], tmp_path / "t", missing="skip")


def test_a_store_that_is_not_whole(tmp_path: Path, make: Make) -> None:
    store = make("a", [0, 1, 2])
    store.withdraw("depth", {1: store.committed("depth")[1]})
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 2 shards of `depth`"):
        plan_merge([store], tmp_path / "t")


def test_a_store_from_which_images_are_being_removed(tmp_path: Path, make: Make) -> None:
    store = make("a", [0, 1, 2])
    (store.path / UNFINISHED).write_text("{}")
    with pytest.raises(StoreError, match="images are being removed"):
        plan_merge([store], tmp_path / "t")


def test_a_target_that_is_a_source_lies_in_one_or_holds_something_else(
    tmp_path: Path, make: Make, made: SimpleNamespace
) -> None:
    store = make("a", [0, 1, 2])
    with pytest.raises(StoreError, match="is a store to read"):
        plan_merge([store], tmp_path / "b" / ".." / "a")
    with pytest.raises(StoreError, match="lies in"):
        plan_merge([store], tmp_path / "a" / "deep" / "t")
    with pytest.raises(StoreError, match="is named twice"):
        plan_merge([store, LatentStore(tmp_path / "." / "a")], tmp_path / "t")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds other things, such as `thesis.tex`"):
        plan_merge([store], tmp_path / "t")
    made.create(tmp_path / "u", made.rows(4), ["a", "b"], 2, {})
    with pytest.raises(RecipeMismatchError, match="row table: `4` images → `3`"):
        plan_merge([store], tmp_path / "u")
    with pytest.raises(RecipeMismatchError, match="`shard_size` `2` → `9`"):
        plan_merge([store], make("v", [0, 1, 2]).path, shard_size=9)


@pytest.mark.parametrize("shard_size", [0, 10**9])
def test_a_shard_size_that_no_store_has(tmp_path: Path, make: Make, shard_size: int) -> None:
    with pytest.raises(SpecError, match="there are no shards of"):
        plan_merge([make("a", [0])], tmp_path / "t", shard_size=shard_size)


def test_images_that_no_store_holds_are_refused_only_if_asked_for(tmp_path: Path, make: Make) -> None:
    store = make("a", [0, 1])
    assert plan_merge([store], tmp_path / "t").left_out == ()
    with pytest.raises(MissingLatentError, match="the images cannot be merged: no store holds them"):
        plan_merge([store], tmp_path / "t", with_images=True)


def test_a_plan_writes_nothing(tmp_path: Path, make: Make) -> None:
    plan = plan_merge([make("a", [0, 1]), make("b", [2])], tmp_path / "t", shard_size=2)
    assert (plan.facts["shards"], plan.shards_missing, plan.size_bytes) == (2, 2, 3 * 3 * 2 * 2 * 2)
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "a" / ADOPTED).exists()
