"""`dla study`: many runs, one honest comparison."""

import typer

from cli.study_alignment import alignment
from cli.study_report import report_command

app = typer.Typer(no_args_is_help=True, help="Many runs, one honest comparison.")
app.command("report")(report_command)
app.command("alignment")(alignment)
