"""`dla sources`: what can fill a cache, whether it does so rightly, and how the embedded sources are made."""

import difflib
import json
from pathlib import Path
from typing import Annotated

import typer

from cli.render import ProgressReporter, print_table
from cli.settings import apply_overrides
from cli.signals import stop_on_signals
from cli.sources_check import AsJson, check_command, fetch_command
from dla_cache.errors import SourceError, name_some

app = typer.Typer(help="Generators stopped before their decoder.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Generators stopped before their decoder."""


@app.command("list")
def list_sources(
    modality: Annotated[str | None, typer.Option("--modality", help="Only those of this modality.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the sources that a cache spec can name."""
    from dla_cache.sources import SOURCES
    from dla_cache.sources.table import LIST_HEADERS, entry_facts, list_rows

    names = [name for name, entry in SOURCES.items() if modality in (None, entry.modality.value)]
    if not names:
        known = ", ".join(dict.fromkeys(entry.modality.value for entry in SOURCES.values()))
        raise typer.BadParameter(f"no source makes `{modality}`; they make {known}", param_hint="--modality")
    if as_json:
        typer.echo(json.dumps({name: entry_facts(name) for name in names}))
        return
    print_table(LIST_HEADERS, list_rows(names))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A source of the catalog.")],
    as_json: AsJson = False,
) -> None:
    """Show all that the catalog says of one source: what it makes, of which weights, how, and under which licence."""
    from dla_cache.sources import SOURCES
    from dla_cache.sources.table import entry_facts, entry_lines

    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=3)
        guess = f"did you mean {name_some(near)}? " if near else ""
        raise SourceError(f"there is no source `{name}`", hint=f"{guess}`dla sources list` shows those there are")
    if as_json:
        typer.echo(json.dumps({"name": name, **entry_facts(name)}))
        return
    for label, text in entry_lines(name):
        typer.echo(f"{label:<20}{text}")


app.command("check")(check_command)
app.command("fetch")(fetch_command)


@app.command()
def fit(
    spec_path: Annotated[Path, typer.Argument(metavar="SPEC", help="Fit spec, a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for weights, model card and checkpoints.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one field of the spec; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an embedded source and its cheap rival on relief-digits' pairs. Run it again to go on where it stopped."""
    from dla_cache.sources.fit import EmbeddedFit, FitSpec, Stage, begin_fit
    from dla_cache.spec import load_yaml, parse_spec
    from trainer.checkpoint import load_checkpoint
    from trainer.loop import Loop
    from trainer.schedule import LoopConfig

    spec = parse_spec(apply_overrides(load_yaml(spec_path), overrides or []), FitSpec, where=str(spec_path))
    embedded = EmbeddedFit(spec)
    begin_fit(out, spec)

    def train_stage(stage: Stage) -> None:
        folder = out / "stages" / stage.name
        config = LoopConfig(
            steps=stage.config.steps,
            learning_rate=stage.config.learning_rate,
            ema_decay=stage.config.ema_decay,
            warmup_steps=50,
            evaluate_steps=250,
            trackers=(),
        )
        loop = Loop(stage.task, config, folder, seed=spec.seed)
        if (folder / "last.safetensors").exists():
            loop.resume()
        with ProgressReporter(stage.name, "steps") as reporter, stop_on_signals() as should_stop:
            loop.run(
                stage.batches,
                stage.score,
                on_progress=lambda at: reporter.update(at.step, at.steps, f"loss {at.loss:.4f}"),
                should_stop=should_stop,
            )
        stage.task.module.load_state_dict(load_checkpoint(folder / "best.safetensors")[0])
        stage.task.module.eval()

    train_stage(embedded.autoencoder_stage())
    train_stage(embedded.flow_stage())
    with ProgressReporter("ridge", "images") as reporter:
        embedded.fit_ridge(reporter.update)
    scores = embedded.export(out)
    if as_json:
        typer.echo(json.dumps(scores))
        return
    kinds = list(dict.fromkeys(kind for of_one in scores.values() for kind in of_one))
    rows = [
        (name, *(f"{of_one[kind]:.4f}" if kind in of_one else "" for kind in kinds)) for name, of_one in scores.items()
    ]
    print_table(("held out", *(kind.replace("_", " ") for kind in kinds)), rows)
    typer.echo(f"weights and card in {out}")
