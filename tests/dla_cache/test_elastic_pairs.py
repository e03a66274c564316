"""Pairs for any number of ranks and workers: the same batches, in the same order, also after another number of them."""

import json
import multiprocessing
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dla_cache.errors import MissingLatentError, StoreError
from dla_cache.images import decode_image
from dla_cache.loading import PairDataset
from dla_cache.order import BlockShuffle
from dla_cache.pairs import PairBatch, PairStream, Share
from dla_cache.store.rows import RowTable

LAYOUTS = ["zarr"]
SHUFFLES = [False, True, BlockShuffle(3, 2)]

Make = Callable[..., PairStream]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Make:
    """Streams over the 20 images of a store; six of them in `test`."""
    folder = tmp_path_factory.mktemp("elastic")
    manifest, recipe = made.manifest(folder, 20), made.recipe()
    store = made.create(folder / "s", RowTable.from_manifest(manifest), manifest.class_names, 3, {"depth": recipe})
    latents = made.latents(recipe, 20)
    for shard in store.shards:
        store.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=0.1, device="cpu")
    return partial(PairStream, store, folder, **{"splits": None, "seed": 0, "decode": decode_image})


def ids(batches: Iterable[PairBatch]) -> list[tuple[str, ...]]:
    return [batch.image_ids for batch in batches]


@given(st.integers(1, 20), st.integers(1, 6), st.booleans(), st.sampled_from(SHUFFLES))
def test_the_parts_of_all_ranks_make_up_every_batch(
    make: Make, batch_size: int, world_size: int, drop_last: bool, shuffle: bool | BlockShuffle
) -> None:
    settings = {"batch_size": batch_size, "drop_last": drop_last, "shuffle": shuffle}
    whole = make(**settings)
    smallest = batch_size if drop_last else 20 - (len(whole) - 1) * batch_size
    assume(smallest >= world_size)
    parts = [make(**settings, share=Share(rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(whole)}
    for number in (0, len(whole) - 1, len(whole)):
        batches = [part.batch(number) for part in parts]
        expected = whole.batch(number)
        assert sum(ids(batches), ()) == expected.image_ids
        assert torch.equal(torch.cat([batch.latents["depth"] for batch in batches]), expected.latents["depth"])
        sizes = [len(batch.image_ids) for batch in batches]
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_that_leaves_a_rank_without_an_image_is_refused_with_numbers(make: Make) -> None:
    with pytest.raises(StoreError, match=r"20 images in batches of 6 leave 2 in the last .* too few for 3 ranks"):
        make(batch_size=6, share=Share(0, 3))
    assert len(make(batch_size=6, share=Share(0, 3), drop_last=True)) == 3
    for settings in (
        {"batch_size": 0},
        {"batch_size": -4},
        {"batch_size": 4, "seed": -1},
        {"batch_size": 4, "threads": 0},
    ):
        with pytest.raises(StoreError, match="batches and threads from 1, seeds from 0 on"):
            make(**settings)
    with pytest.raises(StoreError, match="rank 3 of 3"):
        Share(3, 3)


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_batches_in_the_order_of_the_stream(
    make: Make, loader: type, n_workers: int
) -> None:
    stream = make(batch_size=3)
    dataset = PairDataset(stream, epochs=2)
    assert len(dataset) == 14
    loaded = list(loader(dataset, batch_size=None, num_workers=n_workers))
    assert ids(loaded) == ids(islice(stream.batches(), 14))
    assert [batch.number for batch in loaded] == list(range(14))


@pytest.mark.parametrize("before", [(1, 0), (2, 2)])
@pytest.mark.parametrize("after", [(1, 2), (3, 0), (2, 1)])
def test_a_run_goes_on_exactly_with_another_number_of_ranks_and_workers(
    make: Make, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def run(world_size: int, n_workers: int, start: int, n_batches: int) -> tuple[list[str], dict]:
        """The images of every batch, all ranks together, and rank 0's state as JSON."""
        seen, state = [], None
        for rank in range(world_size):
            stream = make(batch_size=4, drop_last=True, share=Share(rank, world_size))
            dataset = PairDataset(stream, epochs=None, start_batch=start)
            loaded = list(islice(DataLoader(dataset, batch_size=None, num_workers=n_workers), n_batches))
            seen.append(ids(loaded))
            state = state or json.loads(json.dumps(stream.state_after(loaded[-1].number)))
        return [sum(parts, ()) for parts in zip(*seen, strict=True)], state

    first, state = run(*before, start=0, n_batches=3)
    rest, _ = run(*after, start=make(batch_size=4, drop_last=True).start_of(state), n_batches=6)
    assert first + rest == ids(islice(make(batch_size=4, drop_last=True).batches(), 9))


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(make: Make, n_workers: int) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(PairDataset(make(batch_size=2)), batch_size=None, num_workers=n_workers)

    whole, broken, resumed = ids(loader()), loader(), loader()
    begun = ids(islice(broken, 5))
    resumed.load_state_dict(broken.state_dict())
    assert begun + ids(resumed) == whole
    assert ids(resumed) == whole  # the next epoch of the loader begins anew


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}])
def test_a_loader_that_was_left_early_begins_anew(make: Make, options: dict) -> None:
    loader = DataLoader(PairDataset(make(batch_size=2)), batch_size=None, **options)
    whole = ids(loader)
    assert len(ids(islice(loader, 3))) == 3
    assert ids(loader) == ids(loader) == whole


