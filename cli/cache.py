"""`dla cache`: fill a store, and see what it holds."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.cache_adopt import adopt_command
from cli.cache_check import diff_command, explain_command, verify_command
from cli.cache_convert import convert_command
from cli.cache_import import import_command
from cli.cache_manage import du_command, ls_command, prune_command, rm_command, takedown_command
from cli.cache_merge import merge_command
from cli.device import require_device
from cli.render import ProgressReporter, as_size, counted, left_out, print_table
from cli.settings import apply_overrides
from cli.sheet import draw_cache_sheet
from cli.signals import stop_on_signals
from dla_cache.errors import StoreError, name_some

if TYPE_CHECKING:
    from dla_cache.describe import ImageDescription

app = typer.Typer(help="The cache of undecoded latents.", no_args_is_help=True)

PICTURE_STRIDE = 5
"""A contact sheet shows every fifth image: renders of one digit lie side by side."""

StorePlace = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder of the store, or its URL, s3://bucket/prefix.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.callback()
def group() -> None:
    """The cache of undecoded latents."""


@app.command()
def build(
    manifest_path: Annotated[Path, typer.Option("--manifest", help="Image list, a Parquet file.")],
    out: Annotated[
        str, typer.Option("--out", metavar="STORE", help="Folder of the store, or its URL; made if absent.")
    ],
    spec_path: Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="Cache spec, a YAML file.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="In place of SPEC: one source, or a class of yours, module:Class.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="With --source: what it makes, if dla does not know it.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder the images' paths start from; the manifest's if absent.")
    ] = None,
    image_encoding: Annotated[
        Literal["none", "original", "jpeg", "raw"] | None,
        typer.Option("--image-encoding", help="Hold the images in the store, too: the field `images` of the spec."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where sources run: cpu, cuda, cuda:1.")] = "cpu",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per call of a source; changes no latent.")
    ] = 64,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Number of this process among --world-size.")] = 0,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Processes that build together.")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one field of the spec; repeatable.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="First read every committed shard and make damaged ones again.")
    ] = False,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add those images of the manifest that the store has not, behind the others."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved spec and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute and store the latents of a manifest. Run it again to go on where it stopped."""
    from dla_cache.build import BuildProgress, build_cache
    from dla_cache.manifest import read_manifest
    from dla_cache.sources import open_source
    from dla_cache.spec import CacheSpec, parse_spec

    if rank >= world_size:
        raise typer.BadParameter(f"{rank} does not lie below --world-size {world_size}", param_hint="--rank")
    fields = _spec_fields(spec_path, source, modality)
    if image_encoding is not None:
        fields["images"] = image_encoding
    fields = apply_overrides(fields, overrides or [])
    spec = parse_spec(fields, CacheSpec, where=str(spec_path or "--source"))
    if any(":" in entry.source for entry in spec.latents):
        sys.path.insert(0, str(Path.cwd()))  # where a user's own module lies; an installed `dla` does not look there
    if dry_run:
        typer.echo(spec.model_dump_json(indent=2))
        return
    require_device(device)
    manifest = read_manifest(manifest_path)
    if images is not None:
        manifest = replace(manifest, root=images)
    with ProgressReporter("build", "images") as reporter, stop_on_signals() as should_stop:

        def show(progress: BuildProgress) -> None:
            note = f"{progress.modality}, shard {progress.shard} of {progress.n_shards}"
            if progress.is_waiting:
                note += ", which another builder has"
            reporter.update(progress.images_done, progress.images_total, note)

        report = build_cache(
            manifest,
            spec,
            out,
            open_source=open_source,
            device=device,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            repair=repair,
            append=append,
            on_progress=show,
            should_stop=should_stop,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(report), "images_per_s": report.images_per_s}))
    else:
        typer.echo(f"store         {out}, {counted(report.n_images, 'image')}")
        if report.images_left_out:
            typer.echo(left_out(report.images_left_out))
        typer.echo(f"encoded       {counted(report.images_encoded, 'image')}, {report.images_per_s:.1f} images/s")
        if spec.images != "none":
            held = "the bytes of" if spec.images == "original" else f"as {spec.images},"
            typer.echo(f"stored        {held} {counted(report.images_stored, 'image')}")
        if repair:
            as_before = report.shards_repaired - len(report.shards_changed) - report.shards_without_removed
            without = (
                f", {report.shards_without_removed} without removed images" if report.shards_without_removed else ""
            )
            shards = counted(report.shards_repaired, "shard")
            typer.echo(f"made again    {shards}, {as_before} with the content they had{without}")
        missing = f"none yet, {counted(report.shards_missing, 'shard')} of other ranks missing"
        typer.echo(f"content hash  {report.content_hash or missing}")
    if report.shards_changed:
        raise StoreError(
            f"`{out}` is whole, but {len(report.shards_changed)} shards that were made again hold another content"
            f" than before: {name_some(report.shards_changed)}",
            hint="another device or library version computes other numbers: train again what was trained on this"
            " store, or restore the old shards from a copy",
        )


