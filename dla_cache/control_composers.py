"""One class for each way in which control latents are composed: what it is made of, and what makes a modality's."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dla_cache.control_draws import Marginals, RandomMap, generator_of
from dla_cache.control_labels import hash_of_groups, known_classes, read_labels
from dla_cache.control_recipe import Kind
from dla_cache.errors import MissingLatentError, SpecError, name_some
from dla_cache.shuffles import shuffle_across, shuffle_within
from dla_cache.spec import canonical_json
from dla_cache.store import LatentStore

HELD_OUT = frozenset({"validation", "val", "test"})
"""Splits whose statistics a control does not have, unless a store has no others."""

POOLED_FEATURES = "target-pooled-v0"
"""What a store of targets calls the pooled features of its first view."""

Facts = Mapping[str, str | float]
"""Parameters of a recipe."""

Make = Callable[[NDArray[np.int64]], NDArray[np.generic]]
"""Control latents [n, *shape] of rows [n] of the real store."""


class Composer(Protocol):
    """A way to compose control latents of one store."""

    facts: Facts
    """What decides the numbers beside kind, seed and the real latents."""

    def maker(self, modality: str) -> Make:
        """What makes the latents of a modality; all that it must know of the store is read and measured for it."""


class Shuffle:
    """Each image gets the latents of another one of its split; of all modalities those of the same one."""

    def __init__(self, source: LatentStore, kind: Kind, seed: int, labels: Path | None) -> None:
        self.source = source
        self.facts: Facts
        self.n_same_class: int | None = None
        """Images that get, or keep, a latent of their own class; None of a shuffle that goes by none."""
        rows = source.rows_of()
        image_ids, split_names = source.rows.ids_of(rows), source.rows.splits_of(rows)
        splits = np.unique(split_names, return_inverse=True)[1]
        if kind == "shuffled":
            self.facts = {"splits": hash_of_groups(image_ids, split_names, np.zeros(len(rows), np.int64))}
            donors = shuffle_within(image_ids, splits, seed)
        else:
            classes, self.facts = classes_of(source, kind, labels)
            if kind == "shuffled-within-class":
                donors = shuffle_within(image_ids, splits * len(source.class_names) + classes, seed)
            else:
                refuse_few_classes(source, kind, classes)
                donors = shuffle_across(image_ids, splits, classes, seed)
            self.n_same_class = int((classes[donors] == classes).sum())
        self.n_own = int((donors == np.arange(len(rows))).sum())
        """Images that keep their own latent, for there is no other to give."""
        self.donor_rows = np.full(source.rows.end, -1, np.int64)
        self.donor_rows[rows] = rows[donors]

    def maker(self, modality: str) -> Make:
        return lambda rows: self.source.read(modality, self.donor_rows[rows])


class Noise:
    """Independent numbers that are distributed as those of the training splits, of each channel or at each place."""

    def __init__(self, source: LatentStore, kind: Kind, seed: int, modalities: Sequence[str]) -> None:
        self.source, self.seed, self.by_place = source, seed, kind == "gaussian-by-place"
        if self.by_place:
            refuse_codes(source, kind, modalities)
        self.splits = training_splits(source)
        self.facts: Facts = {"statistics_of": canonical_json(self.splits)}

    def maker(self, modality: str) -> Make:
        marginals = Marginals(self.source, modality, self.splits, by_place=self.by_place)

        def make(rows: NDArray[np.int64]) -> NDArray[np.generic]:
            image_ids = self.source.rows.ids_of(rows)
            return stacked([marginals.draw(generator_of(self.seed, modality, one)) for one in image_ids], marginals)

        return make


class ClassVectors:
    """A random latent for each class, the same for all its images but for noise."""

    def __init__(self, source: LatentStore, kind: Kind, seed: int, labels: Path | None, noise: float) -> None:
        if not 0 <= noise <= 1:
            raise SpecError(f"`noise` is {noise}", hint="it is a share, from 0 to 1")
        self.source, self.seed, self.noise = source, seed, noise
        classes, facts = classes_of(source, kind, labels)
        self.class_of = np.full(source.rows.end, -1, np.int64)
        self.class_of[source.rows_of()] = classes
        self.splits = training_splits(source)
        self.facts: Facts = {**facts, "statistics_of": canonical_json(self.splits), "noise": float(noise)}

    def maker(self, modality: str) -> Make:
        marginals = Marginals(self.source, modality, self.splits)

        def make(rows: NDArray[np.int64]) -> NDArray[np.generic]:
            latents = []
            for image_id, label in zip(self.source.rows.ids_of(rows), self.class_of[rows].tolist(), strict=True):
                of_image = generator_of(self.seed, modality, image_id)
                # No image ID has a blank.
                of_class = generator_of(self.seed, modality, f"class {self.source.class_names[label]}")
                latents.append(marginals.draw_of(of_class, of_image, self.noise))
            return stacked(latents, marginals)

        return make


class Fabricated:
    """What a random map makes of another model's features."""

    def __init__(
        self,
        source: LatentStore,
        kind: Kind,
        seed: int,
        modalities: Sequence[str],
        features: LatentStore,
        series: str | None,
    ) -> None:
        refuse_codes(source, kind, modalities)
        self.source, self.seed, self.features = source, seed, features
        self.series = chosen_series(features, series)
        self.rows_there = matching_rows(source, features, self.series)
        self.splits = training_splits(source)
        content = features.content_hash([self.series])
        self.facts: Facts = {
            "statistics_of": canonical_json(self.splits),
            "features": self.series,
            "features_content": content,
        }

    def maker(self, modality: str) -> Make:
        marginals = Marginals(self.source, modality, self.splits)
        measured = self.rows_there[self.source.rows_of(self.splits)]
        mapped = RandomMap(self.features, self.series, measured, marginals, self.seed, modality)
        return lambda rows: mapped.of_rows(self.rows_there[rows])


