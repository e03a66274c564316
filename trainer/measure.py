"""A finished run measured on some splits of a store, whatever it was trained on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dla_cache.errors import RecipeMismatchError, name_some
from dla_cache.store import LatentStore
from trainer.batch import Batch
from trainer.data import PairSource, PixelScale, Role
from trainer.evaluate import Predictions, measure_subsets, predict
from trainer.roles import check_is_labelled
from trainer.run import EVALUATION_BATCH_SIZE
from trainer.run_folder import digest_of_rows
from trainer.scores import Score
from trainer.tasks import StudentTask
from trainer.upbringing import TrainedRun


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a run says of some labelled images."""

    predictions: Predictions
    subsets: dict[tuple[str, ...], Score]
    """The score with no other modality than these, from none to all; empty for a student."""
    is_own_data: bool
    """Whether the store has the images, splits and labels that the run was trained beside."""


def pairs_of(run: TrainedRun, store: LatentStore, images: Path | None, device: str) -> PairSource:
    """The pairs of a store as a run sees them."""
    config = run.config
    return PairSource(
        store,
        images,
        image_size=config.image_size,
        pixel_scale=PixelScale(config.pixel_mean, config.pixel_std),
        modalities=run.facts.modalities,
        view=config.view,
        seed=config.seed,
        device=device,
        sees_images=config.kind != "probe",
    )


def measure_run(
    run: TrainedRun,
    store: LatentStore,
    images: Path | None,
    splits: Sequence[str],
    *,
    where: str,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Measurement:
    """What the run answers to the images of `splits`, and what it owes to each modality.

    Args:
        images: folder that the image paths of the store are relative to; None for a store that holds the images itself.
        where: the store's name, for messages.
        on_progress: takes images done and in all; a model of latents goes through them twice.

    Raises:
        RecipeMismatchError: if the store has other classes or latents of another recipe than the run was trained on.
        SpecError: if an image has no label, or none has any of several classes.
        StoreError: if a split has no image, or a modality is not whole.
        ImageError: if an image is missing or has changed.
    """
    check_fits(run, store, where)
    check_is_labelled(
        store, splits, name_some(splits), hint="name another split; `dla predict` answers for images without a label"
    )
    run.task.module.to(device)
    modalities = run.facts.modalities
    pairs = pairs_of(run, store, images, device)
    batches = pairs.evaluation(Role(tuple(splits), EVALUATION_BATCH_SIZE), modalities)
    total, done = len(store.rows_of(splits)) * (1 if isinstance(run.task, StudentTask) else 2), 0

    def counted() -> Iterator[Batch]:
        nonlocal done
        for batch in batches():
            yield batch
            done += len(batch)
            on_progress(done, total)

    predictions = predict(run.task, counted)
    subsets = {} if isinstance(run.task, StudentTask) else measure_subsets(run.task, counted)
    return Measurement(predictions, subsets, digest_of_rows(store) == run.facts.rows_sha256)


def check_fits(run: TrainedRun, store: LatentStore, where: str) -> None:
    """Refuses a store whose labels or latents mean something else than those the run was trained on.

    Raises:
        RecipeMismatchError: saying what differs.
    """
    if store.rows.is_multi_label != run.facts.is_multi_label:
        kinds = ["one class an image", "several labels an image"]
        raise RecipeMismatchError(
            f"`{where}` has {kinds[store.rows.is_multi_label]}, the run in `{run.folder}` was trained on"
            f" {kinds[run.facts.is_multi_label]}",
            hint="name a store whose labels are of the run's kind",
        )
    if tuple(store.class_names) != run.facts.class_names:
        raise RecipeMismatchError(
            f"`{where}` and the run in `{run.folder}` have different class maps",
            hint="name a store whose manifest was made with the run's class map",
        )
    held = {name: store.recipe(name).hash for name in store.modalities}
    for name in run.facts.modalities:
        if name not in held:
            raise RecipeMismatchError(
                f"`{where}` has no `{name}`, which the run in `{run.folder}` looks at",
                hint="name a store that has it; a student needs no latents",
            )
        if held[name] != run.facts.recipes[name]:
            raise RecipeMismatchError(
                f"the run in `{run.folder}` was trained on another recipe of `{name}` than `{where}` holds",
                hint="name the store it was trained on, or one built from the same cache spec",
            )
