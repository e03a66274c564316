"""`dla cache`: what a store holds is what was written, what a source makes now, and what another store holds."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cache_adopt import AsJson, RecomputeFolder, as_line
from cli.cache_spec import find_own_modules
from cli.device import require_device
from cli.render import ProgressReporter, as_size, counted, left_out, print_table
from dla_cache.errors import CorruptShardError, StoreError, name_some

if TYPE_CHECKING:
    from dla_cache.compare import StoreDiff
    from dla_cache.recompute import Recomputed
    from dla_cache.spec import CacheSpec
    from dla_cache.store import LatentStore
    from dla_cache.verify import VerifyReport

StorePlace = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder of the store, or its URL, s3://bucket/prefix.")
]

SHOWN_IMAGES = 5
SHOWN_SHARDS = 10


def verify_command(
    store_path: StorePlace,
    manifest_path: Annotated[Path | None, typer.Option("--manifest", help="Compare with this manifest, too.")] = None,
    recompute_images: Annotated[
        int | None,
        typer.Option("--recompute", min=1, metavar="N", help="Compute the latents of N random images again, too."),
    ] = None,
    images: RecomputeFolder = None,
    spec_path: Annotated[
        Path | None,
        typer.Option("--spec", help="With --recompute: what the store was built of, to say where weights lie."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0,
            help="With --recompute: difference allowed, in standard deviations of a channel; by default what the source"
            " says of itself.",
        ),
    ] = None,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample",
            metavar="SHARE|N",
            help="Read a share of the shards, as 0.1, or so many, as 100, drawn at random.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which shards --sample draws, and which images --recompute.")
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Shards that are read at a time; one a core if not given.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="With --recompute: where sources run.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Read every byte of a store, or of some shards, and check it against its records; with --recompute also against
    its sources."""
    from dla_cache.manifest import read_manifest
    from dla_cache.recompute import holds_files
    from dla_cache.spec import CacheSpec, read_yaml
    from dla_cache.store import open_store
    from dla_cache.store.files import MOVE_AWAY
    from dla_cache.verify import verify_store

    for option, value in (("--images", images), ("--spec", spec_path)):
        if recompute_images is None and value is not None:
            raise typer.BadParameter("it is for --recompute, which is missing", param_hint=option)
    spec = None if spec_path is None else read_yaml(spec_path, CacheSpec)
    if sample is not None and not (0 < sample < 1 or (sample >= 1 and sample.is_integer())):
        raise typer.BadParameter("a share below 1, or a whole number of shards", param_hint="--sample")
    store = open_store(store_path)
    manifest = None if manifest_path is None else read_manifest(manifest_path)
    with ProgressReporter("verify", "shards") as reporter:
        report = verify_store(store, manifest, sample=sample, seed=seed, jobs=jobs, on_progress=reporter.update)
    recomputed = None
    if recompute_images is not None and not report.problems:
        image_root = images or (None if holds_files(store) or manifest is None else manifest.root)
        recomputed = _recompute(store, image_root, recompute_images, seed, device, spec)
    if as_json:
        live = {} if recomputed is None else {"recomputed": [asdict(one) for one in recomputed]}
        adopted = {"adopted": [one.model_dump(mode="json") for one in report.adopted]}
        typer.echo(json.dumps(asdict(report) | adopted | live))
    else:
        _show_verified(report)
        if recomputed is not None:
            _show_recomputed(recomputed)
    if report.problems:
        to_move = [problem.where for problem in report.problems if problem.what.endswith(MOVE_AWAY)]
        cures = []
        if len(to_move) < len(report.problems):
            cures.append(
                "`dla cache build` makes what is missing, with `--repair` damaged shards too; the rest from a copy"
            )
        if to_move:
            cures.append(f"move away what no store has written: {name_some(to_move)}")
        raise CorruptShardError(f"{counted(len(report.problems), 'problem')} in `{store_path}`", hint="; ".join(cures))
    beyond = [
        one.modality
        for one in recomputed or ()
        if (not one.is_within if tolerance is None else one.largest_difference > tolerance)
    ]
    if beyond:
        allowed = "what they say of themselves" if tolerance is None else f"{tolerance:g}"
        raise StoreError(
            f"what the sources make now differs from `{store_path}` beyond {allowed}: {name_some(beyond)}",
            hint="another device or library version computes other numbers: see how much above, and if it is harmless"
            " say so by `--tolerance`; if not, build a new store",
        )


