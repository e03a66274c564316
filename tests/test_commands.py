"""The commands, their help and README's table of them say the same."""

import re
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
