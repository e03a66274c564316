"""What `dla study run --dry-run` says: every arm, its runs and whom it learns from, and the time if some is known."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer

from cli.render import counted, print_table

if TYPE_CHECKING:
    from trainer.study_plan import StudyPlan


def show_plan(plan: "StudyPlan", out: Path, n_processes: int, *, as_json: bool) -> None:
    """Prints the runs of a study whose stores need not be there.

    Args:
        out: folder of the study; runs that are done there tell the time.
    """
    rows = plan_rows(plan)
    n_runs = len({key for row in rows for key in row.pop("keys")})
    tuned = [name for name, arm in plan.spec.arms.items() if any(axis.extend for axis in arm.tune.values())]
    more = len(tuned) * plan.spec.tuning.extensions * len(plan.spec.tuning.all_seeds)
    seconds = estimated_seconds(rows, out)
    if as_json:
        facts = {"study": plan.spec.name, "runs": n_runs, "at_most_more": more, "seconds": seconds}
        typer.echo(json.dumps({**facts, "processes": n_processes, "arms": rows}))
        return
    columns = ("arm", "kind", "learns from", "store", "tuning runs", "final runs", "steps a run")
    cells = ("arm", "kind", "learns_from", "store", "tuning_runs", "final_runs", "length")
    print_table(columns, [["-" if row[cell] is None else row[cell] for cell in cells] for row in rows])
    extra = f", and up to {more} more where the best setting lies at an edge" if more else ""
    typer.echo(f"{counted(n_runs, 'run')} in all{extra}; runs that arms have in common count once")
    if seconds is None:
        typer.echo("no run is done yet that would tell the time")
    else:
        typer.echo(f"about {seconds / n_processes / 60:.1f} minutes of training on {n_processes} processes, all of it")


def plan_rows(plan: "StudyPlan") -> list[dict[str, Any]]:
    """An entry an arm, in the order of the spec."""
    from trainer.study_plan import StudyPlan

    # As if every trial were as good as any other: what extending will add nobody knows.
    spec = plan.spec.model_copy(update={"tuning": plan.spec.tuning.model_copy(update={"extensions": 0})})
    runs = StudyPlan(spec, plan.stores, plan.out, base=plan.arms.base).state(lambda _key: 0.0).runs
    rows = []
    for name, arm in spec.arms.items():
        own = [run for run in runs if run.arm == name]
        config = own[0].config
        rows.append(
            {
                "arm": name,
                "kind": f"{config.kind}, role teacher" if arm.role == "teacher" else config.kind,
                "learns_from": spec.learns_from(name),
                "store": spec.store_of(name),
                "tuning_runs": sum(run.stage == "tuning" for run in own),
                "final_runs": sum(run.stage == "final" for run in own),
                "length": config.loop.steps if config.epochs is None else f"{config.epochs} epochs",
                "keys": {run.key for run in own},
            }
        )
    return rows


def estimated_seconds(rows: list[dict[str, Any]], out: Path) -> float | None:
    """Seconds that all training takes on one process, by the runs that are done; None if there is none.

    An arm of which none is done counts as the mean of the others.
    """
    from trainer.run_folder import read_result
    from trainer.study import PLAN_NAME, run_statuses

    if not (out / PLAN_NAME).exists():
        return None
    record, statuses, _ = run_statuses(out)
    seconds: dict[str, list[float]] = {}
    for line in record.runs:
        if statuses[line.key] == "done":
            seconds.setdefault(line.arm, []).append(read_result(out / "runs" / line.key).train_seconds)
    if not seconds:
        return None
    mean = fmean(fmean(values) for values in seconds.values())
    return math.fsum(
        (row["tuning_runs"] + row["final_runs"]) * (fmean(seconds[row["arm"]]) if row["arm"] in seconds else mean)
        for row in rows
    )
