"""`dla`: the root command, its groups, and the border where errors become an exit code."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from cli.cache import app as cache_app
from cli.data import app as data_app
from cli.demo import demo
from cli.doctor import doctor
from cli.evaluate import evaluate
from cli.manifest import app as manifest_app
from cli.model import export, predict
from cli.report import report
from cli.signals import Interrupted, raise_on_signals
from cli.sources import app as sources_app
from cli.study import app as study_app
from cli.train import train
from dla_cache import __version__
from dla_cache.errors import DlaError, WorkInterrupted

app = typer.Typer(
    name="dla",
    help="Train small image-only models on what big generative models know.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(manifest_app, name="manifest")
app.add_typer(cache_app, name="cache")
app.add_typer(sources_app, name="sources")
app.add_typer(study_app, name="study")
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(export)
app.command()(report)
app.command()(demo)
app.command()(doctor)


def show_version(wanted: bool) -> None:
    """Prints the version and stops."""
    if wanted:
        typer.echo(f"dla {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of every command."""


def check_packages_are_ours() -> None:
    """Stops where another distribution's `trainer` or `cli` would be imported in place of ours.

    Raises:
        DlaError: naming the package and where it comes from.
    """
    home = Path(__file__).resolve().parent.parent
    for name in ("dla_cache", "trainer", "cli"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent.parent != home:
            raise DlaError(
                f"package `{name}` comes from `{origin}`, not from dla at `{home}`",
                hint="give dla an environment of its own: python -m venv .venv && .venv/bin/pip install dla",
            )


def main() -> None:
    """Runs the command line; our errors and signals end it with one message and exit code 1."""
    try:
        with raise_on_signals():
            check_packages_are_ours()
            app()
    except DlaError as error:
        end_with(error)
    except Interrupted as interrupt:
        end_with(WorkInterrupted(f"interrupted by {interrupt.signal_name}", hint="run the same command again"))


def end_with(error: DlaError) -> NoReturn:
    """Says on stderr what went wrong and what to do, and ends the process with 1."""
    stderr = Console(stderr=True)
    stderr.print("error: ", style="red", end="")
    stderr.print(error.message, markup=False, highlight=False, soft_wrap=True)
    if error.hint is not None:
        stderr.print("hint: ", style="cyan", end="")
        stderr.print(error.hint, markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