@pytest.mark.parametrize("n_workers", [0, 1])
def test_each_epoch_of_a_loader_has_its_own_order_once_it_is_told_which(make: Make, n_workers: int) -> None:
    stream = make(batch_size=6)
    dataset = PairDataset(stream)
    loader = DataLoader(dataset, batch_size=None, num_workers=n_workers)
    seen = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen.append(ids(loader))
    assert seen == [ids(stream.epoch_once(epoch)) for epoch in range(3)]
    assert len({tuple(one) for one in seen}) == 3


def test_a_worker_that_is_no_fork_opens_the_store_anew(make: Make) -> None:
    loader = DataLoader(
        PairDataset(make(batch_size=7)), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    assert multiprocessing.get_start_method(allow_none=True) != "spawn"
    assert ids(loader) == ids(make(batch_size=7).epoch_once())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"splits": ["test"]}, "images"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_a_state_of_another_stream_is_refused_and_says_in_what(make: Make, change: dict, what: str) -> None:
    state = make(batch_size=4).state_after(2)
    assert make(batch_size=4).start_of(state) == 3
    with pytest.raises(StoreError, match=f"other {what}\n"):
        make(**{"batch_size": 4, **change}).start_of(state)


@pytest.mark.parametrize(
    "state", [{}, {"format": "dla-pairs-1"}, {"format": "dla-pairs-1", "next_batch": -1, "order": {}}]
)
def test_what_is_no_state_is_refused(make: Make, state: dict) -> None:
    with pytest.raises(StoreError, match="no state"):
        make(batch_size=4).start_of(state)


def test_a_subset_is_of_splits_ids_and_whatever_can_be_asked_of_an_image(make: Make) -> None:
    def of(**subset: object) -> set[str]:
        return set(sum(ids(make(batch_size=3, **subset).epoch_once()), ()))

    every = {f"image-{number}" for number in range(20)}
    assert of() == every
    assert of(where=lambda image: image.label == 1) == {f"image-{number}" for number in (1, 5, 9, 13, 17)}
    assert of(image_ids=["image-4", "image-19", "image-4"]) == {"image-4", "image-19"}
    assert of(splits=["test"], where=lambda image: image.label is None) == {"image-11"}
    with pytest.raises(MissingLatentError, match="1 images are not of the splits asked for: `image-0`"):
        make(batch_size=3, splits=["test"], image_ids=["image-0", "image-2"])
    with pytest.raises(MissingLatentError, match="no image `nobody`"):
        make(batch_size=3, image_ids=["nobody"])
    with pytest.raises(StoreError, match="no image is left"):
        make(batch_size=3, where=lambda _: False)


def test_without_a_decoder_the_files_come_as_they_are(make: Make) -> None:
    decoded = list(make(batch_size=6, shuffle=False).epoch_once())
    raw = list(make(batch_size=6, shuffle=False, decode=None).epoch_once())
    for one, other in zip(decoded, raw, strict=True):
        assert (one.images, other.pixels) == ((), ())
        for pixels, content in zip(one.pixels, other.images, strict=True):
            np.testing.assert_array_equal(pixels, decode_image(content, "it"))


def test_a_stream_tells_how_well_it_mixes(make: Make) -> None:
    assert make(batch_size=4, shuffle=False).shuffle_quality().mean_distance == pytest.approx(1 / 20)
    mixed = make(batch_size=4).shuffle_quality()
    assert 0.15 < mixed.mean_distance < 0.55
    assert mixed.same_shard < 0.5
