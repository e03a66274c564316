"""`dla train`: one run, from a run file or a preset, to a run folder."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.device import require_device
from cli.render import ProgressReporter, as_percent, as_size, counted, print_table
from cli.settings import apply_overrides
from cli.signals import stop_on_signals

if TYPE_CHECKING:
    from trainer.progress import Progress
    from trainer.run_folder import RunResult
    from trainer.targets import TargetsConfig

KINDS = ("probe", "teacher", "student", "targets")


@contextmanager
def without_collecting() -> Iterator[None]:
    """Imports inside take a quarter less time: they make a million objects, which Python would search for rubbish."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def train(
    what: Annotated[
        str, typer.Argument(metavar="RUN.yaml|KIND", help="A run file, or probe, teacher, student or targets.")
    ],
    preset: Annotated[
        str | None, typer.Option("--preset", help="paper or embedded: the settings below the run's own.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="STORE", help="The store to train on, a folder or a URL.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder the images' paths start from.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder.")] = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="Run folder to learn from.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Initialisation, order, views and dropout.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Set one field of the run; a path in it counts from the run file."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved run and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Train a latent probe, a DLA teacher or an image-only student from a cache.

    `targets` trains nothing: it asks a trained model once about several views of every image, and stores the answers
    for students that then need neither the model nor latents.
    """
    if "WORLD_SIZE" in os.environ:  # DDP warns that it looks for unused parameters; errors are told in any case
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with without_collecting():
        from transformers.utils.logging import disable_progress_bar

        from dla_cache.remote import is_remote
        from dla_cache.spec import load_yaml
        from trainer.config import resolve_run, with_objective
        from trainer.processes import launched_rank
        from trainer.run import train_run
        from trainer.run_folder import dump_config, held_out
        from trainer.targets import resolve_targets

    is_kind = what in KINDS
    value: dict[str, Any] = {"kind": what} if is_kind else load_yaml(Path(what))
    base = Path() if is_kind else Path(what).parent
    asks = value.get("kind") == "targets"
    flags = {"preset": preset} if asks else {"preset": preset, "seed": seed}
    if store is not None:
        value["store"] = store if is_remote(store) else str(Path(store).absolute())
    paths = {"images": images, "output": out, "teacher": teacher}
    value |= {name: flag for name, flag in flags.items() if flag is not None}
    # A path on the command line starts from here, one in a file from the file.
    value |= {name: str(flag.absolute()) for name, flag in paths.items() if flag is not None}
    within = [one for one in overrides or [] if one.startswith("objective.")]
    value = apply_overrides(value, [one for one in overrides or [] if one not in within])
    if within:  # one field of the objective: the preset's other terms stay
        value = apply_overrides(with_objective(value, where=what), within)
    if asks:
        if resume or seed is not None:
            raise typer.BadParameter("targets go on by themselves, and their views' seed is `--set view.seed=`")
        _make_targets(resolve_targets(value, base=base, where=what), dry_run=dry_run, as_json=as_json)
        return
    config = resolve_run(value, base=base, where=what)
    if dry_run:
        typer.echo(config.model_dump_json() if as_json else dump_config(config), nl=as_json)
        return
    require_device(config.device)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of files that take no time
    is_first = launched_rank() == 0  # of several processes; the others train in silence

    def show(at: "Progress") -> None:
        speed = f"{at.steps_per_s * config.images_per_step:,.0f} images/s, {as_percent(at.waited)} waiting for data"
        reporter.update(at.step, at.steps, f"{speed}, loss {at.loss:.4f}", found=at.resumed_from)

    progress = ProgressReporter(f"train {config.kind}", "steps", is_silent=not is_first)
    with progress as reporter, stop_on_signals() as should_stop:
        result = train_run(config, resume=resume, on_progress=show, should_stop=should_stop)
    if not is_first:
        return
    if as_json:
        typer.echo(result.model_dump_json())
        return
    rows = [(f"validation {result.metric}", f"{100 * result.validation_score:.1f} %", f"kept step {result.best_step}")]
    if config.roles.test:
        test = held_out(result, config.output)
        interval = f"95 % interval {100 * test.low:.1f} to {100 * test.high:.1f}, {counted(test.n, 'image')}"
        rows.append((f"test {result.metric}", f"{100 * test.value:.1f} %", interval))
    else:
        rows.append((f"test {result.metric}", "-", "no test split was read: `roles.test` is empty"))
    rows += [
        *(
            (f"  {name}", f"{100 * score:.1f} %", "of this part or input only")
            for name, score in list(result.branches.items())[1:]
        ),
        ("training", f"{result.train_seconds:.1f} s", f"{result.images_per_s:.0f} images/s")
        if result.best_step
        else ("training", "none", "the weights are those it began with"),
    ]
    print_table(("measured", "value", ""), rows)
    warn_of_inert(result)
    typer.echo(f"run folder {config.output}")


def warn_of_inert(result: "RunResult") -> None:
    """Says on stderr which loss terms were active and moved hardly anything."""
    for name in result.inert:
        share = 100 * result.gradient_shares[name]
        typer.echo(f"warning: loss term `{name}` gave {share:.2g} % of the gradient: nearly inert as set", err=True)


def _make_targets(config: "TargetsConfig", *, dry_run: bool, as_json: bool) -> None:
    from trainer.run_folder import dump_config
    from trainer.target_store import make_targets

    if dry_run:
        typer.echo(config.model_dump_json() if as_json else dump_config(config), nl=as_json)
        return
    require_device(config.device)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    with ProgressReporter("targets", "images") as reporter, stop_on_signals() as should_stop:
        report = make_targets(
            config, rank=rank, world_size=world_size, on_progress=reporter.update, should_stop=should_stop
        )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    rows = [
        ("images", f"{report.images:,}", f"each in {counted(report.views, 'view')}"),
        ("targets", str(len(report.targets)), ", ".join(report.targets)),
        ("size", as_size(report.bytes_per_view), "an image and view"),
        ("shards", f"{report.computed:,} computed", f"of {report.shards:,}"),
    ]
    if report.logits_error is not None:
        error = report.logits_error
        rows += [
            ("stored logits", f"KL {error.kl_mean:.2g} nats", f"from the model's; at most {error.kl_max:.2g}"),
            ("", f"{100 * error.top1_kept:.2f} %", "keep the likeliest class"),
        ]
    print_table(("made", "value", ""), rows)
    typer.echo(f"targets {config.output}")
