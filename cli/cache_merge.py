"""`dla cache merge`: several stores as one, or one without its gaps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli.render import ProgressReporter, as_size, counted
from cli.signals import stop_on_signals

if TYPE_CHECKING:
    from dla_cache.merge_plan import MergePlan


def merge_command(
    source_paths: Annotated[list[Path], typer.Argument(metavar="STORE", help="Folders of the stores to read.")],
    target_path: Annotated[Path, typer.Option("--out", help="Folder of the store to write; made if absent.")],
    layout: Annotated[
        Literal["zarr", "webdataset"] | None,
        typer.Option("--layout", help="How it lies on disk: Zarr arrays, or WebDataset tars; as the first, if absent."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option("--shard-size", min=1, max=1_000_000, help="Images per shard; as in the first store, if absent."),
    ] = None,
    missing: Annotated[
        Literal["error", "skip"],
        typer.Option("--missing", help="Whether an image without a latent of every modality is refused or left out."),
    ] = "error",
    with_images: Annotated[
        bool,
        typer.Option(
            "--with-images", help="Refuse stores whose images cannot be merged, in place of leaving them out."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write one store of all images of some stores, joined by ID, or one store without gaps and removed rows. Run it
    again to go on where it stopped.
    """
    from dla_cache.merge import merge_stores
    from dla_cache.merge_plan import plan_merge
    from dla_cache.store import open_store

    plan = plan_merge(
        [open_store(path) for path in source_paths],
        target_path,
        layout=layout,
        shard_size=shard_size,
        missing=missing,
        with_images=with_images,
    )
    if dry_run:
        if as_json:
            typer.echo(json.dumps({"dry_run": True, **plan.facts}))
            return
        _show_plan(plan, target_path)
        typer.echo(f"would write   {counted(plan.shards_missing, 'shard')}, about {as_size(plan.size_bytes)} in all")
        return
    with ProgressReporter("merge", "shards") as reporter, stop_on_signals() as should_stop:
        report = merge_stores(plan, target_path, on_progress=reporter.update, should_stop=should_stop)
    if as_json:
        done = {"shards_written": report.shards_written, "content_hash": report.content_hash}
        typer.echo(json.dumps({"dry_run": False, **plan.facts, "shards_missing": 0, **done}))
        return
    _show_plan(plan, target_path)
    typer.echo(f"written       {counted(report.shards_written, 'shard')}")
    typer.echo(f"content hash  {report.content_hash}")


def _show_plan(plan: "MergePlan", target_path: Path) -> None:
    metadata = plan.metadata
    size = counted(metadata.shard_size, "image")
    typer.echo(
        f"store         {target_path}, {metadata.layout.name}, {counted(plan.n_images, 'image')}, {size} a shard"
    )
    found = ", ".join(f"{name} of {n_images:,}" for name, n_images in plan.coverage.items())
    typer.echo(f"found         {counted(plan.n_known, 'image')}: {found}")
    if metadata.images is not None:
        typer.echo(f"images        {metadata.images}")
    for what in plan.left_out:
        typer.echo(f"left out      {what}")
