"""Which image gets whose latent: permutations that a seed and the images' IDs decide, and nothing else."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dla_cache.sources.seeding import sample_seed

TRIES = 64
"""Random partners that an image is offered before all are looked through."""


def shuffle_within(image_ids: Sequence[str], groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """For each image the place of the one whose latent it gets, of its own group: [n].

    One random cycle a group: nobody keeps his own unless he is alone in his group. Not every derangement is one cycle,
    but each image gets that of any other with the same probability.

    Args:
        groups: [n], images of one number are shuffled among themselves.
    """
    order = _in_random_order(image_ids, seed)
    donors = np.empty(len(order), np.int64)
    for members in _members(groups[order]):
        donors[order[members]] = order[np.roll(members, -1)]
    return donors


def shuffle_across(
    image_ids: Sequence[str], groups: NDArray[np.int64], classes: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """For each image the place of one of its own group and of another class, wherever that is possible: [n].

    It is for all images unless a class has more than half of its group: then for as many as there are others, and the
    rest get a latent of their own class, though not their own. The class of a latent tells only which class the image
    does not have: a fixed partner class would be a label by another name.

    Args:
        groups, classes: [n].
    """
    order = _in_random_order(image_ids, seed)
    donors = np.empty(len(order), np.int64)
    for members in _members(groups[order]):
        places = order[members]
        rng = np.random.default_rng(sample_seed(seed, "across", image_ids[places[0]]))
        donors[places] = places[_deranged(classes[places], rng)]
    return donors


def _in_random_order(image_ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Places in an order that does not depend on the one they are handed over in."""
    keys = [(sample_seed(seed, "order", image_id), image_id) for image_id in image_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _members(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The places of each group, rising."""
    by_group = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[by_group])) + 1
    return np.split(by_group, starts) if len(groups) else []


def _deranged(classes: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation under which as few places as possible get one of their own class, and none itself.

    A random permutation, then swaps: two places exchange what they get if both get another class by it. Where no swap
    is left, every place of another class gets one of the class in question, so more cannot be had.
    """
    donors = rng.permutation(len(classes))
    stuck = np.zeros(len(classes), bool)
    for place in rng.permutation(np.flatnonzero(classes[donors] == classes)).tolist():
        own = classes[place]
        if classes[donors[place]] != own or stuck[place]:  # a swap before this one has helped it, too; or none can
            continue
        partners = rng.integers(0, len(classes), TRIES)
        fitting = partners[(classes[partners] != own) & (classes[donors[partners]] != own)]
        if not len(fitting):
            every = np.flatnonzero((classes != own) & (classes[donors] != own))
            fitting = rng.permutation(every)
        if len(fitting):
            donors[[place, fitting[0]]] = donors[[fitting[0], place]]
        else:
            stuck[classes == own] = True
    return _without_fixed_points(donors, np.flatnonzero(stuck))


def _without_fixed_points(donors: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The permutation with what fixed places get exchanged with another of these places, all of one class."""
    for place in places[donors[places] == places].tolist():
        others = places[places != place]
        if donors[place] == place and len(others):
            donors[[place, others[0]]] = donors[[others[0], place]]
    return donors