def _spec_fields(spec_path: Path | None, source: str | None, modality: str | None) -> dict[str, Any]:
    """The fields of the spec file, or of the spec that `--source` stands for."""
    from dla_cache.sources import SOURCES
    from dla_cache.spec import load_yaml

    if (spec_path is None) == (source is None):
        raise typer.BadParameter("name either a spec file or one --source", param_hint="SPEC")
    if spec_path is not None:
        if modality is not None:
            raise typer.BadParameter("it goes with --source; a spec file says it itself", param_hint="--modality")
        return load_yaml(spec_path)
    assert source is not None
    if modality is None and source in SOURCES:
        modality = SOURCES[source].modality.value
    if modality is None:
        raise typer.BadParameter(
            f"dla does not know what `{source}` makes; its own sources are {', '.join(SOURCES)}",
            param_hint="--modality",
        )
    return {"latents": [{"source": source, "modality": modality}]}


@app.command()
def status(store_path: StorePlace, as_json: AsJson = False) -> None:
    """Show what is committed and what is missing."""
    from dla_cache.describe import describe_store
    from dla_cache.store import open_store

    store = open_store(store_path)
    state = describe_store(store)
    if as_json:
        typer.echo(json.dumps(asdict(state)))
        return
    print_table(
        ["modality", "shards", "images", "size", "bytes/image", "recipe"],
        [
            [
                part.modality,
                f"{part.shards}/{part.shards_planned}",
                f"{part.images}/{state.images}",
                as_size(part.size_bytes),
                f"{part.bytes_per_image:.0f}",
                part.recipe_hash[:16],
            ]
            for part in (*state.modalities, *([state.image_bytes] if state.image_bytes else []))
        ],
    )
    splits = ", ".join(f"{split} {count}" for split, count in state.images_per_split.items())
    typer.echo(f"layout        {state.layout}")
    if store.metadata.images is not None:
        typer.echo(f"images        {store.metadata.images}")
    typer.echo(f"splits        {splits}")
    typer.echo(f"content hash  {state.content_hash or 'none yet: run `dla cache build` again'}")


@app.command()
def inspect(
    store_path: StorePlace,
    image_id: Annotated[str | None, typer.Option("--image-id", help="Show the latents of this image.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw eight images and their latents into this PNG.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", help="With --picture: folder the images' paths start from; not for a store that holds them."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show recipes and statistics, or one image's row and latents."""
    from dla_cache.describe import describe_image, describe_modality
    from dla_cache.store import open_store

    if images is not None and picture is None:
        raise typer.BadParameter("it is for drawing: name a --picture, too", param_hint="--images")
    store = open_store(store_path)
    if picture is not None:
        if images is None and not store.has_images:
            raise typer.BadParameter("this store holds no images: name their folder", param_hint="--images")
        first = store.rows.kept_ids[: 8 * PICTURE_STRIDE : PICTURE_STRIDE]
        draw_cache_sheet(store, images, [image_id] if image_id is not None else first, picture)
        typer.echo(json.dumps({"picture": str(picture)}) if as_json else f"picture {picture}")
        return
    if image_id is not None:
        _show_image(describe_image(store, image_id), store.class_names, as_json)
        return
    modalities = {modality: describe_modality(store, modality) for modality in store.modalities}
    if as_json:
        typer.echo(json.dumps({modality: asdict(part) for modality, part in modalities.items()}))
        return
    for modality, part in modalities.items():
        typer.echo(f"{modality}, recipe {part.recipe_hash}")
        for name, value in part.recipe.items():
            typer.echo(f"  {name:<18}{json.dumps(value, ensure_ascii=False)}")
        if part.statistics and part.recipe["format"]["kind"] == "continuous":
            lost = part.rounding.in_words if part.rounding else "nothing lost"
            typer.echo(f"  stored as         {part.recipe['format']['dtype']}, {lost}")
        print_table(
            ["  split", "images", "channel", "mean", "std", "minimum", "maximum"],
            [
                [f"  {split}", moments["count"], channel, *(f"{value:.4f}" for value in values)]
                for split, moments in part.statistics.items()
                for channel, values in enumerate(
                    zip(*(moments[name] for name in ("mean", "std", "minimum", "maximum")), strict=True)
                )
            ],
        )


def _show_image(description: "ImageDescription", class_names: Sequence[str], as_json: bool) -> None:
    from dla_cache.manifest import classes_of

    image = asdict(description.image)
    latents = {modality: moments.model_dump() for modality, moments in description.latents.items()}
    if as_json:
        facts = {"image": image, "shard": description.shard, "image_bytes": description.image_bytes}
        typer.echo(json.dumps({**facts, "latents": latents}))
        return
    stored = {} if description.image_bytes is None else {"bytes": description.image_bytes}
    if description.image.label is not None:
        image["label"] = ", ".join(f"{index} {class_names[index]}" for index in classes_of(description.image.label))
    for name, value in {**image, "shard": description.shard, **stored}.items():
        typer.echo(f"{name:<10}{value}")
    print_table(
        ["modality", "channel", "mean", "std", "minimum", "maximum"],
        [
            [modality, channel, *(f"{value:.4f}" for value in (mean, variance**0.5, minimum, maximum))]
            for modality, moments in description.latents.items()
            for channel, (mean, variance, minimum, maximum) in enumerate(
                zip(moments.mean, moments.variance, moments.minimum, moments.maximum, strict=True)
            )
        ],
    )


app.command("convert")(convert_command)
app.command("merge")(merge_command)
app.command("verify")(verify_command)
app.command("adopt")(adopt_command)
app.command("explain")(explain_command)
app.command("diff")(diff_command)
app.command("import")(import_command)
app.command("takedown")(takedown_command)
app.command("ls")(ls_command)
app.command("du")(du_command)
app.command("prune")(prune_command)
app.command("rm")(rm_command)
