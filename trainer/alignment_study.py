"""Whether students know what they never saw, from run folders and a store to numbers.

Dimensions: n images that probes are fitted on, N images measured.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dla_cache.errors import CheckpointError, SpecError, name_some
from dla_cache.store import LatentStore
from trainer.alignment import (
    ImageBootstrap,
    Parts,
    PreparedTarget,
    Table,
    Target,
    measure_block,
    prepare_targets,
)
from trainer.alignment_arms import AlignmentLine, DifferenceLine, MeasuredRun, differences, summarise
from trainer.alignment_features import (
    answers_of,
    image_span,
    latents_taught,
    other_draw,
    read_latents,
    scale_of,
)
from trainer.measure import check_fits
from trainer.roles import check_is_labelled
from trainer.run import load_run
from trainer.run_folder import read_config
from trainer.upbringing import TrainedRun

FEWEST_IMAGES = 50
"""Of either part, class means not counted."""


@dataclass(frozen=True, slots=True)
class AlignmentPlan:
    """What is measured of what."""

    arms: Mapping[str, Sequence[Path]]
    """Run folders of students; those of an arm differ in their seeds."""
    store: LatentStore
    images: Path | None
    """Folder that the image paths of the store are relative to; None for a store that holds the images itself."""
    fit_splits: tuple[str, ...]
    """Splits whose images probes are fitted on. Best are some that no arm learned from: features of images that a
    student was trained on differ from those of others."""
    splits: tuple[str, ...]
    """Splits whose images are measured."""
    modalities: tuple[str, ...]
    targets: Mapping[str, Path]
    """Run folders of teachers, probes or students whose answers are compared with as well."""
    controls: tuple[str, ...] = ()
    """Arms whose runs may be matched controls; none for all that never saw the modality."""
    other_draw: LatentStore | None = None
    """The same images and recipes with another seed, for the noise ceiling."""
    n_shuffles: int = 20
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Alignment:
    """What was found."""

    runs: tuple[MeasuredRun, ...]
    lines: tuple[AlignmentLine, ...]
    differences: tuple[DifferenceLine, ...]
    n_fit: int
    n_images: int


def measure_alignment(
    plan: AlignmentPlan, *, on_progress: Callable[[int, int, str], None] = lambda _done, _total, _note: None
) -> Alignment:
    """Every metric of every block of every run against every target.

    Args:
        on_progress: takes blocks done, blocks in all as far as is known, and what is under way.

    Raises:
        CheckpointError: if a run is no student's, not finished or not there.
        RecipeMismatchError: if a run has other classes than the store.
        MissingLatentError: if the store lacks a modality.
        SpecError: if there are too few images, an image has no label or several, the splits overlap, or a control saw
            what it is to be a control for.
        StoreError, ImageError: if a split has no image, or an image is missing.
    """
    fit_rows, rows = check_plan(plan)
    parts = Parts(labels_of(plan.store, fit_rows), labels_of(plan.store, rows))
    prepared = prepare_targets([*latent_targets(plan, fit_rows, rows), *answer_targets(plan)], parts)
    taught = what_was_taught(plan)
    check_controls(plan, prepared)
    bootstrap = ImageBootstrap(len(rows))
    members = [(arm, folder) for arm, folders in plan.arms.items() for folder in folders]
    runs: list[MeasuredRun] = []
    n_done = 0
    for number, (arm, folder) in enumerate(members):
        run = load_run(folder)
        check_fits(run, plan.store, plan.store.place)
        n_blocks = len(run.task.outline.names)
        n_total = n_done + n_blocks * (len(members) - number)

        def told(done: int, before: int = n_done, total: int = n_total, name: str = arm) -> None:
            on_progress(before + done, total, name)

        runs.append(measure_run(plan, arm, run, taught[arm], prepared, parts, bootstrap, told))
        n_done += n_blocks
    return Alignment(
        tuple(runs),
        tuple(summarise(runs, prepared, len(rows))),
        tuple(differences(runs, prepared, plan.controls)),
        len(fit_rows),
        len(rows),
    )


def measure_run(
    plan: AlignmentPlan,
    arm: str,
    run: TrainedRun,
    taught: frozenset[str],
    prepared: Sequence[PreparedTarget],
    parts: Parts,
    bootstrap: ImageBootstrap,
    on_block: Callable[[int], None],
) -> MeasuredRun:
    """One run of an arm, block by block."""
    span = image_span(run)
    fit, held = (
        answers_of(run, plan.store, plan.images, splits, spans=[span], device=plan.device)
        for splits in (plan.fit_splits, plan.splits)
    )
    found = []
    for number, name in enumerate(run.task.outline.names):
        table = Table(fit.means[name, span], held.means[name, span])
        found.append(measure_block(table, prepared, parts, bootstrap, plan.n_shuffles))
        on_block(number + 1)
    accuracy = float((held.logits.argmax(dim=1) == parts.labels).float().mean())
    return MeasuredRun(arm, str(run.folder), accuracy, taught, run.task.outline.names, tuple(found))


def what_was_taught(plan: AlignmentPlan) -> dict[str, frozenset[str]]:
    """Arm → the modalities that its runs, or what they learned from, saw.

    Raises:
        SpecError: if these differ among the runs of an arm.
        CheckpointError: if what a run learned from is not at hand, and may have learned from others.
    """
    taught = {}
    for arm, folders in plan.arms.items():
        of_runs = {folder: names_of(latents_taught(folder)) for folder in folders}
        taught[arm] = of_runs[folders[0]]
        other = [folder for folder, seen in of_runs.items() if seen != taught[arm]]
        if other:
            raise SpecError(
                f"runs of arm `{arm}` learned from different modalities: `{folders[0]}` and `{other[0]}`",
                hint="give each kind of run an arm of its own",
            )
    return taught


def names_of(latents: Iterable[tuple[str, str]]) -> frozenset[str]:
    """The modalities of latents that are named with their recipes."""
    return frozenset(name for name, _ in latents)


def check_controls(plan: AlignmentPlan, prepared: Sequence[PreparedTarget]) -> None:
    """Passes named controls that never saw the latents of a target.

    Latents of another recipe under the same name, such as shuffled ones, are no reason to refuse one.

    Raises:
        SpecError: naming the first that saw them.
    """
    recipes = {name: plan.store.recipe(name).hash for name in plan.store.modalities}
    for arm in plan.controls:
        seen = frozenset().union(*(latents_taught(folder) for folder in plan.arms[arm]))
        for one in prepared:
            if any((name, recipes.get(name)) in seen for name in one.target.modalities):
                raise SpecError(
                    f"arm `{arm}` is no control for `{one.target.name}`: it, or what it learned from, saw it",
                    hint="name students of images alone with `--control`, or ask for fewer modalities",
                )


def check_plan(plan: AlignmentPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that probes are fitted on and those that are measured, of a plan whose parts fit.

    Raises:
        CheckpointError, MissingLatentError, SpecError, StoreError: see `measure_alignment`.
    """
    for folder in [folder for folders in plan.arms.values() for folder in folders]:
        kind = read_config(folder).kind
        if kind != "student":
            raise CheckpointError(
                f"the run in `{folder}` is a {kind}, which sees latents: what it knows of them is no question",
                hint="name runs of students as arms; `--target NAME=RUN` compares them with a teacher or probe",
            )
    for modality in plan.modalities:
        plan.store.recipe(modality)
    plan.store.require_complete(plan.modalities)
    both = sorted(set(plan.splits) & set(plan.fit_splits))
    if both:
        raise SpecError(
            f"split {name_some(both)} would be fitted on and measured as well",
            hint="name another one with `--fit-split`",
        )
    unknown = [name for name in plan.controls if name not in plan.arms]
    if unknown:
        raise SpecError(f"`{unknown[0]}` is no arm", hint=f"the arms are {name_some([*plan.arms], shown=9)}")
    if plan.store.rows.is_multi_label:
        raise SpecError(
            f"`{plan.store.place}` has several labels an image: there is no class whose mean could be removed",
            hint="use a store with one class an image",
        )
    found = []
    for splits in (plan.fit_splits, plan.splits):
        rows = plan.store.rows_of(splits)
        check_is_labelled(
            plan.store, splits, name_some(splits), hint="name splits with labels: the mean of each class is removed"
        )
        n_classes = len(np.unique(plan.store.rows.label_numbers(rows)))
        if len(rows) - n_classes < FEWEST_IMAGES:
            raise SpecError(
                f"{name_some(splits)} has {len(rows)} images of {n_classes} classes, too few to say anything",
                hint=f"name splits with {FEWEST_IMAGES} images more than classes",
            )
        found.append(rows)
    return found[0], found[1]


