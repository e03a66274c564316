"""`dla cache`: fill a store, and see what it holds."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cache_adopt import adopt_command
from cli.cache_audit import audit_command
from cli.cache_build import build_command
from cli.cache_check import diff_command, explain_command, verify_command
from cli.cache_control import control_command
from cli.cache_convert import convert_command
from cli.cache_import import import_command
from cli.cache_manage import du_command, ls_command, prune_command, rm_command, takedown_command
from cli.cache_merge import merge_command
from cli.cache_plan import plan_command
from cli.render import as_size, print_table
from cli.sheet import draw_cache_sheet

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


app.command("plan")(plan_command)
app.command("build")(build_command)


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
app.command("control")(control_command)
app.command("merge")(merge_command)
app.command("verify")(verify_command)
app.command("audit")(audit_command)
app.command("adopt")(adopt_command)
app.command("explain")(explain_command)
app.command("diff")(diff_command)
app.command("import")(import_command)
app.command("takedown")(takedown_command)
app.command("ls")(ls_command)
app.command("du")(du_command)
app.command("prune")(prune_command)
app.command("rm")(rm_command)
