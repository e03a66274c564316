"""What a frozen model once said, read back: a student learns from it without the model and without latents."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from dla_cache.errors import IncompleteBuildError, RecipeMismatchError, SpecError, name_some
from dla_cache.spec import ImageRecipe
from dla_cache.store import LatentStore, open_store
from trainer.batch import Batch
from trainer.features import Target
from trainer.objectives.objective import ModelOutline
from trainer.targets import SOURCE, ReferenceFacts, TargetLayout, facts_in, series_name, shapes_in, view_count
from trainer.views import VIEWS_VERSION, ViewConfig


@dataclass(frozen=True)
class StoredTargets:
    """A store of targets as something to learn from; see `trainer.reference.Reference`."""

    store: LatentStore
    facts: ReferenceFacts
    view: ViewConfig
    """The views that it was asked about; `count` and `seed` are set."""
    layout: TargetLayout
    wanted: frozenset[Target] | None = None
    """What is read; None for all that is stored."""

    def only(self, wanted: Collection[Target]) -> "StoredTargets":
        """The same, of which nothing else is read.

        Raises:
            SpecError: if something is not stored.
        """
        absent = [str(target) for target in wanted if target not in self.layout.shapes]
        if absent:
            raise SpecError(
                f"`{self.store.place}` does not hold {name_some(absent)} of its model",
                hint=f"it holds {name_some([str(target) for target in self.layout.shapes], shown=8)}; store more with"
                " `dla train targets` and the student's `objective`",
            )
        return StoredTargets(self.store, self.facts, self.view, self.layout, frozenset(wanted))

    @property
    def outline(self) -> ModelOutline:
        return ModelOutline(self.facts.blocks, self.facts.spans, len(self.facts.class_names))

    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        """What it says of a batch: what came with it."""
        return {target: batch.targets[target] for target in wanted}

    @cached_property
    def _kinds(self) -> tuple[str, ...]:
        """Kinds of series that hold something wanted."""
        kinds = self.layout.kinds()
        return tuple(kind for kind, held in kinds.items() if self.wanted is None or self.wanted & set(held))

    def series(self, view: int) -> tuple[str, ...]:
        """The modalities of the store that a view's targets lie in."""
        return tuple(series_name(kind, view % view_count(self.view)) for kind in self._kinds)

    def all_series(self) -> tuple[str, ...]:
        """Those of all views."""
        return tuple(name for view in range(view_count(self.view)) for name in self.series(view))

    def unpack(self, latents: Mapping[str, Tensor], view: int) -> dict[Target, Tensor]:
        """The targets [B, ...] of a view, float32, from what was read of its series."""
        return self.layout.unpack(dict(zip(self._kinds, (latents[name] for name in self.series(view)), strict=True)))

    def content_hash(self) -> str:
        """Of all that is read in any epoch."""
        return self.store.content_hash(self.all_series())


def open_targets(place: Path) -> StoredTargets:
    """The targets in a folder.

    Raises:
        StoreError: if there is no store.
        SpecError: if it is one of latents.
        IncompleteBuildError: if it was not finished.
        RecipeMismatchError: if its series are not of one model and one set of views.
    """
    store = open_store(place)
    recipes = {name: store.recipe(name) for name in store.modalities}
    if not recipes or any(recipe.source != SOURCE for recipe in recipes.values()):
        raise SpecError(
            f"`{place}` is no store of targets", hint="make one of a trained model with `dla train targets`"
        )
    first = next(iter(recipes.values()))
    facts, view = facts_in(store, first)
    for recipe in recipes.values():
        if facts_in(store, recipe) != (facts, view):
            raise RecipeMismatchError(
                f"`{place}` holds targets of more than one model or set of views",
                hint="make them again with `dla train targets`",
            )
    version = first.parameters["views_version"]
    if facts.sees_images and version != VIEWS_VERSION:
        raise RecipeMismatchError(
            f"`{place}` holds targets of views as version `{version}` drew them, this dla draws version"
            f" `{VIEWS_VERSION}`",
            hint="make them again with `dla train targets`, into a new folder",
        )
    shapes = {target: shape for recipe in recipes.values() for target, shape in shapes_in(recipe).items()}
    dtype = next(recipe.format.built_dtype for recipe in recipes.values() if recipe.format.kind == "continuous")
    layout = TargetLayout(shapes, int(first.parameters["top_logits"]) or None, dtype)
    wanted = {series.name for number in range(view_count(view)) for series in layout.series(number)}
    if wanted != recipes.keys():
        raise IncompleteBuildError(
            f"`{place}` lacks views: {name_some(sorted(wanted ^ recipes.keys()))}",
            hint="run `dla train targets` again; it goes on where it stopped",
        )
    return StoredTargets(store, facts, view, layout)


