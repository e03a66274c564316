"""`dla report`: finished runs as a table, and as one page to keep or send."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.render import counted, print_table


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    store: Annotated[
        Path | None, typer.Option("--store", help="The store they were trained on; else the one each run names.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder the images' paths start from; draws a contact sheet.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="A PNG to show as the contact sheet.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The page, one HTML file.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write what runs measured to one page: table, curves, provenance, cost. Seeds of one run are averaged."""
    if images is not None and picture is not None:
        raise typer.BadParameter("--images draws the picture that --picture names: give one", param_hint="--picture")
    twice = [run for number, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:number]]]
    if twice:
        raise typer.BadParameter(f"`{twice[0]}` is named twice", param_hint="RUN...")
    from cli.page import write_page

    page = write_page(out, runs, store=store, images=images, picture=picture)
    if as_json:
        typer.echo(json.dumps({**page.as_json(), "page": str(out)}))
        return
    cells = []
    for row in page.rows:
        group, test = row.group, row.group.test
        several = test.over == "seeds"
        cells.append(
            (
                group.label,
                row.sees,
                f"{100 * test.value:.1f}",
                f"± {100 * test.half:.1f}" if several else f"{100 * test.low:.1f} to {100 * test.high:.1f}",
                counted(test.n, test.over.removesuffix("s")),
                f"{100 * group.validation:.1f}",
                f"{group.mean_seconds:.1f}" if group.mean_seconds < 10 else f"{group.mean_seconds:,.0f}",
            )
        )
    print_table(
        ("run", "sees", f"test {page.metric} %", "95 % interval", "over", f"validation {page.metric} %", "seconds"),
        cells,
    )
    for note in page.notes:
        typer.echo(f"missing: {note}", err=True)
    if page.single_seed:
        typer.echo("One seed proves nothing: an interval over images is that of drawing them, not of training again.")
    typer.echo(f"page {out}")
