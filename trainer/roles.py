"""The roles of a run: whether the splits of a store can play them, and what they hold of each class."""

from collections.abc import Sequence

import numpy as np

from dla_cache.chosen import label_array
from dla_cache.errors import SpecError, name_some
from dla_cache.store import LatentStore
from trainer.config import RunConfig
from trainer.objectives import Need


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
    for role, per_batch in (("labelled", config.labelled_per_batch), ("transfer", config.transfer_per_batch)):
        n_images = len(store.rows_of(getattr(config.roles, role)))
        if n_images < per_batch:
            raise SpecError(
                f"`roles.{role}` has {n_images} images, and `{role}_per_batch` is {per_batch}",
                hint=f"make batches smaller: --set {role}_per_batch={max(1, n_images // 4)}",
            )
    for role in ("labelled", "validation", "test"):
        check_is_labelled(
            store,
            getattr(config.roles, role),
            f"`roles.{role}`",
            hint="images without a label can play `roles.transfer` only",
        )
    if not config.allow_empty_classes and learns_labels(config):
        check_has_all_classes(store, config.roles.labelled)


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


def check_has_all_classes(store: LatentStore, splits: Sequence[str]) -> None:
    """Passes splits with an image of every class.

    Raises:
        SpecError: naming the classes without one.
    """
    counts, _ = class_counts(store, splits)
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


def class_counts(store: LatentStore, splits: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Images of each class in some splits, and images in them; a split that the store has not counts as empty."""
    there = [split for split in splits if split in store.rows.splits]
    rows = store.rows_of(there) if there else np.empty(0, np.int64)
    labels = label_array(store, rows)
    if labels.ndim == 2:
        return tuple((labels == 1).sum(axis=0).tolist()), len(rows)
    return tuple(np.bincount(labels[labels >= 0], minlength=len(store.class_names)).tolist()), len(rows)
