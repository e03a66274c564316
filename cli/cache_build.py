"""`dla cache build`: fill a store."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.build_progress import WAITS_FOR, BuildReporter
from cli.cache_audit import MaskNames, SynonymsPath, mask_names, show_captions
from cli.cache_plan import require_plan_alone
from cli.cache_spec import (
    HeldAs,
    ImageFolder,
    ModalityName,
    Overrides,
    SourceName,
    SpecPath,
    find_own_modules,
    read_cache_spec,
)
from cli.device import require_devices
from cli.render import as_percent, counted, left_out
from cli.signals import stop_on_signals
from dla_cache.errors import StoreError, name_some
from dla_cache.shares import parse_allowance

if TYPE_CHECKING:
    from dla_cache.build import BuildReport
    from dla_cache.spec import CacheSpec


def build_command(
    context: typer.Context,
    spec_path: SpecPath = None,
    manifest_path: Annotated[Path | None, typer.Option("--manifest", help="Image list, a Parquet file.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="STORE", help="Folder of the store, or its URL; made if absent.")
    ] = None,
    plan_path: Annotated[
        Path | None, typer.Option("--plan", help="In place of SPEC, --manifest and --out: what dla cache plan wrote.")
    ] = None,
    source: SourceName = None,
    modality: ModalityName = None,
    images: ImageFolder = None,
    image_encoding: HeldAs = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="Where sources run: cpu, cuda:1; several as cuda:0,cuda:1, a process each; auto: all GPUs."
        ),
    ] = "auto",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images in every call of a source; recorded with the latents.")
    ] = 64,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Number of this process among --world-size.")] = 0,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Processes that build together.")] = 1,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First read every committed shard and make damaged ones again.")
    ] = False,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add those images of the manifest that the store has not, behind the others."),
    ] = False,
    allow_bad: Annotated[
        str, typer.Option("--allow-bad", metavar="N|P%", help="Leave so many images without a latent out of the store.")
    ] = "0",
    mask_class_names: MaskNames = False,
    synonyms_path: SynonymsPath = None,
    progress_path: Annotated[
        Path | None, typer.Option("--progress", help="Write progress here, a JSON object a line.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Compute and store the latents of a manifest. Run it again to go on where it stopped."""
    from dla_cache.build import build_cache
    from dla_cache.leaks import read_synonyms
    from dla_cache.manifest import read_manifest
    from dla_cache.passes import OpenSource
    from dla_cache.plan import PlannedSources, planned_manifest, read_plan
    from dla_cache.sources import open_source

    if rank >= world_size:
        raise typer.BadParameter(f"{rank} does not lie below --world-size {world_size}", param_hint="--rank")
    try:
        allowance = parse_allowance(allow_bad)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--allow-bad") from error
    plan = None
    if plan_path is not None:
        require_plan_alone(context)
        plan = read_plan(plan_path)
        find_own_modules(entry.source for entry in plan.spec.latents)
        spec, out, batch_size, device = plan.spec, plan.store, plan.batch_size, plan.device
        repair, append = plan.repair, plan.append
    else:
        for option, value in (("--manifest", manifest_path), ("--out", out)):
            if value is None:
                raise typer.BadParameter("name one, or a plan with --plan", param_hint=option)
        spec = read_cache_spec(spec_path, source, modality, image_encoding, overrides or [])
        if mask_class_names:
            assert manifest_path is not None
            spec = mask_names(spec, manifest_path, synonyms_path)
    assert out is not None
    if dry_run:
        typer.echo(spec.model_dump_json(indent=2))
        return
    device = require_devices(device)
    opening: OpenSource = open_source
    if plan is not None:
        manifest, opening = planned_manifest(plan), PlannedSources(plan)
    else:
        assert manifest_path is not None
        manifest = read_manifest(manifest_path)
        if images is not None:
            manifest = replace(manifest, root=images)
    synonyms = {} if synonyms_path is None else read_synonyms(synonyms_path, manifest.class_names)
    with BuildReporter(progress_path) as reporter, stop_on_signals() as should_stop:
        report = build_cache(
            manifest,
            spec,
            out,
            open_source=opening,
            device=device,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            repair=repair,
            append=append,
            allow_bad=allowance,
            synonyms=synonyms,
            on_progress=reporter,
            should_stop=should_stop,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(report), "images_per_s": report.images_per_s}))
    else:
        _show(report, out, spec, batch_size, is_repair=repair)
        show_captions(out, spec)
    if report.shards_changed:
        raise StoreError(
            f"`{out}` is whole, but {len(report.shards_changed)} shards that were made again hold another content"
            f" than before: {name_some(report.shards_changed)}",
            hint="another device or library version computes other numbers: train again what was trained on this"
            " store, or restore the old shards from a copy",
        )


def _show(report: "BuildReport", out: str, spec: "CacheSpec", batch_size: int, *, is_repair: bool) -> None:
    typer.echo(f"store         {out}, {counted(report.n_images, 'image')}")
    if report.images_left_out:
        typer.echo(left_out(report.images_left_out))
    for image_id, reason in report.put_aside.items():
        typer.echo(f"put aside     `{image_id}` {reason}")
    typer.echo(f"encoded       {counted(report.images_encoded, 'image')}, {report.images_per_s:.1f} images/s")
    if report.device_busy is not None and report.bottleneck is not None:
        waiting = "" if report.bottleneck == "device" else f"; it waited for {WAITS_FOR[report.bottleneck]}"
        typer.echo(f"device        busy {as_percent(report.device_busy)} of the time{waiting}")
    for name, size in report.batch_sizes.items():
        if size < batch_size:
            typer.echo(f"memory        {name}: the device held {size} images at a time, not {batch_size}")
    if spec.images != "none":
        held = "the bytes of" if spec.images == "original" else f"as {spec.images},"
        typer.echo(f"stored        {held} {counted(report.images_stored, 'image')}")
    if is_repair:
        as_before = report.shards_repaired - len(report.shards_changed) - report.shards_without_removed
        without = f", {report.shards_without_removed} without removed images" if report.shards_without_removed else ""
        shards = counted(report.shards_repaired, "shard")
        typer.echo(f"made again    {shards}, {as_before} with the content they had{without}")
    missing = f"none yet, {counted(report.shards_missing, 'shard')} of other ranks missing"
    typer.echo(f"content hash  {report.content_hash or missing}")
