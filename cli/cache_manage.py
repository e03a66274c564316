"""`dla cache`: take images out of stores; list, measure, tidy and remove stores."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.render import ProgressReporter, as_size, counted, print_table
from dla_cache.errors import StoreError, name_some

if TYPE_CHECKING:
    from dla_cache.housekeeping import Removed
    from dla_cache.takedown import TakedownReport

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

SHOWN_FILES = 10

NOT_REACHED = (
    "not reached: image files, manifests, other stores, contact sheets in pages and pictures, predictions,\n"
    "             and models that were trained on the images"
)


def takedown_command(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE", help="Folders of stores.")],
    ids: Annotated[
        list[str], typer.Option("--ids", metavar="FILE|ID", help="An image ID, or a file with one a line; repeatable.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove images by ID, with latents and bytes, and check that they are gone. Run it again to finish.

    A later `dla cache build` or `import` goes on with the store and leaves them out, with the old manifest too.
    """
    from dla_cache.takedown import take_down

    image_ids = _read_ids(ids, stores)
    with ProgressReporter("takedown", "shards") as reporter:
        reports = take_down(stores, image_ids, dry_run=dry_run, on_progress=reporter.update)
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "stores": [asdict(report) for report in reports]}))
    else:
        _show_takedown(reports, dry_run)
    typer.echo(NOT_REACHED, err=True)


def _show_takedown(reports: Sequence["TakedownReport"], dry_run: bool) -> None:
    for report in reports:
        typer.echo(f"store         {report.store}")
        named = f": {name_some(report.removed)}" if report.removed else ""
        typer.echo(f"{'would remove' if dry_run else 'removed':<13} {counted(len(report.removed), 'image')}{named}")
        if report.already:
            typer.echo(f"before        {counted(len(report.already), 'image')}: {name_some(report.already)}")
        if report.same_bytes:
            typer.echo(
                f"same bytes    under another ID in {counted(len(report.same_bytes), 'image')}:"
                f" {name_some(report.same_bytes, SHOWN_FILES)}; name them as well to remove them"
            )
        what = "would rewrite" if dry_run else "rewritten"
        typer.echo(f"{what:<13} {counted(report.shards_rewritten, 'shard')}")
        if not dry_run:
            typer.echo(f"checked       {as_size(report.bytes_read)}: no trace of them under these IDs")
            typer.echo(f"content hash  {report.content_hash or 'none: shards are missing'}")


def _read_ids(given: Sequence[str], stores: Sequence[Path]) -> list[str]:
    from dla_cache.takedown import ids_of_file, is_path

    image_ids: list[str] = []
    for text in given:
        if not Path(text).is_file():
            image_ids.append(text)
            continue
        content = b""
        try:
            content = Path(text).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            meant = ids_of_file(stores, content)
            if meant == [text]:
                image_ids.append(text)
                continue
            if meant:
                raise is_path(text, meant) from error
            raise StoreError(
                f"`{text}` cannot be read: {error}",
                hint="a text file with one image ID a line; or an ID, not the path of an image",
            ) from error
        image_ids += [line.strip() for line in lines if line.strip()]
    if not image_ids:
        raise typer.BadParameter("it names no image", param_hint="--ids")
    return image_ids


def ls_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Where to look, and below; here if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the stores below folders: what they hold, whether they are complete, and their size."""
    from dla_cache.housekeeping import describe_entry, find_stores

    entries = [describe_entry(path) for path in find_stores(folders or [Path()])]
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries]))
        return
    print_table(
        ["store", "layout", "holds", "images", "complete", "size", "content hash"],
        [
            [
                entry.path,
                entry.layout or "-",
                ", ".join([*entry.modalities, *(["images"] if entry.has_images else [])]) or "-",
                "-" if entry.fault else entry.images,
                "DAMAGED" if entry.fault else "yes" if entry.is_complete else "no",
                as_size(entry.size_bytes),
                (entry.content_hash or "-")[:16],
            ]
            for entry in entries
        ],
    )
    for entry in entries:
        if entry.fault:
            typer.echo(f"{entry.path}: {entry.fault}", err=True)
    if not entries:
        typer.echo("no store", err=True)


def du_command(store_path: StorePath, as_json: AsJson = False) -> None:
    """Show what the bytes of a store are for."""
    from dla_cache.housekeeping import measure_usage
    from dla_cache.store import open_store

    usage = measure_usage(open_store(store_path))
    if as_json:
        typer.echo(json.dumps({**asdict(usage), "total": usage.total}))
        return
    parts = {**usage.series, "records": usage.records, "table, card": usage.rest, "leftovers": usage.leftovers}
    parts["total"] = usage.total
    print_table(["what", "bytes", ""], [[what, size, as_size(size)] for what, size in parts.items()])
    if usage.leftovers:
        typer.echo(f"`dla cache prune {store_path}` removes the leftovers", err=True)


def prune_command(
    store_path: StorePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what killed processes left: temporary files, and shards that no record vouches for."""
    from dla_cache.housekeeping import prune_store
    from dla_cache.store import open_store

    _show_removed(prune_store(open_store(store_path), dry_run=dry_run), dry_run, as_json)


def rm_command(
    store_path: StorePath,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it nothing is removed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a store with all it holds; a folder that is no store, or holds other things, is refused."""
    from dla_cache.housekeeping import remove_store

    if not yes and not dry_run:
        doomed = remove_store(store_path, dry_run=True)
        raise StoreError(
            f"`{store_path}` would be removed: {counted(len(doomed.files), 'file')}, {as_size(doomed.size_bytes)}",
            hint="`--yes` removes it, `--dry-run` shows the files",
        )
    _show_removed(remove_store(store_path, dry_run=dry_run), dry_run, as_json)


def _show_removed(removed: "Removed", dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **asdict(removed)}))
        return
    for name in removed.files[:SHOWN_FILES]:
        typer.echo(name)
    if len(removed.files) > SHOWN_FILES:
        typer.echo(f"and {len(removed.files) - SHOWN_FILES} more")
    what = "would be removed" if dry_run else "removed"
    typer.echo(f"{what}: {counted(len(removed.files), 'file')}, {as_size(removed.size_bytes)}")
