"""`dla study`: many runs beside each other."""

import typer

from cli.study_alignment import alignment

app = typer.Typer(no_args_is_help=True, help="Many runs, one honest comparison.")
app.command()(alignment)
