"""`dla study alignment`: do the features of image-only students know a modality that they never see?"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.device import require_device
from cli.model import AsJson, Device
from cli.render import ProgressReporter, print_table
from dla_cache.errors import StoreError

if TYPE_CHECKING:
    from trainer.alignment_study import Alignment, AlignmentPlan

FAR_OFF = 0.02
"""Gap of accuracy from which on a control is not called matched."""

LOW_CEILING = 0.1
"""Of R² within class, below which there is nothing to know."""


def alignment(
    arms: Annotated[
        list[str],
        typer.Option("--arm", metavar="NAME=RUN[,RUN...]", help="Students of one kind, a run a seed; repeatable."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for tables, page and pictures, made if absent.")],
    store_place: Annotated[
        str | None,
        typer.Option("--store", metavar="STORE", help="Store of the latents, a folder or a URL. [the first run's]"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder the images' paths start from. [the first run's]")
    ] = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Split to measure on; repeatable. [the first run's test]")
    ] = None,
    fit_splits: Annotated[
        list[str] | None,
        typer.Option("--fit-split", help="Split to fit probes on; repeatable. [the first run's validation]"),
    ] = None,
    modalities: Annotated[
        list[str] | None, typer.Option("--modality", help="Modality to ask about; repeatable. [all of the store]")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="NAME=RUN", help="Teacher or probe to compare with as well; repeatable."),
    ] = None,
    controls: Annotated[
        list[str] | None,
        typer.Option("--control", metavar="NAME", help="Arm to take matched controls from. [all never taught it]"),
    ] = None,
    other_draw: Annotated[
        str | None,
        typer.Option("--other-draw", metavar="STORE", help="Same cache spec, another seed: for the noise ceiling."),
    ] = None,
    n_shuffles: Annotated[int, typer.Option("--shuffles", min=2, help="Shuffles of the null.")] = 20,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Ask whether students' features know the latents of a modality they never see, against null and controls."""
    from cli.alignment_page import write_alignment_page
    from cli.gallery import draw_galleries
    from dla_cache.durable import make_folder, write_durably, writing_to
    from dla_cache.remote import is_remote
    from dla_cache.store import open_store
    from trainer.alignment_study import AlignmentPlan, measure_alignment
    from trainer.config import folder_of
    from trainer.run_folder import read_config

    folders_by_arm = _named_folders(arms, "--arm")
    folders_of_targets = _named_folders(targets or [], "--target")
    several = [name for name, folders in folders_of_targets.items() if len(folders) > 1]
    if several:
        raise typer.BadParameter(f"`{several[0]}` names several runs", param_hint="--target")
    require_device(device)
    first = read_config(next(iter(folders_by_arm.values()))[0])
    store_place, images = store_place or first.store, images or folder_of(first.images)
    for place, option in ((store_place, "--store"), (images, "--images"), (other_draw, "--other-draw")):
        if place is not None and not is_remote(str(place)) and not Path(place).exists():
            raise StoreError(f"`{place}` is not there", hint=f"say with `{option}` where it is now")
    store = open_store(store_place)
    plan = AlignmentPlan(
        arms=folders_by_arm,
        store=store,
        images=images,
        fit_splits=tuple(dict.fromkeys(fit_splits or first.roles.validation)),
        splits=tuple(dict.fromkeys(splits or first.roles.test)),
        modalities=tuple(dict.fromkeys(modalities or store.modalities)),
        targets={name: folders[0] for name, folders in folders_of_targets.items()},
        controls=tuple(controls or ()),
        other_draw=open_store(other_draw) if other_draw is not None else None,
        n_shuffles=n_shuffles,
        device=device,
    )
    with ProgressReporter("alignment", "blocks") as reporter:
        found = measure_alignment(plan, on_progress=reporter.update)
    notes = notes_of(plan, found)
    with writing_to(out):
        make_folder(out)
    pictures, without = draw_galleries(plan, out)
    notes += without
    files = {"alignment.csv": as_csv(found.lines), "differences.csv": as_csv(found.differences)}
    with writing_to(out):
        for name, content in files.items():
            write_durably(out / name, content)
    write_alignment_page(out / "alignment.html", plan, found, notes, pictures)
    written = [*(str(out / name) for name in (*files, "alignment.html")), *(str(one.path) for one in pictures)]
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(_as_json(found, notes, written)))
    else:
        _show(found)
        for name in written:
            typer.echo(f"file {name}")


def _named_folders(given: Sequence[str], option: str) -> dict[str, list[Path]]:
    """`NAME=RUN[,RUN...]` as folders by name; a name may come again."""
    named: dict[str, list[Path]] = {}
    for one in given:
        name, is_there, folders = one.partition("=")
        paths = [Path(folder) for folder in folders.split(",") if folder]
        if not is_there or not name or not paths:
            raise typer.BadParameter(f"`{one}` is not NAME=RUN", param_hint=option)
        named.setdefault(name, []).extend(paths)
    for name, paths in named.items():
        twice = [path for number, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:number]]]
        if twice:
            raise typer.BadParameter(f"`{name}` names `{twice[0]}` twice", param_hint=option)
    return named


