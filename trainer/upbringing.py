"""What a run learns from: latents, labels, a model at hand, or what one said before; and that it all fits together."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dla_cache.control_recipe import control_note
from dla_cache.errors import RecipeMismatchError, SpecError
from dla_cache.spec import ORIGINAL_IMAGES, ImageRecipe, canonical_json
from dla_cache.store import LatentStore
from trainer.classifiers import pretrained_facts
from trainer.config import RunConfig
from trainer.reference import FrozenClassifier, Reference, Teachers
from trainer.roles import class_counts
from trainer.run_folder import DataFacts, digest_of_rows
from trainer.stored_targets import StoredTargets, open_targets, views_of_run
from trainer.targets import ReferenceFacts
from trainer.tasks import ProbeTask, StudentTask, TeacherTask


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run folder opened again."""

    folder: Path
    config: RunConfig
    facts: DataFacts
    task: ProbeTask | TeacherTask | StudentTask
    weights_sha256: str
    """Of the file of its kept weights."""

    def reference_facts(self, store: LatentStore) -> ReferenceFacts:
        """What a student must know of it that is shown the latents of a store."""
        config, seen = self.config, self.facts.modalities
        return ReferenceFacts(
            kind=config.kind,
            class_names=self.facts.class_names,
            is_multi_label=self.facts.is_multi_label,
            recipes={name: self.facts.recipes[name] for name in seen},
            latents_sha256={name: store.content_hash([name]) for name in seen if name in store.modalities},
            blocks=dict(self.task.outline.blocks),
            spans=self.task.outline.spans,
            weights_sha256=self.weights_sha256,
            image_size=config.image_size,
            pixel_mean=config.pixel_mean,
            pixel_std=config.pixel_std,
        )


@dataclass(frozen=True, slots=True)
class Upbringing:
    """What a run learns from beside labels, if anything."""

    config: RunConfig
    """Of the run, with the views that go with what it learns from."""
    place: str = ""
    facts: ReferenceFacts | None = None
    reference: Reference | None = None
    targets: StoredTargets | None = None
    """The reference, if it is one that was asked before."""
    latents: tuple[str, ...] = ()
    """Modalities that must be read to ask it."""
    teachers_sha256: Mapping[str, str] = field(default_factory=dict)
    """Of the weights of each of several models, by name."""


def taught_by(runs: Mapping[str, TrainedRun], config: RunConfig, store: LatentStore) -> Upbringing:
    """What a run learns from models at hand, by name; one alone keeps its blocks.

    Raises:
        RecipeMismatchError, SpecError: if several do not go together.
    """
    for run in runs.values():
        run.task.module.to(config.device)
    each = {name: run.reference_facts(store) for name, run in runs.items()}
    models = {name: FrozenClassifier(run.task) for name, run in runs.items()}
    if len(runs) == 1:
        ((name, facts),) = each.items()
        return Upbringing(config, str(runs[name].folder), facts, models[name], latents=facts.modalities)
    facts = facts_of_all(each)
    teachers = Teachers(models, config.ensemble, is_multi_label=facts.is_multi_label)
    assert config.objective is not None
    try:
        config.objective.targets(teachers.outline)
    except SpecError as error:
        raise SpecError(
            f"several `teachers` answer as one with logits alone: {error.message}",
            hint="name one `teacher` for what looks into it; objectives of logits, and `mst`, take several",
        ) from error
    return Upbringing(
        config,
        ", ".join(str(run.folder) for run in runs.values()),
        facts,
        teachers,
        latents=facts.modalities,
        teachers_sha256={name: one.weights_sha256 for name, one in each.items()},
    )