def in_words(images: ImageRecipe) -> str:
    """Which pictures of the images these are."""
    made = f", shorter side {images.size} pixels" if images.size is not None else ""
    return f"images as `{images.encoding}`{made}"


def check_targets(
    targets: StoredTargets, store: LatentStore, images: ImageRecipe, splits: Sequence[str], where: str
) -> None:
    """Refuses targets of other latents than a store holds, of other pictures, or that lack an image of training splits.

    Args:
        images: what the run decodes.

    Raises:
        RecipeMismatchError, SpecError: saying what differs.
    """
    facts = targets.facts
    for name, recipe_hash in facts.recipes.items():
        held = store.recipe(name) if name in store.modalities else None
        if held is not None and recipe_hash not in (held.hash, held.as_built.hash):
            raise RecipeMismatchError(
                f"the model of `{targets.store.place}` was shown another recipe of `{name}` than `{where}` holds",
                hint="name the store that the targets were made on, or make them again",
            )
    if facts.sees_images and facts.images != images:
        raise RecipeMismatchError(
            f"the model of `{targets.store.place}` was shown {in_words(facts.images)}, this run sees"
            f" {in_words(images)}",
            hint="with or without `images`, see the same as the targets were made on, or make them again",
        )
    rows = store.rows_of(splits)
    of_targets = targets.store.rows
    removed = [image_id for image_id in store.rows.ids_of(rows) if image_id in of_targets.removed_ids]
    if removed:
        raise SpecError(
            f"{len(removed)} images were removed from `{targets.store.place}` and not from `{where}`:"
            f" {name_some(removed)}",
            hint=f"remove them there, too: `dla cache takedown {where} --ids FILE`",
        )
    lacking = [image_id for image_id in store.rows.ids_of(rows) if image_id not in of_targets.row_by_id]
    if lacking:
        raise SpecError(
            f"`{targets.store.place}` has no target of {len(lacking)} of {len(rows)} images of"
            f" {name_some(splits)}: {name_some(lacking)}",
            hint="make targets of these splits, too: `dla train targets` with `splits`",
        )


def views_of_run(view: ViewConfig, *, is_said: bool, targets: StoredTargets) -> ViewConfig:
    """The views of a student that learns from stored targets: those that its model was asked about.

    Args:
        is_said: whether the run says anything of views.

    Raises:
        SpecError: if it says something else.
    """
    stored = targets.view
    if not targets.facts.sees_images:  # its answer is that of the latents, whatever the view
        return view
    if not is_said:
        return stored
    filled = view.model_copy(
        update={name: getattr(stored, name) for name in ("count", "seed") if getattr(view, name) is None}
    )
    differing = [name for name in ViewConfig.model_fields if getattr(filled, name) != getattr(stored, name)]
    if differing:
        name = differing[0]
        raise SpecError(
            f"`view.{name}` is `{getattr(filled, name)}`, the targets in `{targets.store.place}` are of views with"
            f" `{getattr(stored, name)}`",
            hint="leave `view` out to take theirs, or make targets of these views with `dla train targets`",
        )
    return filled