def notes_of(plan: "AlignmentPlan", found: "Alignment") -> list[str]:
    """What a reader must know before the numbers, each a sentence without its full stop."""
    from trainer.run_folder import read_config

    notes = []
    learned: dict[str, list[str]] = {}
    for arm, folders in plan.arms.items():
        for split in {split for folder in folders for split in read_config(folder).training_splits}:
            learned.setdefault(split, []).append(arm)
    for split in (*plan.splits, *plan.fit_splits):
        if split in learned:
            notes.append(f"split `{split}` was learned from by {', '.join(learned[split])}: its features differ there")
    single = [arm for arm, folders in plan.arms.items() if len(folders) == 1]
    if single:
        notes.append(f"one run stands behind {', '.join(single)}: an interval over images says nothing of other seeds")
    matched = {(one.arm, one.target): one for one in found.differences if one.is_matched}
    unmatched: dict[str, list[str]] = {}
    for one in matched.values():
        if abs(one.accuracy - one.other_accuracy) > FAR_OFF:
            said = (
                f"{one.arm}: {100 * one.accuracy:.1f} % top-1 against {100 * one.other_accuracy:.1f} % of {one.other}"
            )
            unmatched.setdefault(said, []).append(one.target)
    for said, names in unmatched.items():
        notes.append(f"no control of the accuracy of {said} (for {', '.join(names)}); a difference may be accuracy's")
    for arm, target in dict.fromkeys((one.arm, one.target) for one in found.lines if one.taught):
        if (arm, target) not in matched:
            notes.append(f"{arm} has no control for {target}: every run given, or what it learned from, saw it")
    for run in found.runs:
        seen = sorted(run.taught & set(plan.modalities))
        if run.arm in plan.controls and seen:
            notes.append(f"the control {run.arm} learned from other latents that are called {', '.join(seen)} as well")
    notes = list(dict.fromkeys(notes))
    for target, ceiling in within_class_ceilings(found).items():
        if ceiling < LOW_CEILING:
            notes.append(
                f"within a class the image fixes next to nothing of {target}: two draws share {100 * ceiling:.0f} % of"
                " their variance, so nobody could know more of it, and a number near 0 says nothing of a student"
            )
    known = {one.target for one in found.lines if one.ceiling is not None}
    unknown = [name for name in plan.modalities if name not in known]
    if unknown:
        notes.append(
            f"the noise ceiling of {', '.join(unknown)} is unknown: the store has one draw of each latent, and"
            " `--other-draw` names no other"
        )
    return notes


def within_class_ceilings(found: "Alignment") -> dict[str, float]:
    """Target → the largest R² of the whole latent with class means removed, where it is known."""
    return {
        one.target: one.ceiling
        for one in found.lines
        if one.ceiling is not None and (one.metric, one.class_means) == ("r2-flattened", "within-class")
    }


def as_csv(lines: Sequence[Any]) -> bytes:
    """Dataclasses of one kind as CSV: empty for None, six digits of a fraction."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(lines[0])] if lines else []
    writer.writerow(names)
    for line in lines:
        writer.writerow([_cell(getattr(line, name)) for name in names])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return " ".join(_cell(one) for one in value)
    return str(value)


def _as_json(found: "Alignment", notes: Sequence[str], files: Sequence[str]) -> Mapping[str, Any]:
    return {
        "images": found.n_images,
        "fitted_images": found.n_fit,
        "runs": [
            {"arm": run.arm, "run": run.name, "accuracy": run.accuracy, "taught": sorted(run.taught)}
            for run in found.runs
        ],
        "alignment": [asdict(line) for line in found.lines],
        "differences": [asdict(line) for line in found.differences],
        "notes": list(notes),
        "files": list(files),
    }


def _show(found: "Alignment") -> None:
    """The last block with class means removed: R² of the flattened latent, and what it is more than the control's."""
    from cli.alignment_page import as_number, head_lines

    rows = []
    for line, matched in head_lines(found):
        against = "" if matched is None else f"{matched.other}, {100 * matched.other_accuracy:.1f} %"
        difference = "" if matched is None else f"{matched.difference:+.3f} ({matched.low:+.3f} to {matched.high:+.3f})"
        rows.append(
            (
                line.target,
                line.arm,
                f"{100 * line.accuracy:.1f}",
                "yes" if line.taught else "no",
                f"{as_number(line.value)} ({as_number(line.low)} to {as_number(line.high)})",
                f"{as_number(line.null_low)} to {as_number(line.null_high)}",
                against,
                difference,
            )
        )
    print_table(
        ("latents of", "arm", "top-1 %", "taught", "R² within class", "null", "matched control", "difference"), rows
    )
    typer.echo("R² of the last block, class means removed, 95 % intervals; alignment.csv has every metric and block.")