def facts_of_all(each: Mapping[str, ReferenceFacts]) -> ReferenceFacts:
    """What must be known of several models that are asked about the same images.

    Raises:
        RecipeMismatchError: if they know different classes, or different latents by the same name.
        SpecError: if they see images of different size or scale.
    """
    (first_name, first), *_ = each.items()
    for name, one in each.items():
        if kind_of_labels(one) != kind_of_labels(first):
            raise RecipeMismatchError(
                f"`teachers.{first_name}` and `teachers.{name}` have different class maps",
                hint="train both on stores made from the same manifest",
            )
    recipes: dict[str, str] = {}
    for name, one in each.items():
        other = [modality for modality, recipe in one.recipes.items() if recipes.setdefault(modality, recipe) != recipe]
        if other:
            raise RecipeMismatchError(
                f"`teachers.{name}` was trained on another recipe of `{other[0]}` than those before it",
                hint="train them again on the same store",
            )
    (seeing_name, seeing), *others = [(n, one) for n, one in each.items() if one.sees_images] or [(first_name, first)]
    for name, one in others:
        for what in ("image_size", "pixel_mean", "pixel_std"):
            if getattr(one, what) != getattr(seeing, what):
                raise SpecError(
                    f"`teachers.{seeing_name}` was trained with `{what}: {getattr(seeing, what)}` and `teachers.{name}`"
                    f" with `{getattr(one, what)}`",
                    hint="all see the student's own view: train them with the same `image_size` and scale of pixels",
                )
    hashes = canonical_json({name: one.weights_sha256 for name, one in each.items()})
    return seeing.model_copy(
        update={
            "kind": " and ".join(dict.fromkeys(one.kind for one in each.values())),
            "recipes": recipes,
            "latents_sha256": {name: value for one in each.values() for name, value in one.latents_sha256.items()},
            "blocks": {},
            "spans": (),
            "weights_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        }
    )


def taught_by_targets(config: RunConfig, place: Path) -> Upbringing:
    """What a run learns from stored targets.

    Raises:
        StoreError: if there are none.
        SpecError: if they are of other views than the run's, or not all that its objective needs.
    """
    assert config.objective is not None
    stored = open_targets(place)
    whole = [name for name, one in config.objective.active.items() if one.wants_all_logits]
    if stored.layout.top_logits is not None and whole:
        raise SpecError(
            f"`{whole[0]}` takes mean and spread of all logits, and `{place}` holds the {stored.layout.top_logits}"
            " largest of an image",
            hint="make targets without `top_logits`, or learn from `teacher`",
        )
    stored = stored.only(config.objective.targets(stored.outline))
    view = views_of_run(config.view, is_said="view" in config.model_fields_set, targets=stored)
    return Upbringing(config.model_copy(update={"view": view}), str(place), stored.facts, stored, stored)


def data_facts(
    config: RunConfig, store: LatentStore, upbringing: Upbringing, begun: DataFacts | None = None
) -> DataFacts:
    """What the run will remember of its data; one that was `begun` sees the modalities it saw then.

    Raises:
        RecipeMismatchError: if the run learns from a model of other latents or other classes.
        SpecError: if it asks for a modality that the store has not, or for weights that are not there.
    """
    wanted: tuple[str, ...] = ()
    if config.kind != "student":
        all_of_store = store.modalities if begun is None else begun.modalities  # it may have gained one since
        wanted = config.modalities if config.modalities is not None else all_of_store
    of_objectives = config.objective.modalities if config.objective is not None else ()
    read = (*wanted, *of_objectives)
    unknown = [name for name in read if name not in store.modalities]
    if unknown:
        raise SpecError(
            f"`{config.store}` has no modality `{unknown[0]}`", hint=f"it has {', '.join(store.modalities)}"
        )
    recipes = {name: store.recipe(name) for name in store.modalities}
    # A probe sees no pixels, and its store may gain images.
    images = pictures_seen(store, config.images) if config.kind != "probe" else ORIGINAL_IMAGES
    taught = upbringing.facts
    counts, n_labelled = class_counts(config, store)
    facts = DataFacts(
        class_names=tuple(store.class_names),
        is_multi_label=store.rows.is_multi_label,
        class_counts=counts,
        n_labelled=n_labelled,
        n_images=len(store.rows),
        recipes={name: recipe.hash for name, recipe in recipes.items()} | (taught.recipes if taught else {}),
        formats={name: recipes[name].format.of_one_draw for name in read},
        modalities=tuple(wanted),
        rows_sha256=digest_of_rows(store),
        latents_sha256=(taught.latents_sha256 if taught else {}) | {name: store.content_hash([name]) for name in read},
        teacher_sha256=taught.weights_sha256 if taught else None,
        teacher_kind=taught.kind if taught else None,
        teachers_sha256=dict(upbringing.teachers_sha256),
        targets_sha256=upbringing.targets.content_hash() if upbringing.targets else None,
        pretrained=pretrained_facts(config.model),
        images=images,
    )
    if taught is not None:
        if kind_of_labels(taught) != kind_of_labels(facts):
            raise RecipeMismatchError(
                f"`{upbringing.place}` and `{config.store}` have different class maps"
                if taught.is_multi_label == facts.is_multi_label
                else f"of `{upbringing.place}` and `{config.store}` one has one class an image, the other several",
                hint="train the teacher on a store made from the same manifest",
            )
        for name in upbringing.latents:
            if name not in recipes or recipes[name].hash != taught.recipes[name]:
                note = control_note(recipes[name]) if name in recipes else ""
                raise RecipeMismatchError(
                    f"`{upbringing.place}` was trained on another recipe of `{name}` than `{config.store}` holds"
                    f"{f', a {note}' if note else ''}",
                    hint="train the teacher again on this store, or name the store it was trained on",
                )
    return facts


def pictures_seen(store: LatentStore, images: str | None) -> ImageRecipe:
    """What is decoded of the images: their files, or what the store holds where no folder is named."""
    return (store.metadata.images if images is None else None) or ORIGINAL_IMAGES


def check_same_pixels(config: RunConfig, taught: ReferenceFacts, place: str) -> None:
    """Both see the same view of an image, so it must be of the size and scale that the model was trained on.

    Raises:
        SpecError: if it is not; a probe sees no pixels and fits all.
    """
    for name in ("image_size", "pixel_mean", "pixel_std") if taught.sees_images else ():
        if getattr(taught, name) != getattr(config, name):
            raise SpecError(
                f"`{name}` is `{getattr(config, name)}`, the {taught.kind} in `{place}` was trained on"
                f" `{getattr(taught, name)}`",
                hint=f"set `{name}` as it is there",
            )


def kind_of_labels(facts: DataFacts | ReferenceFacts) -> tuple[tuple[str, ...], bool]:
    """What two runs must share for the answers of one to mean something to the other."""
    return facts.class_names, facts.is_multi_label
