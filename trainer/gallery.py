"""What students see of a modality that they never saw: the latent that a linear probe reads off their features.

Nothing is decoded here; who holds a decoder does that with the latents that come out.

Dimensions: n images that probes are fitted on, G images shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.alignment import Parts, Shuffle
from trainer.alignment_features import answers_of, image_span
from trainer.alignment_probes import RidgeFeatures, r_squared
from trainer.alignment_study import AlignmentPlan, labels_of
from trainer.run import load_run

GALLERY_IMAGES = 8


@dataclass(frozen=True, slots=True)
class SeenLatents:
    """Raw latents of some images as one arm's features say them."""

    arm: str
    run: str
    """Folder of the arm's first run."""
    block_name: str
    """Of the features: the block from which the fitted images foretell the best R²."""
    r2: float
    """On all measured images, of the raw latents."""
    latents: NDArray[np.float32]
    """[G, *shape]."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Some measured images, their latents, and what each arm makes of them."""

    modality: str
    image_ids: tuple[str, ...]
    labels: tuple[str, ...]
    truth: NDArray[np.float32]
    """[G, *shape], what the generator said, raw."""
    seen: tuple[SeenLatents, ...]
    null: SeenLatents
    """Of the first arm, by a probe fitted on latents shuffled within each class: what the class alone gives."""


def show_gallery(plan: AlignmentPlan, modality: str, *, n_images: int = GALLERY_IMAGES) -> Gallery:
    """The latents of a continuous modality as the first run of each arm sees them.

    Images are drawn from a fixed seed, one of each class as long as there are classes.
    """
    fit_rows, rows = plan.store.rows_of(plan.fit_splits), plan.store.rows_of(plan.splits)
    parts = Parts(labels_of(plan.store, fit_rows), labels_of(plan.store, rows))
    fit_latents, latents = (
        torch.from_numpy(np.asarray(_one_draw(plan, modality, part), np.float32)) for part in (fit_rows, rows)
    )
    shape = latents.shape[1:]
    chosen = choose_images(parts.labels, n_images)
    order = Shuffle.of(parts, torch.zeros(0, dtype=torch.int64), seed=0).fit
    seen, null = [], None
    for arm, folders in plan.arms.items():
        of_blocks = _coordinates(plan, folders[0])
        probes = {name: ridge.fit(fit_latents.flatten(1)) for name, (ridge, _) in of_blocks.items()}
        best = max(probes, key=lambda name: probes[name].expected_r2)
        ridge, coordinates = of_blocks[best]
        fitted = {arm: probes[best]}
        if null is None:
            fitted["null"] = ridge.fit(fit_latents.flatten(1)[order])
        for name, probe in fitted.items():
            predicted = probe.predict(coordinates)
            r2 = r_squared(predicted, latents.flatten(1)).value
            shown = predicted[chosen].reshape(-1, *shape).float().numpy()
            one = SeenLatents(name, str(folders[0]), best, r2, shown)
            if name == arm:
                seen.append(one)
            else:
                null = one
    assert null is not None
    shown_rows = rows[chosen.numpy()]
    names = plan.store.class_names
    return Gallery(
        modality,
        plan.store.rows.ids_of(shown_rows),
        tuple(names[label] for label in parts.labels[chosen].tolist()),
        latents[chosen].numpy(),
        tuple(seen),
        null,
    )


def _one_draw(plan: AlignmentPlan, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
    values = plan.store.read(modality, rows)
    return values[:, 0] if plan.store.recipe(modality).format.axes[:1] == ("draw",) else values


def _coordinates(plan: AlignmentPlan, folder: Path) -> Mapping[str, tuple[RidgeFeatures, torch.Tensor]]:
    """Of each block by its name: what probes are fitted on, and the coordinates of the measured images."""
    run = load_run(folder)
    span = image_span(run)
    fit, held = (
        answers_of(run, plan.store, plan.images, splits, spans=[span], device=plan.device)
        for splits in (plan.fit_splits, plan.splits)
    )
    found = {}
    for name in run.task.outline.names:
        ridge = RidgeFeatures.of(fit.means[name, span])
        found[name] = (ridge, ridge.coordinates(held.means[name, span]))
    return found


def choose_images(labels: torch.Tensor, n_images: int) -> torch.Tensor:
    """Places of images, int64: the first of each class in a fixed random order, class by class, then the second."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    turns: dict[int, int] = {}
    ranked = []
    for place in order:
        label = int(labels[place])
        turns[label] = turns.get(label, 0) + 1
        ranked.append((turns[label], label, place))
    return torch.tensor([place for _, _, place in sorted(ranked)[:n_images]])
