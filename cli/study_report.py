"""`dla study report`: a study's three files as one page, and every number of it as a table."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.render import counted, print_table
from dla_cache.errors import StudyError, name_some


def report_command(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What `dla study run` wrote, or a folder with its three plain files."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for report.html and tables.csv; the study's own if absent.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Report a study that is not finished, on the runs that arms share.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write what a study found to one page, from spec.yaml, runs.csv and images.csv alone: verdicts, intervals, paired
    differences, tuning, cost."""
    from cli.study_page import PAGE_NAME, TABLES_NAME, write_study_page
    from trainer.study_table import folder_of_study

    folder = folder_of_study(folder)
    place = folder if out is None else out
    page = write_study_page(folder, place, partial=partial)
    if as_json:
        typer.echo(json.dumps({**page.as_json(), "page": str(place / PAGE_NAME), "tables": str(place / TABLES_NAME)}))
    else:
        cells = []
        for arm in page.arms:
            known = arm.score.is_known
            cells.append(
                (
                    arm.label if arm.fraction is None else f"{arm.label}, {100 * arm.fraction:g} % of the labels",
                    f"{len(arm.runs)}",
                    f"{arm.score.mean:.1f}",
                    f"{arm.low:.1f} to {arm.high:.1f}" if known else "one seed" if len(arm.seeds) == 1 else "no spread",
                )
            )
        interval = f"{100 * page.results.table.spec.confidence:g} % interval"
        print_table(("arm", "runs", f"test {page.results.table.metric} %", interval), cells)
        for pair in page.planned:
            typer.echo(pair.verdict)
        typer.echo(f"page {place / PAGE_NAME}")
        typer.echo(f"tables {place / TABLES_NAME}")
    missing = page.results.missing
    if missing and not partial:
        raise StudyError(
            f"{counted(len(missing), 'run')} that the spec asks for {'is' if len(missing) == 1 else 'are'} missing:"
            f" {name_some(missing)}",
            hint=f"`{place / PAGE_NAME}` says so; go on with `dla study run`, or add `--partial`",
        )
