"""`dla cache plan`: what a build will do, take and cost, before it is begun."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.cache_audit import MaskNames, SynonymsPath, mask_names
from cli.cache_spec import HeldAs, ImageFolder, ModalityName, Overrides, SourceName, SpecPath, read_cache_spec
from cli.device import require_devices
from cli.render import ProgressReporter, as_size, counted, print_table

if TYPE_CHECKING:
    from dla_cache.plan import CachePlan

BY_THE_PLAN = (
    *("spec_path", "source", "modality", "manifest_path", "images", "out", "image_encoding", "device", "batch_size"),
    *("overrides", "repair", "append", "mask_class_names"),
)
"""Parameters of `build` that a plan has decided."""


DECODERS = 4
"""Cores that a build may have for reading; with fewer of them the device waits sooner."""


def _amount(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{value} is no price")
    return value


def require_plan_alone(context: typer.Context) -> None:
    """Passes a command line of `build --plan` on which nothing stands that the plan has decided."""
    sources = {name: context.get_parameter_source(name) for name in BY_THE_PLAN}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    said = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    given = [options[name] if options[name].startswith("-") else "SPEC" for name in said]
    if given:
        raise typer.BadParameter(f"the plan has decided {', '.join(given)}: leave it out", param_hint="--plan")


def plan_command(
    manifest_path: Annotated[Path, typer.Option("--manifest", help="Image list, a Parquet file.")],
    out: Annotated[str, typer.Option("--out", metavar="STORE", help="Folder of the store to build, or its URL.")],
    spec_path: SpecPath = None,
    source: SourceName = None,
    modality: ModalityName = None,
    images: ImageFolder = None,
    image_encoding: HeldAs = None,
    overrides: Overrides = None,
    append: Annotated[bool, typer.Option("--append", help="Plan to add images that the store has not.")] = False,
    mask_class_names: MaskNames = False,
    synonyms_path: SynonymsPath = None,
    device: Annotated[
        str, typer.Option("--device", help="Where sources are to run, as for build; of several the first is timed.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per call of a source.")] = 64,
    n_batches: Annotated[int, typer.Option("--batches", min=1, help="Batches to time, after one to warm up.")] = 3,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Devices at work, on all machines; those of --device.")
    ] = None,
    price_per_hour: Annotated[
        float, typer.Option("--price-per-hour", callback=_amount, help="Of one device, in any currency.")
    ] = 0.0,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of a student's training.")] = 100,
    students: Annotated[int, typer.Option("--students", min=1, help="Student runs that are to use the cache.")] = 1,
    plan_path: Annotated[
        Path | None, typer.Option("--plan", help="Write the plan here, for dla cache build --plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what a build will do, take and cost: a few real batches are timed, and nothing is stored."""
    from dla_cache.plan import write_plan
    from dla_cache.planning import Terms, make_plan
    from dla_cache.sources import open_source

    spec = read_cache_spec(spec_path, source, modality, image_encoding, overrides or [])
    if mask_class_names:
        spec = mask_names(spec, manifest_path, synonyms_path)
    elif synonyms_path is not None:
        raise typer.BadParameter(
            "a plan masks them, with --mask-class-names, or has no use for them", param_hint="--synonyms"
        )
    device = require_devices(device)
    with ProgressReporter("plan", "batches") as reporter:
        plan = make_plan(
            manifest_path,
            spec,
            out,
            open_source=open_source,
            image_root=images,
            device=device,
            batch_size=batch_size,
            n_batches=n_batches,
            append=append,
            terms=Terms(devices or len(device.split(",")), price_per_hour, epochs, students),
            on_batch=reporter.update,
        )
    if plan_path is not None:
        write_plan(plan, plan_path, [f"{label:<14}{text}" for label, text in plan_lines(plan)])
    if as_json:
        typer.echo(json.dumps(plan_facts(plan)))
        return
    show_plan(plan)
    if plan_path is not None:
        typer.echo(f"{'plan':<14}{plan_path}; `dla cache build --plan {plan_path}` applies it")


