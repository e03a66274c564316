"""`dla study status`: how far a study is."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from cli.render import counted, print_table


def status_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the study, the `--out` of `dla study run`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show what is done, under way, failed and waiting, arm by arm."""
    from trainer.study import run_statuses

    plan, statuses, failures = run_statuses(out)
    arms: dict[tuple[str, str], Counter[str]] = {}
    for line in plan.runs:
        arms.setdefault((line.arm, line.stage), Counter())[statuses[line.key]] += 1
    names = {line.key: line.name for line in plan.runs}
    if as_json:
        rows = [{"arm": arm, "stage": stage, **counts} for (arm, stage), counts in arms.items()]
        failed = {names[key]: failure.model_dump() for key, failure in failures.items()}
        total = Counter(statuses.values())
        typer.echo(
            json.dumps({"study": plan.study, "is_whole": plan.is_whole, **total, "arms": rows, "failures": failed})
        )
        return
    shown = ("done", "under way", "failed", "waiting")
    rows_of_text = [(arm, stage, *(counts[status] for status in shown)) for (arm, stage), counts in arms.items()]
    print_table(("arm", "stage", *shown), rows_of_text)
    n_done = sum(status == "done" for status in statuses.values())
    more = "" if plan.is_whole else "; more will be known when tuning has chosen settings"
    typer.echo(f"{n_done} of {counted(len(statuses), 'run')} done{more}")
    for key, status in statuses.items():
        if status == "under way":
            typer.echo(f"under way: {names[key]}, {out / 'runs' / key}")
    for key, failure in failures.items():
        typer.echo(f"failed: {names[key]}: {failure.message}")
