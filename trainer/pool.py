"""Worker processes of one thread each, side by side, that do one job after another.

A worker imports what it needs once and lives on: to begin a process for every job would cost seconds of imports each.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

from dla_cache.durable import make_folder, writing_to
from dla_cache.errors import DlaError, LostProcessError, TrainingError, WorkInterrupted

POLL_S = 0.1
TELL_S = 0.5
"""A worker tells how far it is once in so many seconds."""

MAX_ATTEMPTS = 2
"""How often a job is given to a worker before it counts as what kills workers."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Tell = Callable[[int, int], None]
Work = Callable[[Any, Tell, Callable[[], bool]], None]
"""Does a job: is handed the job, whom to tell what is done of how much, and whom to ask whether to stop. A function of
a module, since other processes find it by its name."""


@dataclass(slots=True)
class Assigned:
    """A job in the hands of a worker."""

    name: str
    job: Any
    attempt: int
    done: int = 0
    total: int = 0


@dataclass(slots=True)
class Worker:
    """A process and the job it has."""

    number: int
    process: SpawnProcess
    connection: Connection
    assigned: Assigned | None = None


class WorkerPool:
    """So many workers; use it as a context manager. At its end they are asked to stop, and waited for."""

    def __init__(self, work: Work, n_processes: int, logs: Path) -> None:
        """
        Args:
            logs: folder for what each worker says, `worker-0.log` and so on.
        """
        self.work, self.n_processes, self.logs = work, n_processes, logs
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self.failed: str | None = None
        """Name of the job that ended badly, if one did."""

    def __enter__(self) -> "WorkerPool":
        with writing_to(self.logs):
            make_folder(self.logs)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            while worker.process.is_alive():
                with suppress(EOFError, OSError):
                    while worker.connection.poll(POLL_S):  # one that wants to tell something must not wait for us
                        worker.connection.recv()
                worker.process.join(POLL_S)
            worker.connection.close()
        self._workers.clear()

    @property
    def n_idle(self) -> int:
        """Workers that could have a job."""
        return self.n_processes - len(self.under_way)

    @property
    def under_way(self) -> Mapping[str, tuple[int, int]]:
        """Name of each job that a worker has → how much of it is done, of how much; of 0 before it has told."""
        jobs = [worker.assigned for worker in self._workers if worker.assigned is not None]
        return {job.name: (job.done, job.total) for job in jobs}

    def start(self, name: str, job: Any) -> None:
        """Gives a job to an idle worker."""
        self._assign(Assigned(name, job, attempt=1))

    def wait(self, timeout_s: float = POLL_S) -> list[str]:
        """The names of the jobs that were done within some time, or at once if one is.

        A job whose worker dies is given to a new one, once.

        Raises:
            TrainingError: if a job failed, with what it said.
            LostProcessError: if it has killed two workers.
            WorkInterrupted: if a worker was asked to stop by somebody else.
        """
        busy = [worker for worker in self._workers if worker.assigned is not None]
        ready = wait([one for worker in busy for one in (worker.connection, worker.process.sentinel)], timeout_s)
        ended = []
        for worker in busy:
            if worker.connection in ready or worker.process.sentinel in ready:
                ended += self._listen(worker)
        return ended

    def _listen(self, worker: Worker) -> list[str]:
        try:
            while worker.connection.poll():
                kind, *facts = worker.connection.recv()
                assert worker.assigned is not None
                name = worker.assigned.name
                if kind == "told":
                    worker.assigned.done, worker.assigned.total = facts
                elif kind == "done":
                    worker.assigned = None
                    return [name]
                elif kind == "stopped":
                    raise WorkInterrupted(f"`{name}` was stopped", hint="run the same command again; it goes on there")
                else:
                    message, hint = facts
                    self.failed = name
                    raise TrainingError(f"run `{name}`: {message}", hint=hint)
        except (EOFError, OSError):
            pass
        if not worker.process.is_alive():
            self._replace(worker)
        return []

    def _replace(self, worker: Worker) -> None:
        """Puts a new worker in the place of a dead one, with its job."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        job, code = worker.assigned, worker.process.exitcode or 0
        if job is None:
            return
        if job.attempt >= MAX_ATTEMPTS:
            self.failed = job.name
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise LostProcessError(
                f"the process that had run `{job.name}` {how}, for the second time",
                hint=f"`{self._log(worker.number)}` has what it said; with less memory needed, or fewer processes at"
                " once, the same command goes on",
            )
        self._assign(Assigned(job.name, job.job, job.attempt + 1))

    def _assign(self, job: Assigned) -> None:
        worker = next((one for one in self._workers if one.assigned is None and one.process.is_alive()), None)
        if worker is None:
            worker = self._hire()
        worker.assigned = job
        with suppress(OSError):  # it has died since: whoever waits sees it
            worker.connection.send(job.job)

    def _hire(self) -> Worker:
        taken = {worker.number for worker in self._workers}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        ours, theirs = self._context.Pipe()
        with environment(ONE_THREAD):
            process = self._context.Process(
                target=serve, args=(self.work, theirs, str(self._log(number)), os.getpid()), daemon=True
            )
            process.start()
        theirs.close()
        worker = Worker(number, process, ours)
        self._workers.append(worker)
        return worker

    def _log(self, number: int) -> Path:
        return self.logs / f"worker-{number}.log"


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Inside, the environment that new processes get has these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(work: Work, connection: Connection, log: str, parent: int) -> None:
    """A worker: does jobs until it is asked to stop, or whoever started it is gone.

    SIGTERM asks, and a job ends at its next checkpoint. Ctrl-C and a closed terminal reach all processes at once: the
    one that started us sees to them.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def should_stop() -> bool:
        return asked or os.getppid() != parent

    with suppress(EOFError, OSError):  # whoever asked is gone
        while not should_stop():
            if connection.poll(POLL_S):
                do_job(work, connection.recv(), connection, should_stop, log)


def do_job(work: Work, job: Any, connection: Connection, should_stop: Callable[[], bool], log: str) -> None:
    """Does one job and says how it ended."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            with suppress(OSError):  # nobody listens any more: `should_stop` will say so
                connection.send(("told", done, total))

    try:
        work(job, tell, should_stop)
    except WorkInterrupted:
        connection.send(("stopped",))
    except DlaError as error:
        connection.send(("failed", error.message, error.hint))
    except Exception as error:  # a bug: its traceback is in the log, and the study ends with its name
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(("failed", f"{type(error).__name__}: {error}", f"`{log}` has all of it"))
    else:
        connection.send(("done",))
