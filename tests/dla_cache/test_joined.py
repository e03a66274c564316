"""Stores joined by image ID: each latent stands beside its image, and what is missing is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_cache.errors import IncompleteBuildError, MissingLatentError, RecipeMismatchError, StoreError
from dla_cache.joined import Coverage, JoinedStore
from dla_cache.pairs import PairStream
from dla_cache.spec import ORIGINAL_IMAGES, Modality
from dla_cache.store import LatentStore
from dla_cache.store.rows import RowTable
from dla_cache.takedown import take_down

LAYOUTS = ["zarr"]
N = 9

Make = Callable[..., LatentStore]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Make:
    """Stores of some of nine images, in a given order; a latent holds the number of its image."""

    def make_store(numbers: list[int], modality: str = "depth", *, seed: int = 0, **changes: object) -> LatentStore:
        recipe = made.recipe(modality=Modality(modality), seed=seed)
        everything = made.rows(N)
        images = [replace(everything[number], row=row, **changes) for row, number in enumerate(numbers)]
        path = tmp_path_factory.mktemp("joined") / "s"
        store = made.create(path, RowTable(images), ["a", "b"], 2, {modality: recipe})
        for shard in store.shards:
            latents = np.array(numbers[shard.start : shard.stop], np.float32)
            store.write_shard(
                modality,
                shard,
                np.broadcast_to(latents[:, None, None, None], (len(latents), 3, 2, 2)),
                seconds=0,
                device="cpu",
            )
        return store

    return make_store


SOME = st.lists(st.integers(0, N - 1), min_size=1, unique=True)


@given(SOME, SOME)
@settings(max_examples=20)
def test_every_latent_stands_beside_its_own_image(make: Make, first: list[int], second: list[int]) -> None:
    joined = JoinedStore([make(first), make(second, "audio")], missing="null")
    assert set(joined.rows.image_ids) == {f"image-{number}" for number in [*first, *second]}
    assert joined.coverage == Coverage(
        len({*first, *second}), len({*first} & {*second}), 0, {"audio": len(second), "depth": len(first)}
    )
    rows = np.random.default_rng(0).permutation(len(joined.rows))
    for name, numbers in (("depth", first), ("audio", second)):
        present, latents = joined.present(name, rows), joined.read(name, rows)
        for row, there, latent in zip(rows, present, latents, strict=True):
            number = int(joined.rows.image_ids[row].removeprefix("image-"))
            assert there == (number in numbers)
            assert (latent == (number if there else 0)).all()


def test_skip_leaves_out_whoever_lacks_something_and_error_names_them(make: Make) -> None:
    stores = [make([0, 1, 2, 3]), make([3, 1, 5], "audio")]
    assert JoinedStore(stores, missing="skip").rows.image_ids == ("image-1", "image-3")
    with pytest.raises(MissingLatentError, match=r"of 5 images 2 lack `audio`: `image-0`, `image-2`; 1 lack `depth`"):
        JoinedStore(stores)
    with pytest.raises(StoreError, match="no image is in all"):
        JoinedStore([make([0]), make([1], "audio")], missing="skip")
    with pytest.raises(StoreError, match="no store to join"):
        JoinedStore([])


def test_the_rest_of_a_modality_may_lie_in_another_store(make: Make) -> None:
    joined = JoinedStore([make([0, 1]), make([2, 1])])
    assert joined.read("depth", np.arange(3))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert joined.present("depth", np.arange(3)).all()


def test_a_stream_over_joined_stores_masks_what_is_not_there(made: SimpleNamespace, tmp_path: Path) -> None:
    files = [f"file {number}".encode() for number in range(5)]
    images = [
        replace(image, sha256=made.sha256_of_bytes(content)) for image, content in zip(made.rows(5), files, strict=True)
    ]

    def make_store(modality: str, numbers: list[int], **options: object) -> LatentStore:
        rows = RowTable([replace(images[number], row=row) for row, number in enumerate(numbers)])
        recipe = made.recipe(modality=Modality(modality))
        store = made.create(tmp_path / modality, rows, [], 2, {modality: recipe}, **options)
        for shard in store.shards:
            store.write_shard(modality, shard, np.ones((len(shard), 3, 2, 2)), seconds=0, device="cpu")
            if store.has_images:
                chosen = [files[number] for number in numbers[shard.start : shard.stop]]
                store.write_images(shard, chosen, seconds=0)
        return store

    stores = [make_store("depth", [4, 2, 0, 1, 3], images=ORIGINAL_IMAGES), make_store("audio", [0, 3])]
    stream = PairStream(JoinedStore(stores, missing="null"), None, None, 2, seed=0, decode=None)
    seen = []
    for batch in stream.epoch_once():
        for place, image_id in enumerate(batch.image_ids):
            number = int(image_id.removeprefix("image-"))
            assert batch.images[place] == files[number]
            for name, there in (("depth", True), ("audio", number in (0, 3))):
                assert batch.present[name][place] == there
                assert batch.latents[name][place].sum() == (12 if there else 0)
            seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seed": 1}, "`depth` of another recipe"),
        ({"sha256": "1" * 64}, "2 images have another `sha256` in .*`image-1`, `image-0`"),
        ({"label": 1}, "2 images have another `label`"),
        ({"split": "validation"}, "2 images have another `split`"),
    ],
)
def test_stores_that_contradict_each_other_are_refused(make: Make, changes: dict, fault: str) -> None:
    with pytest.raises(RecipeMismatchError, match=fault):
        JoinedStore([make([0, 1]), make([1, 0], **changes)])


def test_classes_must_be_the_same(make: Make, made: SimpleNamespace, tmp_path: Path) -> None:
    other = made.create(tmp_path / "s", made.rows(2), ["b", "a"], 2, {})
    with pytest.raises(RecipeMismatchError, match="different class maps"):
        JoinedStore([make([0, 1]), other])


def test_an_image_that_was_removed_from_one_store_comes_from_none(make: Make) -> None:
    stores = [make([0, 1, 2]), make([2, 1, 0], "audio")]
    take_down([stores[1].path], ["image-1"])
    joined = JoinedStore([stores[0], LatentStore(stores[1].path)])
    assert joined.rows.image_ids == ("image-0", "image-2")
    assert joined.coverage.removed == 1


def test_a_store_that_is_not_whole_and_a_modality_that_nobody_has_are_named(make: Make) -> None:
    store = make([0, 1, 2])
    store.withdraw("depth", {0: store.committed("depth")[0]})
    joined = JoinedStore([store, make([0, 1, 2], "audio")])
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 2 shards"):
        joined.require_complete()
    joined.require_complete(["audio"])
    with pytest.raises(MissingLatentError, match="none of the stores has a modality `shape`"):
        joined.read("shape", np.array([0]))
    with pytest.raises(MissingLatentError, match="none of the stores holds its images"):
        joined.require_complete(["images"])
    with pytest.raises(MissingLatentError, match="no store holds the files of 1 images"):
        joined.read_images(np.array([0]))
    assert torch.from_numpy(joined.read("audio", np.array([2, 0])))[0, 0, 0, 0] == 2
