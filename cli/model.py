"""`dla evaluate`, `dla predict`, `dla export`: what a finished run is good for."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.device import require_device
from cli.manifest import printable
from cli.render import ProgressReporter, print_table
from dla_cache.errors import ImageError, StoreError

if TYPE_CHECKING:
    from trainer.evaluate import Accuracy, Predictions
    from trainer.measure import Measurement
    from trainer.predict import Answer
    from trainer.run import TrainedRun

SHOWN_CLASSES = 40
"""Of more classes the worst are shown; all stand in `--json`."""

REMARKS = {
    "labelled": "the run was trained on it: this says what it remembers, not what it knows",
    "transfer": "the run was trained on its images",
    "validation": "the kept step was chosen on it, which is a little optimistic",
    "test": "the run read it once, at its end; a choice that follows from reading it again spoils it as a test",
}
"""What a role in training means for being measured on its split."""

Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def evaluate(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Split to measure on; repeatable. [the run's validation]")
    ] = None,
    store_path: Annotated[Path | None, typer.Option("--store", help="Store to measure on. [the run's]")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder the images' paths start from. [the run's]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for predictions.csv and confusion.png; made if absent.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With --out: every class's probability in predictions.csv.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure a run on a split: accuracy, calibration, classes; of probes and teachers every subset of modalities."""
    from dla_cache.store import open_store
    from trainer.config import folder_of
    from trainer.measure import measure_run
    from trainer.run import load_run

    if probabilities and out is None:
        raise typer.BadParameter("it stands in a file of --out, which is missing", param_hint="--probabilities")
    require_device(device)
    run = load_run(run_path)
    store_path, images = store_path or Path(run.config.store), images or folder_of(run.config.images)
    for place, option in ((store_path, "--store"), (images, "--images")):
        if place is not None and not place.exists():
            raise StoreError(f"`{place}` is not there", hint=f"say with `{option}` where it is now")
    splits = list(dict.fromkeys(splits or run.config.roles.validation))
    with ProgressReporter("evaluate", "images") as reporter:
        measured = measure_run(
            run,
            open_store(store_path),
            images,
            splits,
            where=str(store_path),
            device=device,
            on_progress=reporter.update,
        )
    facts = _facts_of(run, splits, measured)
    if out is not None:
        title = f"{run_path.resolve().name} on {', '.join(splits)}"
        facts |= {"files": _write_files(out, run.facts.class_names, measured.predictions, title, probabilities)}
    for split in splits:
        if (remark := REMARKS.get(facts["roles"][split])) is not None:
            typer.echo(f"note: `{printable(split)}`: {remark}", err=True)
    if not measured.is_own_data:
        typer.echo(f"note: `{store_path}` has other images, splits or labels than the run's own store", err=True)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show_measured(facts)


def _facts_of(run: "TrainedRun", splits: Sequence[str], measured: "Measurement") -> dict[str, Any]:
    from trainer.evaluate import CALIBRATION_BINS, TOP, Accuracy

    predictions, names = measured.predictions, run.facts.class_names
    confusion = predictions.confusion().tolist()
    roles = {split: role for role, members in run.config.roles for split in members}
    classes = []
    for number, (name, row) in enumerate(zip(names, confusion, strict=True)):
        others = [0 if other == number else count for other, count in enumerate(row)]
        taken_for = names[others.index(max(others))] if any(others) else None
        accuracy = _facts_of_accuracy(Accuracy(row[number], sum(row))) if any(row) else None
        classes.append({"class": name, "images": sum(row), "top1": accuracy, "most_often_taken_for": taken_for})
    return {
        "run": str(run.folder),
        "kind": run.config.kind,
        "splits": list(splits),
        "roles": {split: roles.get(split) for split in splits},
        "is_own_data": measured.is_own_data,
        "images": len(predictions.labels),
        "top1": _facts_of_accuracy(predictions.accuracy()),
        f"top{TOP}": _facts_of_accuracy(predictions.accuracy_within(TOP)) if len(names) > TOP else None,
        "calibration_error": predictions.calibration_error(),
        "calibration_bins": CALIBRATION_BINS,
        "log_loss": predictions.log_loss(),
        "classes": classes,
        "subsets": [
            {"modalities": list(subset), "top1": _facts_of_accuracy(accuracy)}
            for subset, accuracy in measured.subsets.items()
        ],
    }


def _facts_of_accuracy(accuracy: "Accuracy") -> dict[str, float]:
    low, high = accuracy.interval()
    return {"value": accuracy.top1, "low": low, "high": high}


