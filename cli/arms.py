"""Several runs side by side, in processes of one thread each; every one starts when what it learns from is done."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_cache.durable import writing_to
from dla_cache.errors import CheckpointError, WorkInterrupted, name_some

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.run_folder import RunResult


@dataclass(frozen=True, slots=True)
class Arm:
    """One run of a comparison."""

    name: str
    run_file: Path
    folder: Path
    """Where the run lands; `result.json` in it means done."""
    config: "RunConfig"
    learns_from: Path | None
    """Folder of the arm that must be done before."""


def run_arms(
    arms: Sequence[Arm],
    *,
    logs: Path,
    n_processes: int,
    on_progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
) -> list["RunResult"]:
    """Trains every arm that is not done yet, as `dla train RUN.yaml --resume`, and reads their results in order.

    One thread a process: at this size two processes beat two threads.

    Args:
        logs: folder for what each process says.
        on_progress: is told the steps done, the steps in all, and the arms under way.

    Raises:
        TrainingError: if a run fails, with what it said.
        LostProcessError: if a run has killed two processes.
        WorkInterrupted: if `should_stop` said so; the runs were asked to checkpoint and did.
    """
    from trainer.pool import WorkerPool
    from trainer.run_folder import read_result
    from trainer.study import do_job

    waiting = [arm for arm in arms if not (arm.folder / "result.json").exists()]
    done = {arm.folder for arm in arms} - {arm.folder for arm in waiting}
    by_name = {str(arm.run_file): arm for arm in arms}
    steps_total = sum(arm.config.loop.steps for arm in arms)
    with WorkerPool(do_job, n_processes, logs) as pool:
        while waiting or pool.under_way:
            ready = [arm for arm in waiting if arm.learns_from is None or arm.learns_from in done]
            for arm in ready[: pool.n_idle]:
                pool.start(str(arm.run_file), arm.config)
                waiting.remove(arm)
            stop_if(should_stop)
            done.update(by_name[name].folder for name in pool.wait())
            steps_done = sum(arm.config.loop.steps for arm in arms if arm.folder in done)
            note = ", ".join(by_name[name].name for name in pool.under_way)
            on_progress(steps_done + sum(steps for steps, _ in pool.under_way.values()), steps_total, note)
    return [read_result(arm.folder) for arm in arms]


def stop_if(should_stop: Callable[[], bool]) -> None:
    """Passes on, unless somebody has asked for an end of work that the same command continues.

    Raises:
        WorkInterrupted: if so.
    """
    if should_stop():
        raise WorkInterrupted(
            "interrupted; what was finished stays", hint="run the same command again; it goes on from there"
        )


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
    arms, contents = [], []
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
        arms.append(Arm(name, specs / f"{name}.yaml", runs / name, config, places.get("teacher")))
        contents.append(yaml.safe_dump(value, sort_keys=False))
    check_begun_arms(arms)
    with writing_to(specs):
        specs.mkdir(parents=True, exist_ok=True)
        for arm, content in zip(arms, contents, strict=True):
            arm.run_file.write_text(content, encoding="utf-8")
    return arms


def check_begun_arms(arms: Sequence[Arm]) -> None:
    """Passes arms that are not begun yet, or were begun with these very settings.

    A finished arm is taken as it stands, so without this its result would be shown for settings it never had.

    Raises:
        CheckpointError: naming the folders, and what differs in the first of them.
    """
    from trainer.run_folder import read_config

    differing: dict[str, str] = {}
    for arm in arms:
        if (arm.folder / "config.yaml").exists():
            there, here = settings_of(read_config(arm.folder)), settings_of(arm.config)
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
