"""Several runs side by side: each its own process with one thread, started when what it learns from is done."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dla_cache.errors import TrainingError, WorkInterrupted

if TYPE_CHECKING:
    from trainer.run_folder import RunResult

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of a comparison."""

    name: str
    run_file: Path
    folder: Path
    """Where the run lands; `result.json` in it means done."""
    steps: int
    learns_from: Path | None
    """Folder of the arm that must be done before."""


@dataclass(slots=True)
class RunningArm:
    """A process that trains an arm."""

    arm: Arm
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def run_arms(
    arms: Sequence[Arm],
    *,
    n_processes: int,
    on_progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
) -> list["RunResult"]:
    """Trains every arm that is not done yet, as `dla train RUN.yaml --resume`, and reads their results in order.

    One thread a process: at this size two processes beat two threads.

    Args:
        on_progress: is told the steps done, the steps in all, and the arms under way.

    Raises:
        TrainingError: if a run fails, with what it said.
        WorkInterrupted: if `should_stop` said so; the runs were asked to checkpoint and did.
    """
    from trainer.run_folder import read_result

    waiting = [arm for arm in arms if not (arm.folder / "result.json").exists()]
    done = {arm.folder for arm in arms} - {arm.folder for arm in waiting}
    running: list[RunningArm] = []
    steps_total = sum(arm.steps for arm in arms)
    try:
        while waiting or running:
            for arm in [arm for arm in waiting if arm.learns_from is None or arm.learns_from in done]:
                if len(running) < n_processes:
                    running.append(start_arm(arm))
                    waiting.remove(arm)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                if one.process.returncode != 0:
                    raise failed_arm(one)
                done.add(one.arm.folder)
            names = ", ".join(one.arm.name for one in running)
            steps_done = sum(arm.steps if arm.folder in done else steps_logged(arm) for arm in arms)
            on_progress(steps_done, steps_total, names)
            if should_stop():
                raise WorkInterrupted(
                    "training was interrupted", hint="run the same command again; it goes on from there"
                )
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.log.close()
    return [read_result(arm.folder) for arm in arms]


def start_arm(arm: Arm) -> RunningArm:
    """Starts `dla train` on the arm's run file; what it says goes to `train.log` in its folder."""
    arm.folder.mkdir(parents=True, exist_ok=True)
    log = (arm.folder / "train.log").open("wb")
    command = [sys.executable, "-m", "cli.main", "train", str(arm.run_file), "--resume", "--json"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=os.environ | threads,
        start_new_session=True,  # Ctrl-C reaches us alone, and we ask once: a second signal would kill unsaved work
    )
    return RunningArm(arm, process, log)


def failed_arm(one: RunningArm) -> TrainingError:
    """The error of a run that ended badly, with the end of what it said."""
    said = (one.arm.folder / "train.log").read_text(encoding="utf-8", errors="replace").strip()
    return TrainingError(
        f"run `{one.arm.name}` ended with exit code {one.process.returncode}: {said[-2000:]}",
        hint=f"run it alone: dla train {one.arm.run_file} --resume",
    )


def steps_logged(arm: Arm) -> int:
    """Steps that a run under way has logged."""
    path = arm.folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except json.JSONDecodeError:  # a line that is being written
        return 0


def plan_arms(
    described: Mapping[str, Mapping[str, Any]], folder: Path, *, store: Path, images: Path, seed: int, steps: int | None
) -> list[Arm]:
    """Writes a run file for each described run into `folder/specs`, to be looked at and repeated by hand.

    Args:
        described: name → fields over the embedded preset; `teacher` names another of them.
        steps: shortens every run; None leaves them as they are.
    """
    import yaml

    from trainer.config import merge, resolve_run

    specs, runs = folder / "specs", folder / "runs"
    specs.mkdir(parents=True, exist_ok=True)
    arms = []
    for name, fields in described.items():
        value: dict[str, Any] = {"preset": "embedded", "seed": seed, **fields}
        if steps is not None:
            value = merge(value, {"loop": {"steps": steps, "evaluate_steps": steps}})
        places = {"store": store, "images": images, "output": runs / name}
        if "teacher" in fields:
            places["teacher"] = runs / fields["teacher"]
        # Relative, so that the folder can be moved as a whole.
        value |= {field: os.path.relpath(place, specs) for field, place in places.items()}
        run_file = specs / f"{name}.yaml"
        run_file.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
        n_steps = resolve_run(value, base=specs, where=name).loop.steps
        arms.append(Arm(name, run_file, runs / name, n_steps, places.get("teacher")))
    return arms
