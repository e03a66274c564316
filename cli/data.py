"""`dla data`: the embedded data set as files."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The embedded data set.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The embedded data set."""


@app.command("relief-digits")
def relief_digits(
    out: Annotated[Path, typer.Argument(help="Folder to write images, manifest.parquet and truth.parquet into.")],
    with_pairs: Annotated[
        bool,
        typer.Option("--with-pairs", help="Also the 21,600 images that the generators were fitted on, with labels."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Render relief-digits: 6,200 images in four splits, the manifest, and the truth beside."""
    from dla_cache.data.export import MANIFEST_NAME, write_relief_digits

    counts: dict[str, int] = {}
    write_relief_digits(out, with_pairs=with_pairs, on_progress=counts.__setitem__)
    if as_json:
        typer.echo(json.dumps({"manifest": str(out / MANIFEST_NAME), "images": counts}))
        return
    for split, count in counts.items():
        typer.echo(f"{split:<12} {count:>6} images")
    typer.echo(f"manifest     {out / MANIFEST_NAME}")
