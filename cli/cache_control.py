"""`dla cache control`: a store of latents that know less than the real ones, to be compared with them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.render import ProgressReporter, as_size, counted
from cli.signals import stop_on_signals

if TYPE_CHECKING:
    from dla_cache.controls import ControlPlan


def control_command(
    source_path: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store with the real latents.")],
    target_path: Annotated[Path, typer.Argument(metavar="NEW", help="Folder of the store to write; made if absent.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="What an image gets in the place of its latent: shuffled, shuffled-within-class,"
            " shuffled-across-classes, gaussian, gaussian-by-place, label-embedding or fabricated.",
        ),
    ],
    modalities: Annotated[
        list[str] | None,
        typer.Option("--modality", help="Which modality; can be given again. All if absent; others are copied."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Decides all that is drawn.")] = 0,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Table of image_id and label, for images whose label the store does not tell."),
    ] = None,
    noise: Annotated[
        float | None, typer.Option("--noise", help="Of label-embedding: share of noise, 0 to 1; 0 if absent.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Of fabricated: store of another model's features, as of `dla train targets`."),
    ] = None,
    series: Annotated[
        str | None,
        typer.Option("--series", help="Of fabricated: which series of that store; pooled features if absent."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Write a store of control latents beside a real one: same images, same shapes, less known. Run it again to go on
    where it stopped.
    """
    from dla_cache.control_recipe import MEANINGS
    from dla_cache.controls import control_store, plan_control
    from dla_cache.store import open_store

    chosen = next((known for known in MEANINGS if known == kind), None)
    if chosen is None:
        raise typer.BadParameter(f"`{kind}` is none of {', '.join(MEANINGS)}", param_hint="--kind")
    source = open_store(source_path)
    opened = None if features is None else open_store(features)
    if dry_run:
        plan = plan_control(
            source, target_path, kind=chosen, seed=seed, modalities=modalities, labels=labels, noise=noise,
            features=opened, series=series,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps({"dry_run": True, **_facts(plan)}))
            return
        _show(plan, target_path)
        missing = counted(plan.shards_missing, "shard")
        typer.echo(f"would write   {missing} of {', '.join(plan.metadata.series)}, about {as_size(plan.size_bytes)}")
        return
    with ProgressReporter("control", "shards") as reporter, stop_on_signals() as should_stop:
        report = control_store(
            source, target_path, kind=chosen, seed=seed, modalities=modalities, labels=labels, noise=noise,
            features=opened, series=series, on_progress=reporter.update, should_stop=should_stop,
        )  # fmt: skip
    if as_json:
        done = {"shards_written": report.shards_written, "content_hash": report.content_hash}
        typer.echo(json.dumps({"dry_run": False, **_facts(report.plan), "shards_missing": 0, **done}))
        return
    _show(report.plan, target_path)
    typer.echo(f"written       {counted(report.shards_written, 'shard')} of {', '.join(report.plan.metadata.series)}")
    typer.echo(f"content hash  {report.content_hash}")


def _facts(plan: "ControlPlan") -> dict[str, object]:
    recipes = {name: plan.metadata.recipes[name].model_dump(mode="json") for name in plan.modalities}
    counts = {"n_images": plan.metadata.rows.n_kept, "n_own": plan.n_own, "n_same_class": plan.n_same_class}
    sizes = {"shards_missing": plan.shards_missing, "size_bytes": plan.size_bytes}
    return {"layout": plan.metadata.layout.name, **counts, **sizes, "recipes": recipes}


def _show(plan: "ControlPlan", target_path: Path) -> None:
    from dla_cache.control_recipe import control_note

    metadata = plan.metadata
    typer.echo(f"store         {target_path}, {metadata.layout.name}, {counted(metadata.rows.n_kept, 'image')}")
    for name in plan.modalities:
        typer.echo(f"control       {name}: {control_note(metadata.recipes[name]).removeprefix('control ')}")
    copied = [name for name in metadata.series if name not in plan.modalities]
    if copied:
        typer.echo(f"copied        {', '.join(copied)}")
    if plan.n_own is not None:
        of_class = "" if plan.n_same_class is None else f", one of their class {plan.n_same_class:,}"
        typer.echo(f"keep theirs   {counted(plan.n_own, 'image')}{of_class}")
