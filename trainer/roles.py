"""The roles of a run: whether the splits of a store can play them, and what they hold of each class."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dla_cache.chosen import label_array
from dla_cache.errors import SpecError, name_some
from dla_cache.store import LatentStore
from dla_cache.store.statistics import LatentStatistics, measure, merge_statistics
from trainer.config import RunConfig
from trainer.objectives import Need

ROWS_AT_A_TIME = 4096
"""Latents that are in memory while their statistics are taken."""


def check_roles(config: RunConfig, store: LatentStore) -> None:
    """Looks at all roles before the first step, so that no fault of the test split shows after the last one.

    Raises:
        SpecError: if a split has no image, a role too few for a batch, an image no label where labels are learned or
            measured, or a class no image to be learned from.
    """
    if len(store.class_names) < (1 if store.rows.is_multi_label else 2):
        raise SpecError(
            f"the store has {len(store.class_names)} classes, between which there is nothing to choose",
            hint="make a manifest with labels of two classes or more",
        )
    wanted = {split for role in ("labelled", "transfer", "validation", "test") for split in getattr(config.roles, role)}
    absent = sorted(wanted - store.rows.splits)
    if absent:
        raise SpecError(
            f"the store has no image of split {name_some(absent)}",
            hint=f"its splits are {name_some(sorted(store.rows.splits), shown=10)}; say which plays which part, as"
            " --set 'roles={labelled: train, transfer: [], validation: val, test: test}'",
        )
    if config.label_fraction < 1 and store.rows.is_multi_label:
        raise SpecError(
            f"`label_fraction` is {config.label_fraction}, and an image of `{config.store}` may have several classes",
            hint="set it to 1: a share of each class cannot be drawn; or make a manifest with fewer labelled images",
        )
    rows_of_role = {"labelled": labelled_rows(config, store), "transfer": store.rows_of(config.roles.transfer)}
    for role, per_batch in (("labelled", config.labelled_per_batch), ("transfer", config.transfer_per_batch)):
        n_images = len(rows_of_role[role])
        if n_images < per_batch:
            raise SpecError(
                f"`roles.{role}` has {n_images} images, and `{role}_per_batch` is {per_batch}",
                hint=f"make batches smaller: --set {role}_per_batch={max(1, n_images // 4)}",
            )
    for role in ("labelled", "validation", "test"):
        splits = getattr(config.roles, role)
        if not splits:
            continue
        check_is_labelled(
            store,
            splits,
            f"`roles.{role}`",
            hint="images without a label can play `roles.transfer` only",
        )
    if not config.allow_empty_classes and learns_labels(config):
        check_has_all_classes(config, store)


def check_is_labelled(store: LatentStore, splits: Sequence[str], where: str, *, hint: str) -> None:
    """Passes splits whose images all have a label; of several labels only if some image has a class, for else nothing
    is ranked.

    Raises:
        SpecError: if an image has none.
    """
    rows = store.rows_of(splits)
    labels = store.rows.labels_of(rows)
    unlabelled = rows[[label is None for label in labels]]
    if len(unlabelled):
        named = name_some(store.rows.ids_of(unlabelled))
        raise SpecError(f"{len(unlabelled)} of {len(rows)} images of {where} have no label: {named}", hint=hint)
    if store.rows.is_multi_label and not any(labels):
        raise SpecError(f"no image of {where} has any of the classes", hint="there is nothing to rank: see the labels")


def check_has_all_classes(config: RunConfig, store: LatentStore) -> None:
    """Passes a labelled role with an image of every class.

    Raises:
        SpecError: naming the classes without one.
    """
    counts, _ = class_counts(config, store)
    empty = [name for name, count in zip(store.class_names, counts, strict=True) if not count]
    if empty:
        raise SpecError(
            f"{len(empty)} of {len(counts)} classes have no image in `roles.labelled`: {name_some(empty)}",
            hint="label some, make a manifest without these classes, or let them go unlearned:"
            " --set allow_empty_classes=true",
        )


def learns_labels(config: RunConfig) -> bool:
    """Whether a run has a cross entropy with labels: all have but students that only distil."""
    return config.objective is None or Need.LABELS in config.objective.needs


def labelled_rows(config: RunConfig, store: LatentStore) -> NDArray[np.int64]:
    """The rows of the labelled images that take part, rising; a split that the store has not counts as empty.

    Of each class the first in an order of its own, which image ID and `label_fraction_seed` decide: so a smaller
    fraction is a subset of a larger one, and no image depends on what else is in the store.
    """
    there = [split for split in config.roles.labelled if split in store.rows.splits]
    rows = store.rows_of(there) if there else np.empty(0, np.int64)
    if config.label_fraction == 1 or store.rows.is_multi_label:
        return rows
    kept = []
    for label in np.unique(labels := store.rows.label_numbers(rows)).tolist():
        of_class = rows[labels == label]
        ids = store.rows.ids_of(of_class)
        seeded = [hashlib.sha256(f"{config.label_fraction_seed} {name}".encode()).digest() for name in ids]
        order = sorted(range(len(of_class)), key=seeded.__getitem__)
        # A hair less, so that .1 of 30 images are 3, whatever .1 * 30 rounds to.
        kept.append(of_class[order[: math.ceil(config.label_fraction * len(of_class) - 1e-9)]])
    return np.sort(np.concatenate(kept)) if kept else rows


def labelled_ids(config: RunConfig, store: LatentStore) -> frozenset[str] | None:
    """The labelled images that take part; None for all."""
    return None if config.label_fraction == 1 else frozenset(store.rows.ids_of(labelled_rows(config, store)))


def class_counts(config: RunConfig, store: LatentStore) -> tuple[tuple[int, ...], int]:
    """Labelled images of each class that take part, and all of them."""
    rows = labelled_rows(config, store)
    labels = label_array(store, rows)
    if labels.ndim == 2:
        return tuple((labels == 1).sum(axis=0).tolist()), len(rows)
    return tuple(np.bincount(labels[labels >= 0], minlength=len(store.class_names)).tolist()), len(rows)


def training_statistics(config: RunConfig, store: LatentStore, modality: str) -> LatentStatistics:
    """Per-channel statistics of the latents of the images that a run trains on: as the store recorded them, or, where
    some of its labelled images take no part, measured anew.
    """
    if config.label_fraction == 1:
        return store.statistics(modality, config.training_splits)
    transfer = store.rows_of(config.roles.transfer) if config.roles.transfer else np.empty(0, np.int64)
    rows = np.sort(np.concatenate([labelled_rows(config, store), transfer]))
    axis = store.recipe(modality).format.channel_axis
    starts = range(0, len(rows), ROWS_AT_A_TIME)
    return merge_statistics(
        [measure(store.read(modality, rows[start : start + ROWS_AT_A_TIME]), axis) for start in starts]
    )
