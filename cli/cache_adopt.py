"""`dla cache adopt`: another recipe or other paths are taken for a store's own, which is recorded."""

import getpass
import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.cache_spec import find_own_modules
from cli.device import require_device
from cli.render import counted

if TYPE_CHECKING:
    from dla_cache.spec import CacheSpec
    from dla_cache.store import LatentStore
    from dla_cache.store.adopted import Adoption

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
RecomputeFolder = Annotated[
    Path | None, typer.Option("--images", help="With --recompute: folder the images' paths start from.")
]
Tolerance = Annotated[
    float,
    typer.Option(
        "--tolerance", min=0, help="With --recompute: difference allowed, in standard deviations of a channel."
    ),
]


def adopt_command(
    store_path: StorePath,
    why: Annotated[str, typer.Option("--why", help="Why the change is harmless; it is recorded.")],
    spec_path: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="Cache spec whose sources make what the store holds.")
    ] = None,
    manifest_path: Annotated[
        Path | None, typer.Option("--manifest", help="Image list with the paths that the images have now.")
    ] = None,
    recompute_images: Annotated[
        int | None,
        typer.Option("--recompute", min=1, metavar="N", help="Show it: compute the latents of N random images again."),
    ] = None,
    images: RecomputeFolder = None,
    tolerance: Tolerance = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --recompute: which images are drawn.")] = 0,
    device: Annotated[str, typer.Option("--device", help="With --recompute: where sources run.")] = "cpu",
    who: Annotated[str | None, typer.Option("--by", help="Who says so; your user name if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be adopted, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Declare a change harmless: a source by another name, version or weights, or images under other paths.

    A change that could decide numbers must be shown harmless by --recompute. The store keeps its recipes and its
    content hash; from then on build and verify take the new recipe for the old one, and `adopted.json` says who said so
    and why.
    """
    from dla_cache.adopt import adopt_paths
    from dla_cache.manifest import read_manifest
    from dla_cache.spec import CacheSpec, read_yaml
    from dla_cache.store import open_store

    if spec_path is None and manifest_path is None:
        raise typer.BadParameter("name a spec, a --manifest, or both", param_hint="SPEC")
    if not why.strip():
        raise typer.BadParameter("say why", param_hint="--why")
    store = open_store(store_path)
    said_by = who or getpass.getuser()
    adopted: list[Adoption | None] = []
    if manifest_path is not None:
        manifest = read_manifest(manifest_path)
        adopted.append(adopt_paths(store, manifest, why=why, who=said_by, dry_run=dry_run))
        images = images or manifest.root
        store = open_store(store_path)
    if spec_path is not None:
        spec = read_yaml(spec_path, CacheSpec)
        require_device(device)
        options = {"n_images": recompute_images, "tolerance": tolerance, "seed": seed, "device": device}
        adopted += _adopt_sources(store, spec, images, {**options, "why": why, "who": said_by, "dry_run": dry_run})
    told = [one for one in adopted if one is not None]
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, "adopted": [one.model_dump(mode="json") for one in told]}))
        return
    for one in told:
        typer.echo(f"{'would adopt' if dry_run else 'adopted':<14}{as_line(one)}")
    if not told:
        typer.echo("nothing to adopt: the store has these recipes and paths, or they were adopted before")


def _adopt_sources(
    store: "LatentStore", spec: "CacheSpec", images: Path | None, options: dict[str, object]
) -> "list[Adoption | None]":
    from dla_cache.adopt import adopt_source
    from dla_cache.recompute import holds_files
    from dla_cache.sources import open_source

    if options["n_images"] is not None and images is None and not holds_files(store):
        raise typer.BadParameter("this store holds no images: name their folder or --manifest", param_hint="--images")
    find_own_modules(entry.source for entry in spec.latents)
    adopted = []
    for entry in spec.latents:
        if entry.modality.value in store.modalities:
            with closing(open_source(entry, str(options["device"]))) as source:
                adopted.append(adopt_source(store, source, images, **options))  # type: ignore[arg-type]
    return adopted


def as_line(one: "Adoption") -> str:
    """What was adopted, in one line."""
    changes = ", ".join(f"`{name}` `{before}` → `{after}`" for name, (before, after) in one.changed.items())
    if one.what == "uri":
        return f"the paths of {counted(one.n_images, 'image')}, the first {changes}"
    shown = ""
    if one.evidence is not None:
        found = one.evidence
        shown = f"; {found.n_equal} of {counted(found.n_images, 'image')} equal"
        if found.largest_difference:
            shown += f", largest difference {found.largest_difference:.3g}, allowed {found.tolerance:g}"
    return f"{one.what}: {changes}{shown}"
