"""The command line: the only place that knows Typer, Rich and the terminal."""
