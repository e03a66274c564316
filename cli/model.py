"""`dla predict`, `dla export`: what a finished student is good for."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.device import require_device
from cli.manifest import printable
from cli.render import ProgressReporter, counted
from dla_cache.errors import ImageError

if TYPE_CHECKING:
    from trainer.predict import Answer

Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def predict(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a finished student, or of one exported as transformers.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Image files, folders, or - for paths from stdin, one a line."),
    ],
    top: Annotated[
        int | None,
        typer.Option("--top", min=1, help="So many of the likeliest classes. [1; of several labels: all above 50 %]"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")] = 64,
    device: Device = "cpu",
    allow_bad: Annotated[
        str, typer.Option("--allow-bad", metavar="N|P%", help="So many files that are no images are no error.")
    ] = "0",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and image.")] = False,
) -> None:
    """Say the class, or classes, of every image, in the order given. Needs a student alone: no store, no latents."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from dla_cache.shares import parse_allowance
    from trainer.predict import classify, list_images, open_student

    if as_csv and as_json:
        raise typer.BadParameter("--csv and --json exclude each other", param_hint="--csv")
    if inputs.count("-") > 1:
        raise typer.BadParameter("stdin can be read once", param_hint="INPUT")
    try:
        allowance = parse_allowance(allow_bad)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--allow-bad") from error
    require_device(device)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of files that take no time
    set_verbosity_error()  # type: ignore[no-untyped-call]  # what it warns of, open_student refuses
    student = open_student(model, device=device)
    if top is not None and top > len(student.class_names):
        raise typer.BadParameter(
            f"{top} of {counted(len(student.class_names), 'class', 'classes')}", param_hint="--top"
        )
    named = [path for given in inputs for path in (_paths_from_stdin() if given == "-" else [Path(given)])]
    images, skipped = list_images(named)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        typer.echo(f"passed over: {kinds}", err=True)
    if not images:
        raise ImageError("there is no image among what was named", hint="name image files, or folders that hold some")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path that is no UTF-8 goes out as it came in
    n_bad = 0
    if as_csv:
        _write_csv(["path", *(f"{what}{_nth(n)}" for n in range(top or 1) for what in ("class", "probability"))])
    # On a terminal the answers themselves show how far it is.
    with nullcontext() if sys.stdout.isatty() else ProgressReporter("predict", "images") as reporter:
        for done, answer in enumerate(classify(student, images, batch_size=batch_size, top=top), start=1):
            if answer.fault is not None:
                n_bad += 1
                typer.echo(f"bad: {printable(str(answer.path))}: {printable(answer.fault)}", err=True)
            elif as_csv:
                _write_csv_rows(answer, is_one_row=top is not None)
            else:
                typer.echo(_json_of(answer, student.is_multi_label) if as_json else _text_of(answer))
            if reporter is not None:
                reporter.update(done, len(images))
    if n_bad and not allowance.covers(n_bad, len(images)):
        raise ImageError(
            f"there is no answer for {n_bad} of {counted(len(images), 'image')}, named above as bad",
            hint=f"mend them or leave them out, or `--allow-bad {n_bad}`",
        )


def _paths_from_stdin() -> list[Path]:
    return [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().split(b"\n") if line]


def _nth(number: int) -> str:
    return f"_{number + 1}" if number else ""


def _write_csv(cells: Sequence[str]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)


def _write_csv_rows(answer: "Answer", *, is_one_row: bool) -> None:
    """All classes in one row, or one a row; empty cells for an image that has none of them."""
    cells = [[name, f"{probability:.6g}"] for name, probability in answer.classes] or [["", ""]]
    for row in [list(chain.from_iterable(cells))] if is_one_row else cells:
        _write_csv([str(answer.path), *row])


def _json_of(answer: "Answer", is_multi_label: bool) -> str:
    ranked = [{"class": name, "probability": probability} for name, probability in answer.classes]
    if is_multi_label:
        return json.dumps({"path": str(answer.path), "classes": ranked})
    return json.dumps({"path": str(answer.path), **ranked[0]} | ({"top": ranked} if len(ranked) > 1 else {}))


def _text_of(answer: "Answer") -> str:
    ranked = [f"{printable(name)} {100 * probability:.1f} %" for name, probability in answer.classes]
    return "  ".join([printable(str(answer.path)), *(ranked or ["no class above 50 %"])])


def export(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished student.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    format_name: Annotated[
        str, typer.Option("--format", help="transformers, torch-export (model.pt2) or onnx.")
    ] = "transformers",
    as_json: AsJson = False,
) -> None:
    """Write a student for other programs, with a model card, after checking it against the student itself."""
    from transformers.utils.logging import disable_progress_bar

    from dla_cache.sources import SOURCES
    from trainer.export import FORMATS, export_run

    if format_name not in FORMATS:
        raise typer.BadParameter(f"{format_name} is none of {', '.join(FORMATS)}", param_hint="--format")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of files that take no time
    notes = {
        name: "; ".join(
            [entry.summary, *([entry.note] if entry.note else []), f"licence: {entry.licence or 'unknown'}"]
        )
        for name, entry in SOURCES.items()
    }
    report = export_run(run_path, out, format_name=format_name, notes=notes)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    typer.echo(f"folder   {report.folder}, {report.size_bytes / 1e6:.1f} MB, with README.md, a model card")
    typer.echo(f"checked  on {report.checked_on}")
    typer.echo(
        f"logits   differ from the student's by {report.max_difference:.1e} at most;"
        f" its largest is {report.largest_logit:.1f}"
    )