def _recompute(
    store: "LatentStore", image_root: Path | None, n_images: int, seed: int, device: str, spec: "CacheSpec | None"
) -> "list[Recomputed]":
    from dla_cache.card import is_imported
    from dla_cache.recompute import holds_files, recompute
    from dla_cache.sources import open_source

    if image_root is None and not holds_files(store):
        held = "smaller pictures, and its sources saw the files" if store.has_images else "no images"
        raise typer.BadParameter(f"this store holds {held}: name their folder or --manifest", param_hint="--images")
    imported = [name for name in store.modalities if is_imported(store.recipe(name))]
    live = [name for name in store.modalities if name not in imported]
    if not live:
        raise StoreError(
            f"all latents of `{store.place}` were imported: there is no source to compute them again",
            hint="leave out `--recompute`",
        )
    for name in imported:
        typer.echo(f"not computed again: `{name}`, whose latents were imported", err=True)
    require_device(device)
    find_own_modules(store.recipe(name).source for name in live)
    with ProgressReporter("recompute", "latents") as reporter:
        return recompute(
            store,
            image_root,
            n_images,
            open_source=open_source,
            modalities=live,
            device=device,
            seed=seed,
            spec=spec,
            on_progress=reporter.update,
        )


def _show_verified(report: "VerifyReport") -> None:
    for problem in report.problems:
        typer.echo(f"{problem.where}: {problem.what}")
    if report.n_removed:
        typer.echo(left_out(report.n_removed))
    typer.echo(f"checked       {counted(report.shards_checked, 'shard')}, {as_size(report.bytes_checked)}")
    if report.sample is not None:
        for series, shards in report.sample.read.items():
            unread = report.sample.unread[series]
            named = name_some([str(shard) for shard in shards], SHOWN_SHARDS).replace("`", "")
            typer.echo(f"              {series}: {len(shards)} of {counted(len(shards) + unread, 'shard')}: {named}")
        n_unread = sum(report.sample.unread.values())
        typer.echo(f"not read      {counted(n_unread, 'shard')}: of these only presence and size were compared")
    for one in report.adopted:
        typer.echo(f"adopted       {as_line(one)}; {one.who}, {one.when[:10]}: {one.why}")
    is_all = not report.problems and report.sample is None
    of_records = "" if is_all or not report.content_hash else " by the records alone"
    typer.echo(f"content hash  {report.content_hash or 'none: shards are missing'}{of_records}")


def _show_recomputed(recomputed: "Sequence[Recomputed]") -> None:
    for one in recomputed:
        said = f"recomputed    {one.modality}: {one.n_equal} of {counted(one.n_images, 'image')} equal, byte for byte"
        if one.worst is not None:
            said += f"; largest difference {one.largest_difference:.3g}, of `{one.worst}`"
        typer.echo(said)


def explain_command(
    store_path: StorePlace,
    image_id: Annotated[str, typer.Argument(metavar="ID", help="An image's ID.")],
    manifest_path: Annotated[
        Path | None, typer.Option("--manifest", help="What a manifest, and its list of quarantined, say of it.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Whether the file in this folder is still the same.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say why one image is whole, missing, damaged, stale, removed, quarantined or unknown."""
    from dla_cache.explain import explain_image
    from dla_cache.store import open_store

    found = explain_image(open_store(store_path), image_id, manifest_path=manifest_path, image_root=images)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "state": found.state}))
        return
    typer.echo(f"{image_id} is {found.state}\n")
    print_table(("where", "state", "why"), [(finding.where, finding.state, finding.what) for finding in found.findings])


def diff_command(
    before_path: Annotated[str, typer.Argument(metavar="STORE", help="Folder of a store, or its URL.")],
    after_path: Annotated[str, typer.Argument(metavar="OTHER", help="Folder or URL of the store to compare it with.")],
    as_json: AsJson = False,
) -> None:
    """Compare two stores image by image: recipes, IDs, labels, latents. Exit code 1 if they hold different things."""
    from dla_cache.compare import compare_stores
    from dla_cache.store import open_store

    with ProgressReporter("diff", "latents") as reporter:
        found = compare_stores(open_store(before_path), open_store(after_path), on_progress=reporter.update)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "is_empty": found.is_empty}))
    else:
        _show_diff(found, before_path, after_path)
    if not found.is_empty:
        raise typer.Exit(1)


def _show_diff(found: "StoreDiff", before: str, after: str) -> None:
    for change in found.settings:
        typer.echo(change)
    for place, only in ((before, found.only_before), (after, found.only_after)):
        for what, image_ids in only.items():
            typer.echo(f"only in {place}: {_images_of(what, image_ids)}")
    for what, image_ids in {**found.rows, **found.latents}.items():
        if image_ids:
            typer.echo(f"another `{what}`: {counted(len(image_ids), 'image')}, {name_some(image_ids, SHOWN_IMAGES)}")
    verdict = "the same" if found.is_empty else "not the same"
    typer.echo(f"compared {counted(found.n_compared, 'image')} of both: {verdict}")


def _images_of(what: str, image_ids: Sequence[str]) -> str:
    named = name_some(image_ids, SHOWN_IMAGES)
    return (
        f"{counted(len(image_ids), 'image')}, {named}"
        if what == "images"
        else f"`{what}`, {counted(len(image_ids), 'image')}"
    )
