"""One training run from its config to its folder: config, data facts, metrics, weights, result."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from dla_cache.errors import SpecError
from dla_cache.spec import StrictModel, parse_spec
from dla_cache.store import LatentStore, open_store
from trainer.answers import ANSWERS_NAME, write_answers
from trainer.checkpoint import fitting, has_checkpoint, load_checkpoint, write_atomically
from trainer.classifiers import (
    ClassifierConfig,
    build_classifier,
    check_pretrained_pixels,
    load_classifier,
)
from trainer.config import RunConfig, config_class, folder_of
from trainer.data import PairSource, PixelScale, Role
from trainer.evaluate import Predictions, measure_branches, measure_subsets, name_subsets
from trainer.loop import Loop, LoopResult
from trainer.mixing import refuse_mixing
from trainer.objectives import Need, WeightedSum
from trainer.objectives.cross_entropy import balance_of
from trainer.probe import LatentProbe, ProbeConfig
from trainer.processes import Processes, open_processes
from trainer.progress import Progress
from trainer.reference import Reference
from trainer.roles import check_roles, labelled_ids, labelled_rows, training_statistics
from trainer.run_folder import (
    DataFacts,
    RunResult,
    begin_folder,
    begun_facts,
    check_same_run,
    identity_of,
    locked_run,
    read_config,
    read_facts,
    read_result,
)
from trainer.schedule import LoopConfig
from trainer.scores import Score, in_turn
from trainer.stored_targets import check_targets
from trainer.student import StudentConfig, build_student, export_student
from trainer.tasks import ClassifierTask, ProbeTask, StudentTask, TeacherTask
from trainer.teacher import Teacher, TeacherConfig
from trainer.tracking import Trackers, check_trackers
from trainer.upbringing import TrainedRun, Upbringing, check_same_pixels, data_facts, taught_by, taught_by_targets
from trainer.watch import mean_shares, nearly_inert

EVALUATION_BATCH_SIZE = 256


def train_run(
    config: RunConfig,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Trains what `config` says, keeps what validation chooses, and then reads the test split once.

    A finished run is returned as it stands. Resuming continues bitwise where the last checkpoint was. All processes
    that a launcher has started call this alike and get the same result; the first alone writes.

    Raises:
        CheckpointError: if another process trains in the folder, it holds another run, or one that was begun and
            `resume` is not set.
        RecipeMismatchError: if the teacher was trained on other latents than the store holds, or the run to resume on
            other data.
        StoreError, SpecError: if a role has no image, or an image without the label that it needs.
        DeadLossError, TrainingError, WorkInterrupted: see the loop.
        MissingDependencyError: if a tracker is not installed.
        LostProcessError: if another process of the run has died.
    """
    folder = Path(config.output)
    check_trackers(config.loop.trackers)
    with open_processes(config.loop, config.device, folder / "logs") as processes, ExitStack() as held:
        processes.from_first(lambda: held.enter_context(locked_run(folder)))
        return _train_locked(config, processes, resume=resume, on_progress=on_progress, should_stop=should_stop)


