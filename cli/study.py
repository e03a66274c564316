"""`dla study`: many runs, one honest comparison."""

import typer

from cli.study_alignment import alignment
from cli.study_report import report_command
from cli.study_run import run_command
from cli.study_status import status_command

app = typer.Typer(no_args_is_help=True, help="Many runs, one honest comparison.")
app.command("run")(run_command)
app.command("status")(status_command)
app.command("report")(report_command)
app.command("alignment")(alignment)
