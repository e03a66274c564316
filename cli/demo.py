"""`dla demo`: the whole path on the embedded data, measured."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.arms import plan_arms, run_arms, stop_if
from cli.render import ProgressReporter, print_table
from cli.sheet import draw_cache_sheet
from cli.signals import stop_on_signals
from dla_cache.errors import CorruptShardError

if TYPE_CHECKING:
    from dla_cache.build import BuildReport
    from dla_cache.manifest import Manifest
    from dla_cache.spec import CacheSpec
    from dla_cache.store import LatentStore
    from trainer.run_folder import RunResult

QUICK_STEPS = 20
TOO_BRIEF = "--quick trained too briefly for the accuracies to mean anything."
N_PROCESSES = 2
SHEET_STRIDE = 5
WHAT = {
    "probe": "latents → class, no pixels",
    "teacher": "pixels and latents → class",
    "image-only": "pixels → class, labelled images only",
    "kd-probe": "pixels → class, distilled from the probe",
    "kd-teacher": "pixels → class, distilled from the teacher",
    "messy": "the same, and predicts the teacher's latent tokens",
}


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, store, runs and picture.")] = Path("demo-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_STEPS} steps a run: shows that all works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every run.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Data, cache, probe, teacher and four students on one machine: measured, in minutes."""
    from cli.page import write_page

    store_path, sheet = out / "cache.zarr", out / "latents.png"
    # First, since it may refuse: nobody shall wait for a build in vain.
    steps = QUICK_STEPS if quick else None
    arms = plan_arms(read_arms(), out, store=store_path, images=out / "data", seed=seed, steps=steps)
    with stop_on_signals() as should_stop:  # one for all phases: between two of them no signal may get lost
        store, report, manifest = build_embedded_cache(out, should_stop=should_stop)
        check_cache(store, manifest, should_stop)
        draw_cache_sheet(store, out / "data", list(store.rows.image_ids[: 8 * SHEET_STRIDE : SHEET_STRIDE]), sheet)
        with ProgressReporter("train", "steps") as reporter:
            finished = run_arms(
                arms,
                logs=out / "logs",
                n_processes=N_PROCESSES,
                on_progress=reporter.update,
                should_stop=should_stop,
            )
    results = {arm.name: result for arm, result in zip(arms, finished, strict=True)}
    page = out / "report.html"
    write_page(
        page,
        [arm.folder for arm in arms],
        store=store_path,
        picture=sheet,
        title="What the demo measured",
        remarks=[TOO_BRIEF] if quick else [],
        commands=[f"dla demo --seed {seed}{' --quick' * quick}"],
    )
    if as_json:
        rows = {name: result.model_dump() for name, result in results.items()}
        shown = {"picture": str(sheet), "page": str(page)}
        typer.echo(json.dumps({"rows": rows, "content_hash": store.content_hash(), **shown}))
        return
    show_results(results, store, report)
    typer.echo(f"\npicture of eight images and their latents: {sheet}")
    typer.echo(f"all of it on one page: {page}")
    typer.echo(f"run files to change and repeat: {out / 'specs'}, with `dla train FILE`")
    if quick:
        typer.echo(TOO_BRIEF)
    typer.echo("One seed proves nothing: the intervals are those of drawing test images, not of training again.")


def build_embedded_cache(
    out: Path, *, modalities: Sequence[str] | None = None, should_stop: Callable[[], bool] = lambda: False
) -> tuple["LatentStore", "BuildReport", "Manifest"]:
    """The embedded data as files and the store of their latents; whatever is there already stays.

    Args:
        modalities: whose latents; all that embedded sources make when None.

    Returns:
        The store, what the build did, and the manifest.

    Raises:
        WorkInterrupted: if `should_stop` said so.
    """
    from dla_cache.spec import CacheSpec, read_yaml

    spec = read_yaml(Path(__file__).parent / "specs" / "cache.yaml", CacheSpec)
    if modalities is not None:
        spec = spec.model_copy(update={"latents": tuple(one for one in spec.latents if one.modality in modalities)})
    return build_embedded_store(out, spec, out / "cache.zarr", should_stop=should_stop)