def stacked(latents: Sequence[NDArray[np.generic]], marginals: Marginals) -> NDArray[np.generic]:
    """[n, *shape], be n 0."""
    latent = marginals.format
    return np.stack(latents) if latents else np.empty((0, *latent.shape), latent.read_dtype)


def training_splits(store: LatentStore) -> tuple[str, ...]:
    """The splits whose statistics a control has: what is held out by its name is not looked at."""
    filled = sorted(split for split in store.rows.splits if len(store.rows_of([split])))
    return tuple(split for split in filled if split not in HELD_OUT) or tuple(filled)


def classes_of(store: LatentStore, kind: Kind, labels: Path | None) -> tuple[NDArray[np.int64], Facts]:
    """The class of every image in row order, and what a recipe says of them.

    Raises:
        SpecError, ManifestError: see `known_classes` and `read_labels`.
    """
    rows = store.rows_of()
    said = None if labels is None else read_labels(labels, store.class_names)
    classes = known_classes(store, rows, said, kind)
    return classes, {"classes": hash_of_groups(store.rows.ids_of(rows), store.rows.splits_of(rows), classes)}


def refuse_few_classes(store: LatentStore, kind: Kind, classes: NDArray[np.int64]) -> None:
    """Passes classes of which another one does not tell the image's own.

    Raises:
        SpecError: if there are fewer than three.
    """
    n_classes = len(np.unique(classes))
    if n_classes < 3:
        raise SpecError(
            f"images of `{store.place}` have {n_classes} classes, and `{kind}` would tell which one as well as a label",
            hint="take `shuffled`, which goes by no class",
        )


def refuse_codes(store: LatentStore, kind: Kind, modalities: Sequence[str]) -> None:
    """Passes modalities of real numbers.

    Raises:
        SpecError: naming those of codes.
    """
    codes = [name for name in modalities if store.recipe(name).format.kind == "codes"]
    if codes:
        others = [name for name in store.modalities if name not in codes]
        hint = "take `gaussian`, which draws codes as often as they are"
        raise SpecError(
            f"`{kind}` is of real numbers, and {name_some(codes)} holds codes",
            hint=f"{hint}, or leave them as they are: `--modality {others[0]}`" if others else hint,
        )


def chosen_series(features: LatentStore, series: str | None) -> str:
    """The series of features to map: the one that is named, the pooled features of the first view, or the only one.

    Raises:
        MissingLatentError: if there is no such series.
        SpecError: if it holds codes, or nothing says which one.
    """
    real = [name for name in features.modalities if features.recipe(name).format.kind == "continuous"]
    if series is None and POOLED_FEATURES not in real and len(real) != 1:
        raise SpecError(
            f"`{features.place}` has {len(real)} series of real numbers: {name_some(real, shown=10)}",
            hint="say which is mapped: --series NAME",
        )
    chosen = series or (POOLED_FEATURES if POOLED_FEATURES in real else real[0])
    if features.recipe(chosen).format.kind == "codes":
        raise SpecError(f"`{chosen}` of `{features.place}` holds codes", hint="features are real numbers")
    return chosen


def matching_rows(source: LatentStore, features: LatentStore, series: str) -> NDArray[np.int64]:
    """For each row number of a store the row of the same image in the store of features.

    Raises:
        IncompleteBuildError: if a shard of the features is missing.
        MissingLatentError: if an image has no features.
        SpecError: if an ID stands for another image there.
    """
    features.require_complete([series])
    rows = source.rows_of()
    image_ids = source.rows.ids_of(rows)
    row_there = features.rows.row_by_id
    absent = [place for place, image_id in enumerate(image_ids) if image_id not in row_there]
    if absent:
        splits = sorted(set(source.rows.splits_of(rows[absent])))
        raise MissingLatentError(
            f"`{features.place}` has no features of {len(absent)} images, in split {name_some(splits, shown=10)}:"
            f" {name_some([image_ids[place] for place in absent])}",
            hint="`dla train targets` with `splits` of all splits of the store makes them",
        )
    there = np.array([row_there[image_id] for image_id in image_ids], np.int64)
    pairs = zip(source.rows.images_of(rows), features.rows.images_of(there), strict=True)
    others = [one.image_id for one, other in pairs if one.sha256 != other.sha256]
    if others:
        raise SpecError(
            f"{len(others)} images of `{features.place}` are others of the same ID: {name_some(others)}",
            hint="make the features from the same manifest",
        )
    matching = np.full(source.rows.end, -1, np.int64)
    matching[rows] = there
    return matching