def plan_facts(plan: "CachePlan") -> dict[str, Any]:
    """The plan, and what follows from it, as JSON has it."""
    return {
        **plan.model_dump(mode="json"),
        "size_bytes": plan.size_bytes,
        "device_hours": plan.device_hours,
        "wall_hours": plan.wall_hours,
        "cost": plan.cost,
        "online_hours": plan.online_hours,
        "break_even_students": plan.break_even_students,
        "is_short_of_disk": plan.is_short_of_disk,
    }


def show_plan(plan: "CachePlan") -> None:
    """The plan as text."""
    print_table(
        ["series", "to do", "bytes/image", "size", "images/s", "on one device"],
        [
            [
                name,
                f"{part.images:,} of {plan.n_images:,}",
                f"{part.bytes_per_image:,.0f}",
                as_size(part.size_bytes),
                *_speed(plan, name),
            ]
            for name, part in plan.series.items()
        ],
    )
    for label, text in plan_lines(plan):
        typer.echo(f"{label:<14}{text}")


def plan_lines(plan: "CachePlan") -> Iterator[tuple[str, str]]:
    """What a plan says beside the table, and at the head of its file: labels and texts."""
    for name, part in plan.series.items():
        for reason, count in part.reasons.items():
            yield name, f"{counted(count, 'image')}: {reason}"
    if not any(part.images for part in plan.series.values()):
        yield "to do", "nothing: the store is whole"
    for name, modality in plan.latents.items():
        gated = "; gated: its weights ask for an accepted licence" if modality.is_gated else ""
        yield "licence", f"{name}, {modality.source}: {modality.licence}{gated}"
        if modality.batch_seconds and modality.batch_size < plan.batch_size:
            yield "memory", f"{name}: the device holds {modality.batch_size} images, not {plan.batch_size}"
        _, seconds, _ = modality.seconds_per_image
        if modality.read_seconds > DECODERS * seconds > 0:
            reading, computing = (f"{1000 * value:.1f} ms" for value in (modality.read_seconds, seconds))
            yield "reading", f"{name}: {reading} of a core an image, {computing} of the device: the device will wait"
    yield "store", f"{plan.store}, {'there' if plan.is_there else 'not there yet'}"
    free = "" if plan.free_bytes is None else f"; {as_size(plan.free_bytes)} are free there"
    yield "disk", f"{as_size(plan.size_bytes)} to write{free}"
    if plan.is_short_of_disk:
        yield "warning", "the disk is too small"
    if plan.repair:
        yield "warning", "shards are damaged: the build will read all, and make the damaged ones again"
    if any(part.images for part in plan.latents.values()):
        yield "time", f"{_range(plan.wall_hours, as_duration)} with {counted(plan.devices, 'device')}: {plan.device}"
    if plan.price_per_hour:
        yield "cost", f"{_range(plan.cost, '{:,.2f}'.format)}, at {plan.price_per_hour:g} an hour and device"
    if plan.online_hours is not None and plan.break_even_students is not None:
        runs = f"{counted(plan.students, 'student run')} of {counted(plan.epochs, 'epoch')}"
        yield (
            "no cache",
            (
                f"{as_duration(plan.online_hours)} of one device for {runs}, if sources ran in each epoch;"
                f" the cache is cheaper from run {plan.break_even_students} on"
            ),
        )


def _speed(plan: "CachePlan", name: str) -> list[str]:
    if name not in plan.latents or not plan.latents[name].batch_seconds:
        return ["", ""]
    modality = plan.latents[name]
    least, median, most = (seconds * modality.images / 3600 for seconds in modality.seconds_per_image)
    return [f"{1 / modality.seconds_per_image[1]:.1f}", _range((least, median, most), as_duration)]


def _range(values: tuple[float, float, float], in_words: Callable[[float], str]) -> str:
    least, expected, most = map(in_words, values)
    return expected if least == most else f"{expected} ({least} to {most})"


def as_duration(hours: float) -> str:
    """Hours in the unit that keeps the number short: `1.5 s`, `12 min`, `3.4 h`, `12,300 h`."""
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:,.1f} h"