def labels_of(store: LatentStore, rows: NDArray[np.int64]) -> torch.Tensor:
    """The class of each image, int64 [N]."""
    return torch.from_numpy(store.rows.label_numbers(rows).astype(np.int64))


def latent_targets(plan: AlignmentPlan, fit_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> list[Target]:
    """The latents of each modality, with a second draw of them where there is one."""
    targets = []
    for modality in plan.modalities:
        scale = scale_of(plan.store, modality, plan.fit_splits)
        fit, held = (read_latents(plan.store, modality, part, scale) for part in (fit_rows, rows))
        again = other_draw(plan.store, plan.other_draw, modality, rows, scale)
        targets.append(
            Target(
                modality,
                frozenset([modality]),
                Table(fit.flattened, held.flattened),
                Table(fit.pooled, held.pooled),
                again.flattened if again is not None else None,
                again.pooled if again is not None else None,
            )
        )
    return targets


def answer_targets(plan: AlignmentPlan) -> list[Target]:
    """What other models say of the images: their logits, and the means of their last block over each span."""
    targets = []
    for name, folder in plan.targets.items():
        run = load_run(folder)
        check_fits(run, plan.store, plan.store.place)
        fit, held = (
            answers_of(run, plan.store, plan.images, splits, last_block_only=True, device=plan.device)
            for splits in (plan.fit_splits, plan.splits)
        )
        seen = names_of(latents_taught(folder))
        targets.append(Target(f"{name}: logits", seen, Table(fit.logits, held.logits)))
        for (block, span), values in fit.means.items():
            targets.append(Target(f"{name}: {span}", seen, Table(values, held.means[block, span])))
    return targets
