"""What `pip install -e .` leaves where Python looks, for a package of one module: its name and its entry points.

    python -m tests.entry_points PYPROJECT FOLDER

A test that really installed a package would change the environment that it runs in.
"""

import sys
import tomllib
from pathlib import Path


def write_entry_points(pyproject: Path, folder: Path) -> None:
    """Makes `folder`, which is to be on the path, one in which this package is installed."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    told = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, named in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {location}" for name, location in named.items())]
    (told / "entry_points.txt").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    write_entry_points(Path(sys.argv[1]), Path(sys.argv[2]))