def _show_measured(facts: dict[str, Any]) -> None:
    splits = ", ".join(printable(split) for split in facts["splits"])
    typer.echo(f"{facts['kind']} {facts['run']} on {splits}, {facts['images']} images\n")
    rows = [(name.replace("top", "top-"), *_percent(facts[name])) for name in ("top1", "top5") if facts[name]]
    rows.append(("calibration error", f"{100 * facts['calibration_error']:.1f}", f"{facts['calibration_bins']} bins"))
    rows.append(("log loss", f"{facts['log_loss']:.3f}", "nats"))
    print_table(("measured", "%", "95 % interval"), rows)
    if facts["subsets"]:
        typer.echo()
        rows = [(_seen_in_words(facts, subset["modalities"]), *_percent(subset["top1"])) for subset in facts["subsets"]]
        print_table(("sees", "top-1 %", "95 % interval"), rows)
    typer.echo()
    classes = facts["classes"]
    if len(classes) > SHOWN_CLASSES:
        typer.echo(f"the worst {SHOWN_CLASSES} of {len(classes)} classes; `--json` has all")
        worst = sorted(classes, key=lambda one: one["top1"]["value"] if one["top1"] else 2)
        classes = worst[:SHOWN_CLASSES]
    print_table(
        ("class", "images", "top-1 %", "95 % interval", "most often taken for"),
        [
            (
                printable(one["class"]),
                one["images"],
                *_percent(one["top1"]),
                printable(one["most_often_taken_for"] or ""),
            )
            for one in classes
        ],
    )
    for path in facts.get("files", ()):
        typer.echo(f"file {path}")


def _seen_in_words(facts: dict[str, Any], modalities: Sequence[str]) -> str:
    seen = [*([] if facts["kind"] == "probe" else ["image"]), *modalities]
    is_all = len(modalities) == len(facts["subsets"][-1]["modalities"])
    return f"{seen[0]} alone" if len(seen) == 1 and not is_all else " and ".join(seen) or "nothing"


def _percent(accuracy: dict[str, float] | None) -> tuple[str, str]:
    if accuracy is None:
        return "", "no image"
    return f"{100 * accuracy['value']:.1f}", f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"


def _write_files(
    out: Path, class_names: Sequence[str], predictions: "Predictions", title: str, probabilities: bool
) -> list[str]:
    from cli.confusion import draw_confusion
    from dla_cache.durable import make_folder, write_durably, writing_to

    columns = ["image_id", "label", "predicted", "probability"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"probability of {name}" for name in class_names)] if probabilities else columns)
    rows = zip(
        predictions.image_ids,
        predictions.labels.tolist(),
        predictions.predicted.tolist(),
        predictions.probabilities.tolist(),
        strict=True,
    )
    for image_id, label, predicted, values in rows:
        shown = [values[predicted], *(values if probabilities else [])]
        writer.writerow([image_id, class_names[label], class_names[predicted], *(f"{value:.6g}" for value in shown)])
    picture = draw_confusion(predictions.confusion().numpy(), class_names, title)
    files = {"predictions.csv": text.getvalue().encode(), "confusion.png": picture}
    with writing_to(out):
        make_folder(out)
        for name, content in files.items():
            write_durably(out / name, content)
    return [str(out / name) for name in files]


def predict(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a finished student, or of one exported as transformers.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Image files, folders, or - for paths from stdin, one a line."),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="So many of the likeliest classes.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images at once.")] = 64,
    device: Device = "cpu",
    allow_bad: Annotated[
        str, typer.Option("--allow-bad", metavar="N|P%", help="So many files that are no images are no error.")
    ] = "0",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with a header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and image.")] = False,
) -> None:
    """Say the class of every image, in the order given. Needs a student alone: no store, no latents."""
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
    if top > len(student.class_names):
        raise typer.BadParameter(f"{top} of {len(student.class_names)} classes", param_hint="--top")
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
        _write_csv(["path", *(f"{what}{_nth(n)}" for n in range(top) for what in ("class", "probability"))])
    # On a terminal the answers themselves show how far it is.
    with nullcontext() if sys.stdout.isatty() else ProgressReporter("predict", "images") as reporter:
        for done, answer in enumerate(classify(student, images, batch_size=batch_size, top=top), start=1):
            if answer.fault is not None:
                n_bad += 1
                typer.echo(f"bad: {printable(str(answer.path))}: {printable(answer.fault)}", err=True)
            elif as_csv:
                _write_csv([str(answer.path), *(cell for name, p in answer.classes for cell in (name, f"{p:.6g}"))])
            else:
                typer.echo(_json_of(answer) if as_json else _text_of(answer))
            if reporter is not None:
                reporter.update(done, len(images))
    if n_bad and not allowance.covers(n_bad, len(images)):
        raise ImageError(
            f"{n_bad} of {len(images)} images are bad and have no answer",
            hint=f"mend or leave out what is named above, or `--allow-bad {n_bad}`",
        )


def _paths_from_stdin() -> list[Path]:
    return [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().split(b"\n") if line]


def _nth(number: int) -> str:
    return f"_{number + 1}" if number else ""


def _write_csv(cells: Sequence[str]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)


def _json_of(answer: "Answer") -> str:
    ranked = [{"class": name, "probability": probability} for name, probability in answer.classes]
    return json.dumps({"path": str(answer.path), **ranked[0]} | ({"top": ranked} if len(ranked) > 1 else {}))


def _text_of(answer: "Answer") -> str:
    ranked = [f"{printable(name)} {100 * probability:.1f} %" for name, probability in answer.classes]
    return "  ".join([printable(str(answer.path)), *ranked])


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
    typer.echo(f"checked  {report.checked_on}: logits differ by {report.max_difference:.1e} at most")
    typer.echo(f"         from those of the student, whose largest is {report.largest_logit:.1f}")
