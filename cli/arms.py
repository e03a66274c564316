"""Several runs side by side: each its own process with one thread, started when what it learns from is done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dla_cache.durable import writing_to
from dla_cache.errors import CheckpointError, TrainingError, WorkInterrupted, name_some

if TYPE_CHECKING:
    from trainer.config import RunConfig
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
    log_start: int
    """Size in bytes of what earlier attempts left in the log."""


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
                    stop_if(should_stop)  # whoever asked us may have asked the run, too: then it has not failed
                    raise failed_arm(one)
                done.add(one.arm.folder)
            names = ", ".join(one.arm.name for one in running)
            steps_done = sum(arm.steps if arm.folder in done else steps_logged(arm) for arm in arms)
            on_progress(steps_done, steps_total, names)
            stop_if(should_stop)
            time.sleep(POLL_S)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.log.close()
    from trainer.run_folder import read_result

    return [read_result(arm.folder) for arm in arms]


def start_arm(arm: Arm) -> RunningArm:
    """Starts `dla train` on the arm's run file; what it says goes to `train.log` in its folder."""
    with writing_to(arm.folder):
        arm.folder.mkdir(parents=True, exist_ok=True)
        log = (arm.folder / "train.log").open("ab")  # not from its start: another process may still write to it
    log_start = log.tell()
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
    return RunningArm(arm, process, log, log_start)


def stop_if(should_stop: Callable[[], bool]) -> None:
    """Passes on, unless somebody has asked for an end of work that the same command continues.

    Raises:
        WorkInterrupted: if so.
    """
    if should_stop():
        raise WorkInterrupted(
            "interrupted; what was finished stays", hint="run the same command again; it goes on from there"
        )


def failed_arm(one: RunningArm) -> TrainingError:
    """The error of a run that ended badly: the error that it ended with, or else its last words."""
    path = one.arm.folder / "train.log"
    said = path.read_bytes()[one.log_start :].decode(errors="replace").strip()
    command = f"dla train {one.arm.run_file} --resume"
    *_, error = re.split("^error: ", said, flags=re.MULTILINE)
    if error != said:
        message, _, hint = error.partition("\nhint: ")
        return TrainingError(
            f"run `{one.arm.name}`: {message}", hint=f"{hint or 'try it alone'} (the run is `{command}`)"
        )
    code = one.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = f": {said.splitlines()[-1][:500]}" if said else ""
    return TrainingError(
        f"run `{one.arm.name}` {how}{last}", hint=f"`{path}` has all that it said; run it alone: {command}"
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

    Raises:
        CheckpointError: if a run was begun with other settings; then nothing is written.
        StoreError: if the run files cannot be written.
    """
    import yaml

    from trainer.config import merge, resolve_run

    specs, runs = folder / "specs", folder / "runs"
    arms, contents, configs = [], [], []
    for name, fields in described.items():
        value: dict[str, Any] = {"preset": "embedded", "seed": seed, **fields}
        if steps is not None:
            value = merge(value, {"loop": {"steps": steps, "evaluate_steps": steps}})
        places = {"store": store, "images": images, "output": runs / name}
        if "teacher" in fields:
            places["teacher"] = runs / fields["teacher"]
        # Relative, so that the folder can be moved as a whole.
        value |= {field: os.path.relpath(place, specs) for field, place in places.items()}
        config = resolve_run(value, base=specs, where=name)
        arms.append(Arm(name, specs / f"{name}.yaml", runs / name, config.loop.steps, places.get("teacher")))
        contents.append(yaml.safe_dump(value, sort_keys=False))
        configs.append(config)
    check_begun_arms(arms, configs)
    with writing_to(specs):
        specs.mkdir(parents=True, exist_ok=True)
        for arm, content in zip(arms, contents, strict=True):
            arm.run_file.write_text(content, encoding="utf-8")
    return arms


def check_begun_arms(arms: Sequence[Arm], configs: Sequence["RunConfig"]) -> None:
    """Passes arms that are not begun yet, or were begun with these very settings.

    A finished arm is taken as it stands, so without this its result would be shown for settings it never had.

    Raises:
        CheckpointError: naming the folders, and what differs in the first of them.
    """
    from trainer.run_folder import read_config

    differing: dict[str, str] = {}
    for arm, config in zip(arms, configs, strict=True):
        if (arm.folder / "config.yaml").exists():
            there, here = settings_of(read_config(arm.folder)), settings_of(config)
            differences = [
                f"`{name}` is {there.get(name)} there, {here.get(name)} here"
                for name in here | there
                if there.get(name) != here.get(name)
            ]
            if differences:
                more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
                differing[str(arm.folder)] = "; ".join(differences[:3]) + more
    if differing:
        raise CheckpointError(
            f"{name_some([*differing])} hold{'s' * (len(differing) == 1)} a run with other settings: "
            + next(iter(differing.values())),
            hint=f"choose another `--out`, or remove {'that folder' if len(differing) == 1 else 'those folders'}",
        )


def settings_of(config: "RunConfig") -> dict[str, Any]:
    """Dotted name → value of all that makes a run what it is: not where things lie, nor the device."""
    from trainer.config import PLACES

    def flatten(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, part in value.items():
            if isinstance(part, Mapping):
                yield from flatten(part, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", part

    return dict(flatten(config.model_dump(mode="json", exclude={*PLACES, "device"}), ""))
