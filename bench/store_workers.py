"""The processes of the store bench: one for each reader, idle until it is asked."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPTS = Path(__file__).parent / "store_peers"


class ReaderError(RuntimeError):
    """A reader failed."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A reader that takes part."""

    name: str
    script: str
    variant: str
    environment: str | None
    """None for the interpreter that runs the bench, which is the only one that knows dla."""
    folder: str
    """Of what it reads."""
    tasks: tuple[str, ...]


class Worker:
    """A process that answers one request at a time."""

    def __init__(self, peer: Peer, python: Path | str, log: Path) -> None:
        self.peer = peer
        self._log = log.open("wb")
        environment = dict(os.environ)
        if peer.environment is not None:
            environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, SCRIPTS / peer.script, peer.variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment | {"PYTHONNOUSERSITE": "1", "TOKENIZERS_PARALLELISM": "false"},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:  # some library's thread does not end
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ReaderError: if it failed, or the process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise ReaderError(f"`{self.peer.name}` failed, see also `{self._log.name}`:\n{answer['error']}")
        return answer


def run_alone(figure: str, folder: Path, *arguments: str) -> Any:
    """What a script of our own measures in a new process."""
    command = [sys.executable, SCRIPTS / "dla_alone.py", figure, folder, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
