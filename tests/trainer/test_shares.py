"""What several processes, or several micro-batches, see of a batch, and how what they measured comes together."""

import pytest
import torch

from dla_cache.errors import SpecError
from dla_cache.pairs import WHOLE, Share
from dla_cache.store import open_store
from trainer.data import PairSource, PixelScale, Role
from trainer.scores import HitTally, RankingTally
from trainer.views import ViewConfig

ROLES = [Role(("labelled",), 4), Role(("transfer",), 8, labels_hidden=True)]


def source(tiny, share=WHOLE):
    return PairSource(
        open_store(tiny.store),
        tiny.images,
        image_size=8,
        pixel_scale=PixelScale((0.5,) * 3, (0.5,) * 3),
        modalities=["depth"],
        view=ViewConfig(scale_min=0.5, horizontal_flip=True),
        seed=0,
        device="cpu",
        share=share,
    )


def first_batches(batches, n):
    stream = batches(0)
    found = [next(stream) for _ in range(n)]
    stream.close()
    return found


@pytest.mark.parametrize(("world_size", "n_micro"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_the_parts_of_a_batch_are_the_batch_and_each_has_as_many_images_of_each_role(tiny, world_size, n_micro):
    n_steps, n_parts = 3, world_size * n_micro
    whole = first_batches(source(tiny).training(ROLES), n_steps)
    parts = [
        first_batches(source(tiny, Share(rank, world_size)).training(ROLES, n_micro), n_steps * n_micro)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        cut = [part[step * n_micro + micro] for part in parts for micro in range(n_micro)]
        for name, size in (("labelled", 4), ("transfer", 8)):
            ids = [[one for one in part.image_ids if one.startswith(name)] for part in cut]
            assert [len(one) for one in ids] == [size // n_parts] * n_parts
            assert [one for part in ids for one in part] == [one for one in batch.image_ids if one.startswith(name)]
        places = {image_id: (part, place) for part in cut for place, image_id in enumerate(part.image_ids)}
        for place, image_id in enumerate(batch.image_ids):
            part, at = places[image_id]
            assert torch.equal(part.pixels[at], batch.pixels[place])
            assert torch.equal(part.latents["depth"][at], batch.latents["depth"][place])
            assert part.labels[at] == batch.labels[place]


def test_a_batch_that_makes_no_equal_parts_is_refused(tiny):
    with pytest.raises(SpecError, match=r"4 images of `labelled`.* no 8 equal parts: 2 processes .* 4") as refused:
        source(tiny, Share(0, 2)).training(ROLES, 4)
    assert refused.value.hint


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_of_an_evaluation_each_process_takes_whole_batches_in_turn(tiny, world_size):
    """Of four batches, the last one smaller: with five processes one has none."""
    role = Role(("validation", "transfer"), 4)
    whole = list(source(tiny).evaluation(role, [])())
    shares = [list(source(tiny, Share(rank, world_size)).evaluation(role, [])()) for rank in range(world_size)]
    assert [len(batch) for batch in whole] == [4, 4, 4, 2]
    for rank, share in enumerate(shares):
        assert [batch.image_ids for batch in share] == [batch.image_ids for batch in whole[rank::world_size]]


@pytest.mark.parametrize("tally_class", [HitTally, RankingTally])
def test_tallies_of_batches_in_turn_make_that_of_one_process_interval_and_all(tally_class):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for size in (6, 6, 6, 6, 3):
        logits = torch.randn(size, 4, generator=generator)
        shape = (size, 4) if tally_class is RankingTally else (size,)
        batches.append((logits, torch.randint(2, shape, generator=generator)))

    def counted(some):
        tally = tally_class()
        for logits, labels in some:
            tally.add(logits, labels)
        return tally

    whole, parts = counted(batches).score(), [counted(batches[rank::2]) for rank in range(2)]
    merged = parts[0].merged(parts).score()
    assert (merged.n, merged.value, merged.interval()) == (whole.n, whole.value, whole.interval())
