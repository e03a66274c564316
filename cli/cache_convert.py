"""`dla cache convert`: a store in another layout, or in fewer bits."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from cli.render import ProgressReporter, as_size, counted
from cli.signals import stop_on_signals

if TYPE_CHECKING:
    from dla_cache.store import LatentStore
    from dla_cache.store.exchange import ConvertPlan, FloatDtype


def convert_command(
    source_path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store to read.")],
    target_path: Annotated[Path, typer.Argument(metavar="NEW", help="Folder of the store to write; made if absent.")],
    layout: Annotated[
        Literal["zarr", "webdataset"] | None,
        typer.Option("--layout", help="How it lies on disk: Zarr arrays, or WebDataset tars; as it does, if absent."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="[MODALITY=]TYPE",
            help="Round to float16, bfloat16 or int8, all modalities of real numbers or one; can be given again.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write a store in another layout or in fewer bits, all of it checked. Run it again to go on where it stopped."""
    from dla_cache.card import write_card
    from dla_cache.describe import describe_rounding
    from dla_cache.store import open_store
    from dla_cache.store.exchange import convert_store, plan_conversion

    if layout is None and not dtype:
        raise typer.BadParameter("say what is to change, with --layout or --dtype", param_hint="--layout")
    source = open_store(source_path)
    chosen_layout = layout or source.layout_name
    dtypes = chosen_dtypes(source, dtype or [])
    if dry_run:
        _show_plan(plan_conversion(source, target_path, chosen_layout, dtypes=dtypes), target_path, as_json)
        return
    with ProgressReporter("convert", "shards") as reporter, stop_on_signals() as should_stop:
        report = convert_store(
            source, target_path, chosen_layout, dtypes=dtypes, on_progress=reporter.update, should_stop=should_stop
        )
    target = open_store(target_path)
    write_card(target)
    rounded = {modality: describe_rounding(target, modality) for modality in report.rounded}
    if as_json:
        errors = {modality: None if loss is None else loss.facts for modality, loss in rounded.items()}
        typer.echo(json.dumps({**asdict(report), "errors": errors}))
        return
    typer.echo(f"store         {target_path}, {chosen_layout}, {counted(report.n_images, 'image')}")
    typer.echo(f"written       {counted(report.shards_written, 'shard')} of {', '.join(report.series)}")
    for modality, (before, after) in report.rounded.items():
        loss = rounded[modality]
        typer.echo(f"rounded       {modality}, {before} to {after}: {loss.in_words if loss else 'nothing lost'}")
    typer.echo(f"content hash  {report.content_hash}")
    if report.content_hash != report.source_content_hash:
        typer.echo(f"before        {report.source_content_hash}, of `{source_path}`")


def _show_plan(plan: "ConvertPlan", target_path: Path, as_json: bool) -> None:
    metadata = plan.metadata
    if as_json:
        facts = {"layout": metadata.layout.name, "n_images": metadata.rows.n_kept, "series": list(metadata.series)}
        sizes = {"shards_missing": plan.shards_missing, "size_bytes": plan.size_bytes, "rounded": plan.rounded}
        typer.echo(json.dumps({"dry_run": True, **facts, **sizes}))
        return
    typer.echo(f"store         {target_path}, {metadata.layout.name}, {counted(metadata.rows.n_kept, 'image')}")
    for modality, (before, after) in plan.rounded.items():
        typer.echo(f"would round   {modality}, {before} to {after}")
    shards = counted(plan.shards_missing, "shard")
    typer.echo(f"would write   {shards} of {', '.join(metadata.series)}, about {as_size(plan.size_bytes)} in all")


def chosen_dtypes(store: "LatentStore", choices: Sequence[str]) -> "dict[str, FloatDtype]":
    """What `--dtype` says of each modality; one without a modality is for all of real numbers.

    Raises:
        typer.BadParameter: for another type, a modality named twice, or no modality of real numbers.
        MissingLatentError: if the store has no such modality.
    """
    from dla_cache.store.exchange import FloatDtype

    known: dict[str, FloatDtype] = {dtype: dtype for dtype in get_args(FloatDtype)}
    chosen: dict[str, FloatDtype] = {}
    for choice in choices:
        modality, _, name = choice.rpartition("=")
        if name not in known:
            smaller = ", ".join(dtype for dtype in known if dtype != "float32")
            raise typer.BadParameter(f"`{name}` is none of {smaller}", param_hint="--dtype")
        if modality:
            store.recipe(modality)
        names = [modality] if modality else [n for n in store.modalities if store.recipe(n).format.kind != "codes"]
        if not names or chosen.keys() & set(names):
            fault = "names a modality twice" if names else "finds no modality of real numbers"
            raise typer.BadParameter(f"`{choice}` {fault}", param_hint="--dtype")
        chosen.update(dict.fromkeys(names, known[name]))
    return chosen
