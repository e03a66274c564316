"""A study from its plan to its folder: every run that is not there yet, then the files that its report is made of.

Legend of a study's folder:

    runs/<address>/      ordinary run folders
    targets/<address>/   what teachers said, and beside it `<address>.json` once it is whole
    logs/                what each worker said
    plan.json            the runs as far as they are known, for `dla study status`
    study/               spec.yaml, runs.csv, images.csv, selection.json
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dla_cache.errors import CheckpointError, LostProcessError, RunInUseError, TrainingError, WorkInterrupted
from dla_cache.spec import StrictModel
from trainer.checkpoint import write_atomically
from trainer.config import RunConfig
from trainer.pool import POLL_S, Tell, WorkerPool
from trainer.records import read_record
from trainer.run import train_run
from trainer.run_folder import RunResult, locked_run, read_result
from trainer.study_plan import Stage, StudyPlan, StudyState
from trainer.target_store import make_targets
from trainer.targets import TargetsConfig

PLAN_NAME = "plan.json"
FAILED_NAME = "failed.json"

LOCK_TIMEOUT_S = 120.0
"""How long a run waits for a worker of a killed study to leave its folder: those stop at their next step."""


class PlanLine(StrictModel):
    """A run as `plan.json` knows it."""

    key: str
    arm: str
    stage: Stage
    name: str
    learns_from: str | None
    """Address of what it learns from."""


class PlanRecord(StrictModel):
    """The runs of a study as far as they are known."""

    study: str
    is_whole: bool
    """Whether no more runs will be known once these are done."""
    runs: tuple[PlanLine, ...]


class TargetsRecord(StrictModel):
    """What is kept of targets that are whole."""

    seconds: float
    """That it took to make them, or the rest of them."""


class Failure(StrictModel):
    """How a run ended badly, in its folder until it is tried again."""

    message: str
    hint: str | None = None


RunStatus = Literal["done", "under way", "failed", "waiting"]


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does: a run, or the targets that runs need."""

    name: str
    work: RunConfig | TargetsConfig
    needs: tuple[str, ...]
    """Keys of the jobs that must be done before."""


def do_job(work: RunConfig | TargetsConfig, tell: Tell, should_stop: Callable[[], bool]) -> None:
    """Trains a run, or goes on with it; or makes targets. In one thread: two processes of one beat one of two."""
    torch.set_num_threads(1)
    if isinstance(work, RunConfig):
        until = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                train_run(work, resume=True, on_progress=lambda at: tell(at.step, at.steps), should_stop=should_stop)
                return
            except RunInUseError:
                if should_stop() or time.monotonic() > until:
                    raise
                time.sleep(POLL_S)
    report = make_targets(work, on_progress=tell, should_stop=should_stop)
    record = TargetsRecord(seconds=report.seconds)
    write_atomically(targets_record(Path(work.output)), record.model_dump_json().encode())


def targets_record(folder: Path) -> Path:
    """The file that says that stored targets are whole."""
    return folder.with_suffix(".json")


