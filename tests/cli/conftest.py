"""The command line as a shell sees it: exit code, stdout, stderr."""

import sys
from dataclasses import dataclass

import pytest

from cli.main import main


@dataclass
class Ended:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def dla(monkeypatch, capsys):
    """Runs `dla ARGUMENTS`; only what a user may see as an error ends it, any other exception is a failure."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dla", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Ended(end.value.code or 0, *capsys.readouterr())

    return run
