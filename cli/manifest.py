"""`dla manifest`: an image list of whatever images there are."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.render import ProgressReporter, counted
from cli.signals import stop_on_signals
from dla_cache.errors import ManifestError, name_some

if TYPE_CHECKING:
    from dla_cache.ingest import ManifestReport, Repeat

app = typer.Typer(help="Image lists of your own images.", no_args_is_help=True)

Parsed = TypeVar("Parsed")

SHOWN = 3
"""Names that are shown of each kind; all of them stand in `--json`."""

SHOWN_CLASSES = 10


@app.callback()
def group() -> None:
    """Image lists of your own images."""


@app.command()
def make(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="Folder, table (.csv .tsv .jsonl .parquet), or .tar shards.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The manifest, FILE.parquet.")],
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="folders, split-folders, flat, table or webdataset; found out if not given."),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option("--path-column", help="Table: column of paths (path, file_name, image …).")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            "--label-column", help="Column, JSON field or tar extension of a class or a list of them (label, cls …)."
        ),
    ] = None,
    label_separator: Annotated[
        str | None,
        typer.Option("--label-separator", metavar="TEXT", help="Several classes in one cell, with TEXT between them."),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option("--split-column", help="Column or JSON field of splits (split).")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id-column", help="Column or JSON field of IDs (image_id, id; else the path).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Table: folder its paths start from, if not its own.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", help="Class map: a text file, one name a line, or another manifest.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="One split for all, or shares by content: train=0.8,validation=0.1,test=0.1."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many images, evenly spaced by ID.")
    ] = None,
    allow_bad: Annotated[
        str, typer.Option("--allow-bad", metavar="N|P%", help="So many quarantined images are no error.")
    ] = "0",
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Of images with equal bytes, keep the first by ID.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Check every image of SOURCE once and list the good ones; what is bad is quarantined, with the reason."""
    from dla_cache.candidates import Columns
    from dla_cache.ingest import make_manifest, read_class_names
    from dla_cache.listing import LAYOUTS, list_images
    from dla_cache.shares import parse_allowance, parse_split

    if out.suffix != ".parquet":
        raise typer.BadParameter(f"{out} does not end in .parquet", param_hint="--out")
    if layout is not None and layout not in LAYOUTS:
        raise typer.BadParameter(f"{layout} is none of {', '.join(LAYOUTS)}", param_hint="--layout")
    if label_separator == "":
        raise typer.BadParameter("it is empty", param_hint="--label-separator")
    shares = _parse("--split", parse_split, split) if split is not None else None
    allowance = _parse("--allow-bad", parse_allowance, allow_bad)
    class_names = read_class_names(classes) if classes is not None else None
    listing = list_images(
        sources,
        layout=layout,
        columns=Columns(path_column, label_column, split_column, id_column, label_separator),
        images=images,
    )
    found_out = "" if layout else " (found out; `--layout` forces another)"
    typer.echo(f"{'layout':<11} {listing.layout}{found_out}\n{'':<11} {printable(listing.remark)}", err=True)
    with ProgressReporter("check", "images") as reporter, stop_on_signals() as should_stop:
        report = make_manifest(
            listing,
            out,
            class_names=class_names,
            split=shares,
            limit=limit,
            allowance=allowance,
            drop_duplicates=drop_duplicates,
            on_progress=reporter.update,
            should_stop=should_stop,
        )
    if as_json:
        typer.echo(json.dumps(_facts_of(report)))
    else:
        _show(report)
    if report.manifest is None:
        bad = [printable(f"{thing.where} {thing.reason}") for thing in report.quarantined]
        raise ManifestError(
            f"{len(bad)} of {counted(len(bad) + report.n_images, 'image')} {'is' if len(bad) == 1 else 'are'}"
            f" quarantined, so no manifest is written:"
            f" {'; '.join(bad[:SHOWN])}{f'; and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''}",
            hint=f"see `{printable(str(report.quarantine))}`; mend or remove them, or `--allow-bad {len(bad)}`"
            if report.n_images
            else f"see `{printable(str(report.quarantine))}`; not one image is good",
        )


def _parse(option: str, parse: Callable[[str], Parsed], text: str) -> Parsed:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _facts_of(report: "ManifestReport") -> dict[str, object]:
    derived = {"conflicts": report.conflicts, "leaks": report.leaks}
    return asdict(report) | {name: [asdict(repeat) for repeat in repeats] for name, repeats in derived.items()}


def _show(report: "ManifestReport") -> None:
    n_skipped = sum(report.skipped.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.skipped.items(), key=lambda item: -item[1]))
    n_again = sum(len(repeat.where) - 1 for repeat in report.repeats)
    empty = [printable(name) for name, count in report.images_per_class.items() if not count]
    lines = {
        "found": f"{report.n_found} = {report.n_images} listed + {len(report.quarantined)} quarantined"
        f" + {n_skipped} skipped{f' ({kinds})' if kinds else ''}",
        "classes": f"{len(report.images_per_class)}: {_counts(report.images_per_class)}",
        "multi-label": f"classes per labelled image: {report.classes_per_image:.3g} on average;"
        f" labelled with none of them: {counted(report.n_without_class, 'image')}",
        "empty": f"{counted(len(empty), 'class', 'classes')} without an image: {name_some(empty)}",
        "splits": _counts(report.images_per_split),
        "unlabelled": _counts(report.unlabelled_per_split),
        "duplicates": f"{counted(n_again, 'image')} with another's bytes: {_repeats(report.repeats)}",
        "CONFLICT": f"{counted(len(report.conflicts), 'content')} with several labels: {_repeats(report.conflicts)}",
        "LEAK": f"{counted(len(report.leaks), 'content')} in several splits: {_repeats(report.leaks)}",
        "quarantine": printable(report.quarantine or ""),
        "manifest": printable(report.manifest or ""),
        "next": _next_command(report) if report.manifest else "",
    }
    absent = {
        "classes": not report.images_per_class,
        "multi-label": not report.is_multi_label,
        "empty": not empty,
        "duplicates": not n_again,
        "CONFLICT": not report.conflicts,
        "LEAK": not report.leaks,
    }
    for name, text in lines.items():
        if text and not absent.get(name, False):
            typer.echo(f"{name:<11} {text}")


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{printable(name)} {count}" for name, count in list(counts.items())[:SHOWN_CLASSES])
    return shown if len(counts) <= SHOWN_CLASSES else f"{shown} and {len(counts) - SHOWN_CLASSES} more"


def _repeats(repeats: Sequence["Repeat"]) -> str:
    shown = "; ".join(" = ".join(printable(where) for where in repeat.where[:SHOWN]) for repeat in repeats[:SHOWN])
    return shown if len(repeats) <= SHOWN else f"{shown}; and {len(repeats) - SHOWN} more"


def _next_command(report: "ManifestReport") -> str:
    manifest = Path(report.manifest or "")
    store = manifest.with_suffix(".zarr")
    words = ["dla", "cache", "build", "SPEC.yaml", "--manifest", str(manifest), "--images", report.root]
    return printable(shlex.join([*words, "--out", str(store)]))


def printable(text: str) -> str:
    """The text on one line, for a terminal: a file name may hold a newline, a colour code, or what is no UTF-8."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
