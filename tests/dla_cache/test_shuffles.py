"""Shuffles: permutations that keep or change the class of every image, decided by seed and IDs alone."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.shuffles import shuffle_across, shuffle_within

SEEDS = st.integers(0, 2**63 - 1)
GROUPED = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30)
"""Of each image its split and its class."""


def parts_of(images):
    """IDs, splits and classes as the shuffles take them."""
    splits, classes = (np.array([image[part] for image in images], np.int64) for part in (0, 1))
    return [f"image-{place}" for place in range(len(images))], splits, classes


@given(images=GROUPED, seed=SEEDS)
def test_within_a_class_everybody_gets_another_latent_of_the_class_unless_alone_in_it(images, seed):
    image_ids, splits, classes = parts_of(images)
    groups = splits * 4 + classes
    donors = shuffle_within(image_ids, groups, seed)
    assert sorted(donors) == list(range(len(images)))
    assert (groups[donors] == groups).all()
    sizes = Counter(groups.tolist())
    assert [donor == place for place, donor in enumerate(donors)] == [sizes[group] == 1 for group in groups.tolist()]


@given(images=GROUPED, seed=SEEDS)
def test_across_classes_as_many_as_can_be_get_another_class_and_nobody_his_own(images, seed):
    image_ids, splits, classes = parts_of(images)
    donors = shuffle_across(image_ids, splits, classes, seed)
    assert sorted(donors) == list(range(len(images)))
    assert (splits[donors] == splits).all()
    for split in set(splits.tolist()):
        places = np.flatnonzero(splits == split)
        largest = max(Counter(classes[places].tolist()).values())
        assert (classes[donors[places]] == classes[places]).sum() == max(0, 2 * largest - len(places))
        assert (donors[places] == places).sum() == (len(places) == 1)


@given(images=GROUPED, seed=SEEDS, order=st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(images, seed, order):
    image_ids, splits, classes = parts_of(images)
    moved = order.sample(range(len(images)), len(images))
    ids_moved = [image_ids[place] for place in moved]
    for shuffle, groups in ((shuffle_within, (splits * 4 + classes,)), (shuffle_across, (splits, classes))):
        before = shuffle(image_ids, *groups, seed)
        after = shuffle(ids_moved, *(part[moved] for part in groups), seed)
        assert {image_ids[place]: image_ids[donor] for place, donor in enumerate(before)} == {
            ids_moved[place]: ids_moved[donor] for place, donor in enumerate(after)
        }


def test_another_seed_is_another_shuffle():
    image_ids, _, classes = parts_of([(0, place % 4) for place in range(100)])
    one, other = (shuffle_within(image_ids, classes, seed) for seed in (0, 1))
    assert (one != other).mean() > 0.8


def test_across_classes_every_other_class_is_equally_likely():
    """A fixed partner class would be the label by another name."""
    image_ids, splits, classes = parts_of([(0, place % 4) for place in range(4000)])
    donors = shuffle_across(image_ids, splits, classes, seed=3)
    pairs = Counter(zip(classes.tolist(), classes[donors].tolist(), strict=True))
    assert len(pairs) == 12
    assert all(abs(count - 4000 / 12) < 6 * (4000 / 12) ** 0.5 for count in pairs.values())


def test_two_large_classes_are_shuffled_across_in_no_time():
    image_ids, splits, classes = parts_of([(0, place < 9000) for place in range(10000)])
    donors = shuffle_across(image_ids, splits, classes, seed=0)
    assert (classes[donors] == classes).sum() == 8000
    assert (donors != np.arange(10000)).all()
