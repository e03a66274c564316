"""`dla evaluate`: what a finished run is good for, in numbers."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.device import require_device
from cli.manifest import printable
from cli.model import AsJson, Device
from cli.render import ProgressReporter, counted, print_table
from dla_cache.errors import StoreError

if TYPE_CHECKING:
    from trainer.evaluate import Predictions
    from trainer.measure import Measurement
    from trainer.scores import Score
    from trainer.upbringing import TrainedRun

SHOWN_CLASSES = 40
"""Of more classes the worst are shown; all stand in `--json`."""

JSON_NAMES = {"top-1": "top1", "mAP": "mAP"}
"""Of the metrics, in `--json`."""

IN_WORDS = {"mAP": "mean average precision, mAP"}
"""Of metrics whose name is short for something."""

REMARKS = {
    "labelled": "the run was trained on it: this says what it remembers, not what it knows",
    "transfer": "the run was trained on its images",
    "validation": "the kept step was chosen on it, which is a little optimistic",
    "test": "the run read it once, at its end; a choice that follows from reading it again spoils it as a test",
}
"""What a role in training means for being measured on its split."""


def evaluate(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Split to measure on; repeatable. [the run's validation]")
    ] = None,
    store_place: Annotated[
        str | None,
        typer.Option("--store", metavar="STORE", help="Store to measure on, a folder or a URL. [the run's]"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder the images' paths start from. [the run's]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for predictions.csv and confusion.png, made if absent.")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With --out: every class's probability in predictions.csv.")
    ] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure a run on a split: accuracy or mAP, classes, calibration; of probes and teachers every modality subset."""
    from dla_cache.remote import is_remote
    from dla_cache.store import open_store
    from trainer.config import folder_of
    from trainer.measure import measure_run
    from trainer.run import load_run

    if probabilities and out is None:
        raise typer.BadParameter("it stands in a file of --out, which is missing", param_hint="--probabilities")
    require_device(device)
    run = load_run(run_path)
    store_place, images = store_place or run.config.store, images or folder_of(run.config.images)
    for place, option in ((store_place, "--store"), (images, "--images")):
        if place is not None and not is_remote(str(place)) and not Path(place).exists():
            raise StoreError(f"`{place}` is not there", hint=f"say with `{option}` where it is now")
    splits = list(dict.fromkeys(splits or run.config.roles.validation))
    passes = 1 if run.config.kind == "student" else 2  # a model of latents is measured whole, then by subset
    with ProgressReporter("evaluate", "images") as reporter:
        measured = measure_run(
            run,
            open_store(store_place),
            images,
            splits,
            where=store_place,
            device=device,
            on_progress=lambda done, total: reporter.update(done // passes, total // passes),
        )
    facts = _facts_of(run, splits, measured)
    if out is not None:
        title = f"{run_path.resolve().name} on {', '.join(splits)}"
        facts |= {"files": _write_files(out, run.facts.class_names, measured.predictions, title, probabilities)}
    for split in splits:
        if (remark := REMARKS.get(facts["roles"][split])) is not None:
            typer.echo(f"note: `{printable(split)}`: {remark}", err=True)
    if not measured.is_own_data:
        typer.echo(f"note: `{store_place}` has other images, splits or labels than the run's own store", err=True)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show_measured(facts)


def _facts_of(run: "TrainedRun", splits: Sequence[str], measured: "Measurement") -> dict[str, Any]:
    predictions, names = measured.predictions, run.facts.class_names
    roles = {split: role for role, members in run.config.roles for split in members}
    of_labels = _facts_of_several if predictions.is_multi_label else _facts_of_one
    key = JSON_NAMES[predictions.metric]
    return {
        "run": str(run.folder),
        "kind": run.config.kind,
        "splits": list(splits),
        "roles": {split: roles.get(split) for split in splits},
        "is_own_data": measured.is_own_data,
        "images": len(predictions.labels),
        "metric": predictions.metric,
        key: _facts_of_score(predictions.score()),
        "log_loss": predictions.log_loss(),
        **of_labels(predictions, names),
        "subsets": [
            {"modalities": list(subset), key: _facts_of_score(score)} for subset, score in measured.subsets.items()
        ],
    }


def _facts_of_one(predictions: "Predictions", names: Sequence[str]) -> dict[str, Any]:
    """What is said where each image has one class."""
    from trainer.evaluate import CALIBRATION_BINS, TOP
    from trainer.scores import Accuracy

    classes = []
    for number, (name, row) in enumerate(zip(names, predictions.confusion().tolist(), strict=True)):
        others = [0 if other == number else count for other, count in enumerate(row)]
        taken_for = names[others.index(max(others))] if any(others) else None
        accuracy = _facts_of_score(Accuracy(row[number], sum(row))) if any(row) else None
        classes.append({"class": name, "images": sum(row), "top1": accuracy, "most_often_taken_for": taken_for})
    return {
        f"top{TOP}": _facts_of_score(predictions.accuracy_within(TOP)) if len(names) > TOP else None,
        "calibration_error": predictions.calibration_error(),
        "calibration_bins": CALIBRATION_BINS,
        "classes": classes,
    }


def _facts_of_several(predictions: "Predictions", names: Sequence[str]) -> dict[str, Any]:
    """What is said where an image may have several classes."""
    counts = predictions.labels.sum(dim=0).tolist()
    values = predictions.precision().by_class().tolist()
    classes = [
        {"class": name, "images": count, "average_precision": value if count else None}
        for name, count, value in zip(names, counts, values, strict=True)
    ]
    return {"classes": classes}


def _facts_of_score(score: "Score") -> dict[str, float]:
    low, high = score.interval()
    return {"value": score.value, "low": low, "high": high}


def _show_measured(facts: dict[str, Any]) -> None:
    splits = ", ".join(printable(split) for split in facts["splits"])
    typer.echo(f"{facts['kind']} {facts['run']} on {splits}, {counted(facts['images'], 'image')}\n")
    metric, key = facts["metric"], JSON_NAMES[facts["metric"]]
    rows = [(IN_WORDS.get(metric, metric), *_percent(facts[key], " %"))]
    if facts.get("top5"):
        rows.append(("top-5", *_percent(facts["top5"], " %")))
    if "calibration_error" in facts:
        error = f"{100 * facts['calibration_error']:.1f} %"
        rows.append((f"calibration error, {facts['calibration_bins']} bins", error, ""))
    rows.append(("log loss", f"{facts['log_loss']:.3f} nats", ""))
    print_table(("measured", "value", "95 % interval"), rows)
    if facts["subsets"]:
        typer.echo()
        rows = [(_seen_in_words(facts, subset["modalities"]), *_percent(subset[key])) for subset in facts["subsets"]]
        print_table(("sees", f"{metric} %", "95 % interval"), rows)
    typer.echo()
    _show_classes(facts["classes"], is_multi_label=metric == "mAP")
    for path in facts.get("files", ()):
        typer.echo(f"file {path}")


def _show_classes(classes: list[dict[str, Any]], *, is_multi_label: bool) -> None:
    def value(one: dict[str, Any]) -> float:
        measured = one["average_precision"] if is_multi_label else one["top1"] and one["top1"]["value"]
        return 2.0 if measured is None else float(measured)

    if len(classes) > SHOWN_CLASSES:
        typer.echo(f"the worst {SHOWN_CLASSES} of {len(classes)} classes; `--json` has all")
        classes = sorted(classes, key=value)[:SHOWN_CLASSES]
    if is_multi_label:
        rows = [
            (printable(one["class"]), one["images"], f"{100 * value(one):.1f}" if one["images"] else "no image")
            for one in classes
        ]
        print_table(("class", "images", "average precision %"), rows)
        return
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


def _seen_in_words(facts: dict[str, Any], modalities: Sequence[str]) -> str:
    seen = [*([] if facts["kind"] == "probe" else ["image"]), *modalities]
    is_all = len(modalities) == len(facts["subsets"][-1]["modalities"])
    return f"{seen[0]} alone" if len(seen) == 1 and not is_all else " and ".join(seen) or "nothing"


def _percent(score: dict[str, float] | None, unit: str = "") -> tuple[str, str]:
    if score is None:
        return "", "no image"
    return f"{100 * score['value']:.1f}{unit}", f"{100 * score['low']:.1f} to {100 * score['high']:.1f}{unit}"


def _write_files(
    out: Path, class_names: Sequence[str], predictions: "Predictions", title: str, probabilities: bool
) -> list[str]:
    from cli.confusion import draw_confusion
    from dla_cache.durable import make_folder, write_durably, writing_to

    chosen = ["label", "predicted"] if predictions.is_multi_label else ["label", "predicted", "probability"]
    columns = ["image_id", *chosen, *(f"probability of {name}" for name in class_names if probabilities)]
    answers = _several_classes if predictions.is_multi_label else _one_class
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for image_id, cells, values in zip(
        predictions.image_ids, answers(predictions, class_names), predictions.probabilities.tolist(), strict=True
    ):
        writer.writerow([image_id, *cells, *(f"{value:.6g}" for value in values if probabilities)])
    files = {"predictions.csv": text.getvalue().encode()}
    if not predictions.is_multi_label:
        files["confusion.png"] = draw_confusion(predictions.confusion().numpy(), class_names, title)
    with writing_to(out):
        make_folder(out)
        for name, content in files.items():
            write_durably(out / name, content)
    return [str(out / name) for name in files]


def _one_class(predictions: "Predictions", class_names: Sequence[str]) -> Iterator[list[str]]:
    """For each image its class, the one predicted, and its probability."""
    highest = predictions.probabilities.max(dim=-1)
    for label, predicted, value in zip(
        predictions.labels.tolist(), highest.indices.tolist(), highest.values.tolist(), strict=True
    ):
        yield [class_names[label], class_names[predicted], f"{value:.6g}"]


def _several_classes(predictions: "Predictions", class_names: Sequence[str]) -> Iterator[list[str]]:
    """For each image its classes and those likelier than not, each a JSON list: a name may hold any separator."""
    for row in zip(predictions.labels.tolist(), (predictions.logits > 0).tolist(), strict=True):
        yield [json.dumps(list(compress(class_names, which)), ensure_ascii=False) for which in row]
