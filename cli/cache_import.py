"""`dla cache import`: latents that somebody else made."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.render import ProgressReporter, counted, left_out
from cli.signals import stop_on_signals
from dla_cache.errors import name_some


class KindOption(StrEnum):
    """As `LatentFormat.kind`."""

    CONTINUOUS = "continuous"
    CODES = "codes"


class DtypeOption(StrEnum):
    """As `LatentSpec.dtype`."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class LayoutOption(StrEnum):
    """As `CacheSpec.layout`."""

    ZARR = "zarr"
    WEBDATASET = "webdataset"


class MissingOption(StrEnum):
    """What becomes of an image without a latent."""

    ERROR = "error"
    SKIP = "skip"


def import_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of .npy, .safetensors or .pt files.")],
    manifest_path: Annotated[Path, typer.Option("--manifest", help="Image list, a Parquet file.")],
    modality: Annotated[
        str, typer.Option("--modality", help="depth, audio, shape, motion or normals; pc and 3d mean shape.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the store; made if absent.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of this set of latents; the folder's if not given.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Tensor to take from files that hold several.")] = None,
    kind: Annotated[KindOption, typer.Option("--kind", help="Real numbers, or codes.")] = KindOption.CONTINUOUS,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", min=1, help="Number of codes, with --kind codes.")
    ] = None,
    axes: Annotated[
        str | None, typer.Option("--axes", help="Meaning of each axis, such as channel,height,width or token,channel.")
    ] = None,
    dtype: Annotated[
        DtypeOption | None, typer.Option("--dtype", help="Stored type; float16 stays so, others become float32.")
    ] = None,
    layout: Annotated[LayoutOption, typer.Option("--layout", help="How a new store lies on disk.")] = LayoutOption.ZARR,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, max=1_000_000, help="Images per shard.")] = 512,
    missing: Annotated[
        MissingOption, typer.Option("--missing", help="Images without a latent: an error, or left out.")
    ] = MissingOption.ERROR,
    allow_extra: Annotated[
        bool, typer.Option("--allow-extra", help="Leave out latents that belong to no image.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Store ready-made latents, one file an image, named by image ID or image path. Run it again to go on."""
    from dla_cache.imports import import_latents, parse_modality
    from dla_cache.manifest import read_manifest

    if (kind is KindOption.CODES) != (vocabulary is not None):
        raise typer.BadParameter("--kind codes and --vocabulary N go together", param_hint="--vocabulary")
    if kind is KindOption.CODES and dtype is not None:
        raise typer.BadParameter("codes take the smallest integer that holds them", param_hint="--dtype")
    chosen = parse_modality(modality)
    manifest = read_manifest(manifest_path)
    with ProgressReporter("import", "images") as reporter, stop_on_signals() as should_stop:
        report = import_latents(
            folder,
            manifest,
            chosen,
            out,
            name=name,
            key=key,
            kind=kind.value,
            vocabulary=vocabulary,
            axes=[axis.strip() for axis in axes.split(",")] if axes is not None else None,
            dtype=None if dtype is None else dtype.value,
            layout=layout.value,
            shard_size=shard_size,
            skip_missing=missing is MissingOption.SKIP,
            allow_extra=allow_extra,
            on_progress=reporter.update,
            should_stop=should_stop,
        )
    if as_json:
        typer.echo(json.dumps({**asdict(report), "recipe": report.recipe.model_dump(mode="json")}))
        return
    latent = report.recipe.format
    typer.echo(f"store         {out}, {report.n_images} of the manifest's {counted(len(manifest), 'image')}")
    if report.images_left_out:
        typer.echo(left_out(report.images_left_out))
    typer.echo(f"latents       {chosen.value}, {latent.dtype} {list(latent.shape)} ({', '.join(latent.axes)})")
    typer.echo(f"source        {report.recipe.source}")
    typer.echo(f"imported      {counted(report.images_imported, 'image')}")
    for what, names in (
        ("left out", [f"{image_id} (no latent)" for image_id in report.missing]),
        ("extra", report.extra),
        ("no latents", report.ignored),
    ):
        if names:
            typer.echo(f"{what:<13} {len(names)}: {name_some(names)}")
    typer.echo(f"content hash  {report.content_hash or 'none yet: another modality misses shards'}")