class StudyFolder:
    """What of a study is done, as its folder says."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.results: dict[str, RunResult] = {}

    def result(self, key: str) -> RunResult | None:
        """The result of a run; None if it is not done."""
        if key not in self.results and (self.plan.folder_of(key) / "result.json").exists():
            self.results[key] = read_result(self.plan.folder_of(key))
        return self.results.get(key)

    def validation(self, key: str) -> float | None:
        """Its validation score; None if it is not done."""
        result = self.result(key)
        return None if result is None else result.validation_score

    def is_done(self, key: str, job: Job) -> bool:
        """Whether nothing is left to do of a job."""
        if isinstance(job.work, RunConfig):
            return self.result(key) is not None
        return targets_record(Path(job.work.output)).exists()

    @property
    def is_whole(self) -> bool:
        """Whether every run of the study is done."""
        state = self.state()
        return state.is_whole and all(self.result(run.key) is not None for run in state.runs)

    def state(self) -> StudyState:
        """The runs that are known by now."""
        return self.plan.state(self.validation)


def run_study(
    folder: StudyFolder,
    *,
    n_processes: int = 1,
    pool: WorkerPool | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _note: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> StudyState:
    """Does every run of a study that is not done yet; tuning first, each after what it learns from.

    Whatever ends it, the same call goes on: finished runs stay, and those under way go on from their checkpoint.

    Args:
        pool: of workers that do jobs of studies, which outlives this one; `n_processes` of its own when None.
        on_progress: is told the runs done, those known by now, and what is under way.

    Raises:
        TrainingError: if a run fails, with its name and what it said.
        LostProcessError: if a run has killed two workers.
        WorkInterrupted: if `should_stop` said so; runs under way have made a checkpoint.
        StoreError: if the folder cannot be written.
    """
    plan = folder.plan
    own = nullcontext(pool) if pool is not None else WorkerPool(do_job, n_processes, plan.out / "logs")
    with own as pool:
        has_news = True
        while True:
            if has_news:
                state = folder.state()
                jobs = jobs_of(state)
                done = {key for key, job in jobs.items() if folder.is_done(key, job)}
                write_plan(plan, state)
                if state.is_whole and len(done) == len(jobs):  # the last score may have come between the two looks
                    on_progress(len(known := {run.key for run in state.runs}), len(known), "")
                    return state
            under_way = pool.under_way
            ready = [
                (key, job)
                for key, job in jobs.items()
                if key not in done and job.name not in under_way and done.issuperset(job.needs)
            ]
            for key, job in ready[: pool.n_idle]:
                failure_of(plan, key).unlink(missing_ok=True)
                pool.start(job.name, job.work)
            known = {run.key for run in state.runs}
            on_progress(len(done & known), len(known), note_of(pool.under_way))
            if should_stop():
                raise WorkInterrupted(
                    "interrupted; what was finished stays, and runs under way make a checkpoint",
                    hint="run the same command again; it goes on from there",
                )
            try:
                has_news = bool(pool.wait())
            except (TrainingError, LostProcessError) as error:
                failed = next(key for key, job in jobs.items() if job.name == pool.failed)
                arm = next(run.arm for run in state.runs if failed in (run.key, run.targets and run.targets.key))
                error.hint = in_the_spec(error.hint, plan.spec.tuned_as(arm))
                record = Failure(message=error.message, hint=error.hint)
                write_atomically(failure_of(plan, failed), record.model_dump_json().encode())
                raise


def jobs_of(state: StudyState) -> dict[str, Job]:
    """What is to be done for the runs that are known, by address: tuning first, since other runs wait for it."""
    jobs: dict[str, Job] = {}
    for run in sorted(state.runs, key=lambda run: run.stage == "final"):
        needs = tuple(one.key for one in run.all_upstream)
        if run.targets is not None:
            jobs.setdefault(run.targets.key, Job(f"targets for {run.name}", run.targets.config, needs))
            needs = (run.targets.key,)
        jobs.setdefault(run.key, Job(run.name, run.config, needs))
    return jobs


def in_the_spec(hint: str | None, arm: str) -> str | None:
    """A hint for one run, with the places of its fields in the spec of a study."""
    return None if hint is None else re.sub("--set ('?)", rf"--set \1arms.{arm}.run.", hint)


def note_of(under_way: Mapping[str, tuple[int, int]]) -> str:
    """What workers are at, in words."""
    return "; ".join(name + (f" {100 * done // total} %" if total else "") for name, (done, total) in under_way.items())


def failure_of(plan: StudyPlan, key: str) -> Path:
    """Where it stands that a run ended badly: beside its folder, which may not be there."""
    return plan.out / "runs" / f"{key}.{FAILED_NAME}"


def write_plan(plan: StudyPlan, state: StudyState) -> None:
    """Writes what `dla study status` goes by."""
    lines = tuple(
        PlanLine(
            key=run.key,
            arm=run.arm,
            stage=run.stage,
            name=run.name,
            learns_from=None if run.upstream is None else run.upstream.key,
        )
        for run in state.runs
    )
    record = PlanRecord(study=plan.spec.name, is_whole=state.is_whole, runs=lines)
    write_atomically(plan.out / PLAN_NAME, record.model_dump_json(indent=1).encode())


def run_statuses(out: Path) -> tuple[PlanRecord, dict[str, RunStatus], dict[str, Failure]]:
    """The plan of a study's folder, how each of its runs stands by address, and how those that failed did.

    Raises:
        CheckpointError: if there is no study, or its plan or a run's result is damaged.
    """
    if not (out / PLAN_NAME).exists():
        raise CheckpointError(f"`{out}` holds no study", hint="name the `--out` of a `dla study run`")
    plan = read_record(out / PLAN_NAME, PlanRecord)
    statuses: dict[str, RunStatus] = {}
    failures: dict[str, Failure] = {}
    for line in plan.runs:
        folder, failure = out / "runs" / line.key, out / "runs" / f"{line.key}.{FAILED_NAME}"
        if (folder / "result.json").exists():
            read_result(folder)
            statuses[line.key] = "done"
        elif failure.exists():
            statuses[line.key] = "failed"
            failures[line.key] = read_record(failure, Failure)
        else:
            statuses[line.key] = "under way" if is_trained_in(folder) else "waiting"
    return plan, statuses, failures


def is_trained_in(folder: Path) -> bool:
    """Whether some process trains in a folder now."""
    if not folder.exists():
        return False
    try:
        with locked_run(folder):
            return False
    except RunInUseError:
        return True
