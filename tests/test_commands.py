"""The commands, their help, README's table of them and the pages of docs/ speak of the same."""

import html
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from cli.main import app
from tests.walk import PAGES, Step, read_page

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


@pytest.fixture(scope="module")
def shown(commands: Commands) -> list[tuple[str, Step]]:
    """The commands that the pages show, each with its name."""
    items = [item for page in PAGES for item in read_page(page.read_text(encoding="utf-8"))]
    names = sorted((name for name in commands if name != "dla"), key=len, reverse=True)
    return [
        (next(name for name in names if f"{item.command} ".startswith(f"{name} ")), item)
        for item in items
        if isinstance(item, Step) and not item.is_hidden and item.command.startswith("dla ")
    ]


def test_every_command_is_shown_with_its_output_in_docs(commands: Commands, shown: list[tuple[str, Step]]) -> None:
    leaves = {name for name, command in commands.items() if not isinstance(command, TyperGroup)}
    assert leaves - {name for name, step in shown if step.shown} == set()


def test_only_what_takes_minutes_is_recorded_and_its_command_line_is_right(
    commands: Commands, shown: list[tuple[str, Step]]
) -> None:
    recorded = {name: step.command for name, step in shown if step.is_recorded}
    assert set(recorded) == {"dla demo", "dla sources fit"}
    for name, command in recorded.items():
        commands[name].make_context(name, shlex.split(command.removeprefix(name)))  # parses, and runs nothing


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