def _train_locked(
    config: RunConfig,
    processes: Processes,
    *,
    resume: bool,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> RunResult:
    folder, asked_device = Path(config.output), config.device
    config = config.model_copy(update={"device": processes.device(asked_device)})
    begun = processes.from_first(lambda: begun_facts(folder, resume=resume))
    store = open_store(config.store)
    upbringing = open_upbringing(config, store)
    config = upbringing.config
    facts = data_facts(config, store, upbringing, begun)
    check_one_run(processes, config, facts)
    if begun is not None:
        check_same_run(folder, config, begun, facts)
        if processes.from_first((folder / "result.json").exists):
            return read_result(folder)
    check_parts(config, facts, store, upbringing)
    task = initial_task(config, facts, upbringing, store)

    reads_latents = config.objective is not None and bool(config.objective.modalities)
    pairs = PairSource(
        store,
        folder_of(config.images),
        image_size=config.image_size,
        pixel_scale=PixelScale(config.pixel_mean, config.pixel_std),
        modalities=latents_read(config, facts, upbringing),
        view=config.view,
        seed=config.seed,
        device=config.device,
        sees_images=config.kind != "probe",
        latents_follow_views=upbringing.facts is None or upbringing.facts.sees_images or reads_latents,
        targets=upbringing.targets,
        mixing=config.mixing,
        share=processes.share,
        threads=config.threads,
    )
    roles = [Role(config.roles.labelled, config.labelled_per_batch, image_ids=labelled_ids(config, store))]
    if config.roles.transfer:
        roles.append(Role(config.roles.transfer, config.transfer_per_batch, labels_hidden=True))
    validation = pairs.evaluation(Role(config.roles.validation, EVALUATION_BATCH_SIZE), facts.modalities)

    def evaluate() -> dict[str, float]:
        measured = measure_branches(task, validation, processes.gather)
        scores = {name: score.value for name, score in measured.items()}
        return {"selection": next(iter(scores.values())), **scores}

    training = pairs.training(roles, config.loop.accumulation)
    with closing(training(0)) as stream:
        first = next(stream)
        if isinstance(task, StudentTask):
            task.check_batch(first)
        position_to_content = task.position_to_content(first)
    trackers = Trackers(processes.accelerator, folder / "logs", config.model_dump(mode="json"), config.images_per_step)
    loop = Loop(task, resolve_loop(config, store), folder, seed=config.seed, processes=processes, log=trackers.log)
    if begun is None:
        # Now that all parts fit: one begun for a run that cannot start would stand in the way of the corrected run.
        asked = config.model_copy(update={"device": asked_device})
        processes.from_first(lambda: begin_folder(folder, asked, facts))
    elif processes.from_first(lambda: has_checkpoint(folder)):
        loop.resume()
    done = loop.run(
        training,
        evaluate,
        on_progress=on_progress,
        should_stop=should_stop,
        hint_to_resume="run the same command with `--resume`",
    )

    processes.wait()  # for the first to have written the best
    load_best(folder, task)
    test: dict[str, Score] = {}
    if config.roles.test:
        test_batches = pairs.evaluation(Role(config.roles.test, EVALUATION_BATCH_SIZE), facts.modalities)
        answers: list[Predictions] = []
        test = measure_branches(task, test_batches, processes.gather, answers)
        if not isinstance(task, StudentTask):
            test |= name_subsets(task, measure_subsets(task, test_batches, processes.gather))
        gathered = in_turn(processes.gather(answers))
        processes.from_first(lambda: write_answers(folder / ANSWERS_NAME, gathered))
    kept = task.student if isinstance(task, StudentTask) else task.module
    shares = mean_shares(record["gradient_shares"] for record in loop.metrics)
    more = {
        "position_to_content": position_to_content,
        "gradient_shares": shares,
        "inert": nearly_inert(shares),
        "parameters": sum(parameter.numel() for parameter in kept.parameters()),
    }
    result = result_of(config, facts, done, test, more, n_steps=loop.step)
    if isinstance(task, StudentTask) and processes.is_first:
        scale = PixelScale(config.pixel_mean, config.pixel_std)
        export_student(
            task.student,
            folder / "student",
            class_names=facts.class_names,
            is_multi_label=facts.is_multi_label,
            image_size=config.image_size,
            pixel_scale=scale,
        )
    if processes.is_first:
        write_atomically(folder / "result.json", result.model_dump_json(indent=1).encode())
    return processes.from_first(lambda: result)


def check_one_run(processes: Processes, config: RunConfig, facts: DataFacts) -> None:
    """Passes processes that were all started with the same run and see the same data.

    Raises:
        SpecError: naming what differs, in all of them: they would train one model on a mixture of runs.
    """
    seen = processes.gather(identity_of(config) | {"data": facts.model_dump(mode="json")})
    differing = [name for name in seen[0] if any(one[name] != seen[0][name] for one in seen)]
    if differing:
        raise SpecError(
            f"the processes of this run were started with different {', '.join(f'`{name}`' for name in differing)}",
            hint="start all of them with the same run file, settings and data",
        )


def result_of(
    config: RunConfig,
    facts: DataFacts,
    done: LoopResult,
    test: Mapping[str, Score],
    more: Mapping[str, Any],
    *,
    n_steps: int,
) -> RunResult:
    """What a run says of itself at its end.

    Args:
        test: by name, the answer of the model first, then its parts; empty if no test split was read.
        more: fields that say nothing of the test split.
    """
    intervals = {name: score.interval() for name, score in test.items()}
    answer, (low, high) = next(iter(test.values()), None), next(iter(intervals.values()), (None, None))
    return RunResult(
        kind=config.kind,
        metric="mAP" if facts.is_multi_label else "top-1",
        seed=config.seed,
        best_step=done.best_step,
        validation_score=done.best_metrics["selection"],
        test_score=None if answer is None else answer.value,
        test_low=low,
        test_high=high,
        test_images=0 if answer is None else answer.n,
        branches={name: score.value for name, score in test.items()},
        branch_intervals=intervals,
        **more,
        train_seconds=done.train_seconds,
        images_per_s=n_steps * config.images_per_step / done.train_seconds if n_steps else 0.0,
    )


def check_parts(config: RunConfig, facts: DataFacts, store: LatentStore, upbringing: Upbringing) -> None:
    """Looks at all that must fit together before anything is built or written.

    Raises:
        SpecError, RecipeMismatchError: saying what does not.
    """
    check_roles(config, store)
    if upbringing.facts is not None:
        check_same_pixels(config, upbringing.facts, upbringing.place)
    check_pretrained_pixels(config.model, config.pixel_mean, config.pixel_std)
    if upbringing.targets is not None:
        check_targets(upbringing.targets, store, facts.images, config.training_splits, config.store)
    read = latents_read(config, facts, upbringing)
    refuse_mixing(config, reference_sees_latents=bool(read), has_stored_targets=upbringing.targets is not None)


def latents_read(config: RunConfig, facts: DataFacts, upbringing: Upbringing) -> tuple[str, ...]:
    """The modalities that training needs: the model's own; or those of what a student learns from, and of its
    objectives."""
    of_objectives = config.objective.modalities if config.objective is not None else ()
    return tuple(dict.fromkeys((*facts.modalities, *upbringing.latents, *of_objectives)))


def initial_task(
    config: RunConfig, facts: DataFacts, upbringing: Upbringing, store: LatentStore
) -> ProbeTask | TeacherTask | StudentTask:
    """The task of a run at its first step: initialised from the run's seed, pretrained parts loaded, on its device."""
    torch.manual_seed(config.seed)
    task = build_task(config, facts, upbringing.reference)
    if isinstance(task, TeacherTask):
        task.module.load_backbone()
    elif isinstance(task, StudentTask):
        load_classifier(task.student, model_config(config, facts))
    set_statistics(task, config, facts, store)
    task.module.to(config.device)
    return task


def open_upbringing(config: RunConfig, store: LatentStore) -> Upbringing:
    """What a run learns from beside labels, opened.

    Raises:
        CheckpointError, StoreError: if the teacher or its targets are not there.
        SpecError: see `taught_by_targets`.
    """
    if config.teacher is not None:
        return taught_by(load_run(Path(config.teacher)), config, store)
    if config.targets is not None:
        return taught_by_targets(config, Path(config.targets))
    return Upbringing(config)


def load_run(folder: Path) -> TrainedRun:
    """A finished run with its kept weights, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: if the folder is no run, or the run is not finished.
    """
    config = read_config(folder)
    read_result(folder)
    facts = read_facts(folder)
    task = build_task(config, facts, None)
    load_best(folder, task)
    task.module.eval()
    with (folder / "best.safetensors").open("rb") as file:
        weights_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return TrainedRun(folder, config, facts, task, weights_sha256)


def load_best(folder: Path, task: ClassifierTask) -> None:
    """Gives a task the kept weights of a run.

    Raises:
        CheckpointError: if they are missing, damaged, or of another model.
    """
    path = folder / "best.safetensors"
    tensors, _ = load_checkpoint(path)
    # A student's throw-away heads are in its checkpoint; where it is not trained, nothing wants them.
    task.module.load_state_dict(fitting(tensors, task.module.state_dict(), path))


def build_task(
    config: RunConfig, facts: DataFacts, reference: Reference | None
) -> ProbeTask | TeacherTask | StudentTask:
    """The freshly initialised task of a run; a student without the `reference` that it learned from comes without its
    objectives, to be used."""
    model = model_config(config, facts)
    balance = balance_of(config.ce, facts.class_counts, facts.n_labelled, is_multi_label=facts.is_multi_label)
    if isinstance(model, ProbeConfig):
        return ProbeTask(LatentProbe(model), config.self_training, balance)
    if isinstance(model, TeacherConfig):
        return TeacherTask(Teacher(model, facts.pretrained), config.self_training, balance)
    if isinstance(model, ClassifierConfig):
        student = build_classifier(model, facts.pretrained)
    else:
        assert isinstance(model, StudentConfig)
        student = build_student(model)
    assert config.objective is not None
    is_alone = reference is None and Need.REFERENCE in config.objective.needs
    objective = None if is_alone else config.objective
    return StudentTask(
        student,
        objective,
        reference,
        balance,
        formats=facts.formats,
        n_images=facts.n_images,
        is_multi_label=facts.is_multi_label,
    )


def model_config(config: RunConfig, facts: DataFacts) -> StrictModel:
    """The model's own config: what the run says, and what its data decide."""
    derived: dict[str, Any] = {
        "n_classes": len(facts.class_names),
        "image_size": config.image_size,
        "formats": facts.formats,
        "modalities": facts.modalities,
    }
    model = config_class(config.kind, config.model)
    fields = config.model | {name: value for name, value in derived.items() if name in model.model_fields}
    return parse_spec(fields, model, where="model")


def set_statistics(task: ClassifierTask, config: RunConfig, facts: DataFacts, store: LatentStore) -> None:
    """Hands a standardising model, or the objectives of a student, the statistics of the training splits."""
    model = task.objectives if isinstance(task, StudentTask) else task.module
    if not isinstance(model, LatentProbe | WeightedSum) and not (
        isinstance(model, Teacher) and model.config.standardise
    ):
        return
    for name in facts.formats:
        if facts.formats[name].kind == "continuous":
            statistics = training_statistics(config, store, name)
            model.set_statistics(name, torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std))


def resolve_loop(config: RunConfig, store: LatentStore) -> LoopConfig:
    """The loop's config, with `epochs` turned into steps of the largest role."""
    if config.epochs is None:
        return config.loop
    labelled = len(labelled_rows(config, store)) // config.labelled_per_batch
    transfer = len(store.rows_of(config.roles.transfer)) // max(1, config.transfer_per_batch)
    epoch = max(1, labelled, transfer)
    return config.loop.model_copy(update={"steps": config.epochs * epoch, "schedule_steps": epoch})
