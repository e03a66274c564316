"""`dla sources check` and `dla sources fetch`: a source is tried on a few images, and its weights are brought here."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.cache_spec import find_own_modules, modality_of
from cli.device import require_device
from cli.render import ProgressReporter, as_size, counted
from cli.settings import apply_overrides
from dla_cache.errors import SourceError, name_some

if TYPE_CHECKING:
    from dla_cache.sources.fetch import Hub, Listing, RemoteFile, Wanted
    from dla_cache.spec import LatentSpec

OF_THE_SPEC = ("seed", "dtype")
"""Settings that a cache spec has beside a source's own parameters."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def check_command(
    source: Annotated[str, typer.Argument(metavar="NAME", help="A source, or a class of yours, module:Class.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Set a parameter of the source; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or repository of weights: the parameter `model`.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option("--modality", help="What it makes, if dla does not know the source.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", exists=True, file_okay=False, help="Take the first four images of this folder."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where the source runs: cpu, cuda, cuda:1.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Try a source on a few images: is its decoder idle, and does a latent depend on its image and seed alone?

    Ends with 1 if one of the claims does not hold.
    """
    from dla_cache.sources import open_source
    from dla_cache.sources.check import check_source, images_in, sample_images

    spec = _spec_of(source, modality, overrides or [], model)
    require_device(device)
    pixels = sample_images() if images is None else images_in(images)
    with ProgressReporter("check", "calls") as reporter:
        found = check_source(spec, device, pixels, open_source=open_source, on_call=reporter.update)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "passes": not found.failed}))
    else:
        allowed = f"up to {found.tolerance:g} is allowed" if found.tolerance else "not a bit is allowed"
        typer.echo(f"source     {found.source}, {found.modality}, on {found.device}")
        typer.echo(f"images     {counted(found.n_images, 'image')} {'of dla' if images is None else f'of {images}'}")
        typer.echo(f"tolerance  of what other images in a batch change, {allowed}\n")
        width = max(len(claim.name) for claim in found.claims)
        for claim in found.claims:
            typer.echo(f"{'ok' if claim.holds else 'FAILS':<7}{claim.name:<{width}}  {claim.measured}")
    if found.failed:
        raise SourceError(
            f"`{source}` fails {len(found.failed)} of {len(found.claims)} claims: {name_some(found.failed, shown=12)}",
            hint="do not build with it: the same image would get other latents from one build to the next",
        )


def _spec_of(source: str, modality: str | None, overrides: list[str], model: str | None) -> "LatentSpec":
    from dla_cache.spec import LatentSpec, parse_spec

    modality = modality_of(source, modality)
    find_own_modules([source])
    settings = apply_overrides({}, overrides)
    fields: dict[str, Any] = {name: settings.pop(name) for name in OF_THE_SPEC if name in settings}
    parameters = settings | ({} if model is None else {"model": model})
    return parse_spec(
        {**fields, "source": source, "modality": modality, "parameters": parameters}, LatentSpec, where=source
    )


def fetch_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Sources of the catalog.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="REPO", help="This repository, in place of the one source's own, or alone."),
    ] = None,
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit; the main branch if absent.")] = "",
    variant: Annotated[str, typer.Option("--variant", help="Such as fp16: that of several files of the weights.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for plain files, to be copied; the hub's cache if absent.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the weights of sources here, from where there is a network for a machine without one.

    Safetensors and texts only. Of a gated repository the hub wants an account: set HF_TOKEN.
    """
    wanted = _wanted(names or [], model, revision, variant)
    if not wanted:
        typer.echo(json.dumps([]) if as_json else f"{', '.join(names or [])}: shipped with dla, nothing to fetch")
        return
    from dla_cache.sources.fetch import Hub

    hub = Hub(out=out)
    listings = [hub.list_files(one) for one in wanted]
    told = [_told_of(hub, listing) for listing in listings]
    if not as_json:
        for one in told:
            _show(one, hub.endpoint)
        free = f"{as_size(hub.free_bytes())} are free there"
        typer.echo(f"to fetch  {as_size(sum(one['bytes_to_fetch'] for one in told))}; {free}")
    if not dry_run:
        _fetch(hub, listings)
        if not as_json:
            typer.echo(f"fetched   {counted(sum(one['files'] for one in told), 'file')}")
            if out is not None:
                typer.echo(f"          name it in a spec: parameters: {{model: {told[0]['place']}}}")
    if as_json:
        typer.echo(json.dumps([{**one, "fetched": not dry_run} for one in told]))


def _wanted(names: list[str], model: str | None, revision: str, variant: str) -> list["Wanted"]:
    from dla_cache.sources import SOURCES

    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise SourceError(f"there is no source {name_some(unknown)}", hint="`dla sources list` shows those there are")
    if not names and model is None:
        raise typer.BadParameter("name a source, or a repository by --model", param_hint="NAME")
    if model is not None and len(names) > 1:
        raise typer.BadParameter("it stands for the weights of one source", param_hint="--model")
    if (revision or variant) and len(names) > 1:
        raise typer.BadParameter("name one source with it", param_hint="--revision" if revision else "--variant")
    if model is None and not any(SOURCES[name].model for name in names):
        return []
    from dla_cache.sources.fetch import Wanted, needed_by

    if not names and model is not None:
        return [Wanted(model, revision, variant)]
    needed = [
        one for name in names for one in needed_by(SOURCES[name], model=model or "", revision=revision, variant=variant)
    ]
    return list(dict.fromkeys(needed))


def _told_of(hub: "Hub", listing: "Listing") -> dict[str, Any]:
    return {
        "repo": listing.wanted.repo,
        "revision": listing.wanted.revision or "main",
        "commit": listing.commit,
        "licence": listing.licence,
        "is_gated": listing.is_gated,
        "files": len(listing.files),
        "bytes": listing.size_bytes,
        "bytes_to_fetch": listing.size_bytes - hub.present_bytes(listing),
        "place": str(hub.place_of(listing)),
    }


def _show(one: dict[str, Any], endpoint: str) -> None:
    from dla_cache.sources.fetch import how_to_get

    typer.echo(one["repo"])
    typer.echo(f"  commit  {one['commit']} ({one['revision']})")
    typer.echo(f"  files   {counted(one['files'], 'file')}, {as_size(one['bytes'])}")
    typer.echo(f"  licence {one['licence']}")
    typer.echo(f"  gated   {'yes: ' + how_to_get(one['repo'], endpoint) if one['is_gated'] else 'no'}")
    typer.echo(f"  place   {one['place']}")


def _fetch(hub: "Hub", listings: list["Listing"]) -> None:
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # ours is one for all files
    total, done = sum(listing.size_bytes for listing in listings), 0
    with ProgressReporter("fetch", "bytes") as reporter:

        def tell(file: "RemoteFile") -> None:
            nonlocal done
            done += file.size_bytes
            reporter.update(done, total, file.name)

        for listing in listings:
            hub.fetch(listing, tell)
