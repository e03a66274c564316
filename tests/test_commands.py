"""The commands, their help and README's table of them say the same."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from cli.main import app

README = Path(__file__).parents[1] / "README.md"

Commands = dict[str, TyperCommand | TyperGroup]


def commands_below(name: str, command: TyperCommand | TyperGroup) -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    yield name, command
    if isinstance(command, TyperGroup):
        for child_name, child in command.commands.items():
            yield from commands_below(f"{name} {child_name}", child)


@pytest.fixture(scope="module")
def commands() -> Commands:
    return dict(commands_below("dla", typer.main.get_command(app)))


def test_the_table_in_readme_lists_every_command_and_no_other(commands: Commands) -> None:
    listed = re.findall(r"^\| `(dla [a-z -]+)` \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name, command in commands.items() if not isinstance(command, TyperGroup))


def test_every_command_says_what_it_does(commands: Commands) -> None:
    assert [name for name, command in commands.items() if not command.help] == []


def test_every_argument_and_option_says_what_it_is(commands: Commands) -> None:
    silent = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_the_reference_is_what_the_commands_say_of_themselves() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "typer", "cli.main", "utils", "docs", "--name", "dla"],
        cwd=README.parent,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(README.parent)},
    )
    written = (README.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    assert html.unescape(made.stdout).strip() == written.strip(), "run `make docs`"
