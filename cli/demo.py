"""`dla demo`: the whole path on the embedded data, measured."""
from pathlib import Path
from typing import Annotated
import typer
def demo(out: Annotated[Path, typer.Option("--out", help="x")] = Path("demo-out")) -> None:
    """x"""