def build_embedded_store(
    out: Path, spec: "CacheSpec", place: Path, *, should_stop: Callable[[], bool]
) -> tuple["LatentStore", "BuildReport", "Manifest"]:
    """The embedded data as files in `out/data`, and the store in `place` of the latents that a spec asks for.

    Raises:
        WorkInterrupted: if `should_stop` said so.
    """
    import torch

    from dla_cache.build import BuildProgress, build_cache
    from dla_cache.data.export import MANIFEST_NAME, write_relief_digits
    from dla_cache.manifest import read_manifest
    from dla_cache.sources import open_source
    from dla_cache.store import open_store

    # This generator is too small for more: two threads are no faster, and wait for each other when others want a core.
    torch.set_num_threads(1)
    path = out / "data" / MANIFEST_NAME
    if not path.exists():
        write_relief_digits(out / "data", on_progress=lambda _split, _n: stop_if(should_stop))
    manifest = read_manifest(path)
    with ProgressReporter("build", "images") as reporter:

        def show(at: BuildProgress) -> None:
            reporter.update(at.images_done, at.images_total, f"{at.modality}, shard {at.shard} of {at.n_shards}")

        report = build_cache(manifest, spec, place, open_source=open_source, on_progress=show, should_stop=should_stop)
    return open_store(place), report, manifest


def check_cache(store: "LatentStore", manifest: "Manifest", should_stop: Callable[[], bool]) -> None:
    """Reads the whole store once, before anything is learned from it.

    Raises:
        CorruptShardError: if it does not hold what its records and the manifest say.
        WorkInterrupted: if `should_stop` said so.
    """
    from dla_cache.verify import verify_store

    problems = verify_store(store, manifest, on_progress=lambda _done, _total: stop_if(should_stop)).problems
    if problems:
        raise CorruptShardError(
            f"`{store.path}` does not verify: {problems[0].where}: {problems[0].what}",
            hint=f"`dla cache verify {store.path}` lists all of it; remove the store and run the demo again",
        )


def read_arms() -> dict[str, dict[str, Any]]:
    """The demo's runs as their spec file has them."""
    from dla_cache.spec import load_yaml

    return load_yaml(Path(__file__).parent / "specs" / "arms.yaml")


def show_results(results: dict[str, "RunResult"], store: "LatentStore", report: "BuildReport") -> None:
    """The measured table, and what the cache cost."""
    from dla_cache.describe import describe_store
    from dla_cache.sources import SOURCES
    from trainer.run_folder import held_out

    rows = []
    for name, result in results.items():
        test = held_out(result, name)
        interval = f"{100 * test.low:.1f} to {100 * test.high:.1f}"
        rows.append(
            (
                name,
                WHAT[name],
                f"{100 * test.value:.1f}",
                interval,
                f"{result.train_seconds:.0f}",
                f"{result.images_per_s:.0f}",
            )
        )
    print_table(("run", "from what to what", "test top-1 %", "95 % interval", "seconds", "images/s"), rows)
    for name in ("probe", "teacher"):
        parts = ", ".join(f"{part} {100 * score:.1f} %" for part, score in list(results[name].branches.items())[1:])
        typer.echo(f"\nparts of the {name}, and what it makes of some of its input: {parts}")
    for modality in store.modalities:
        note = SOURCES[store.recipe(modality).source].note
        typer.echo(f"{modality}: {store.recipe(modality).source}, {note}")
    status = describe_store(store)
    for part in status.modalities:
        typer.echo(f"cache: {part.modality}, {part.images} images, {part.bytes_per_image:.0f} bytes an image")
    if report.images_encoded:
        typer.echo(f"build: {report.images_encoded} images, {report.images_per_s:.0f} images/s")
