"""A build on the devices of this machine: one process a device, each with its part of the shards.

Processes, because a device of its own interpreter never waits for another one's Python. They are spawned anew, share
nothing but the store, and send home how far they are. Who dies, of whatever, ends the build with an error; what is
committed stays.
"""

import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from statistics import mean
from typing import Any

from dla_cache.errors import DlaError, LostProcessError, WorkInterrupted
from dla_cache.passes import Filled, OnProgress, OpenSource, Pass, ShouldStop, fill_store, interrupted, series_of
from dla_cache.progress import BuildProgress
from dla_cache.store import LatentStore, open_store

POLL_S = 0.1
"""Between two looks whether somebody wants the build to stop, and at least between two messages of a process."""

STOP = "stop"


def fill_on_devices(
    work: Pass,
    devices: Sequence[str],
    *,
    open_source: OpenSource,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> tuple[LatentStore, Filled]:
    """What `fill_store` does, by as many processes as there are devices; on one device by this one.

    Args:
        open_source: of several devices a function of a module, which their processes import.

    Raises:
        What `fill_store` raises in one of the processes; the others then stop after their batch.
        LostProcessError: if one of them dies.
    """
    if len(devices) == 1:
        return fill_store(work, devices[0], open_source=open_source, on_progress=on_progress, should_stop=should_stop)
    children = [
        _start(replace(work, share=number, n_shares=len(devices)), device, open_source)
        for number, device in enumerate(devices)
    ]
    try:
        is_stopping = False
        while working := [child for child in children if child.outcome is None]:
            for ready in wait([child.connection for child in working], timeout=POLL_S):
                child = next(child for child in working if child.connection is ready)
                child.receive()
                if on_progress is not None and (progress := _joined(children)) is not None:
                    on_progress(progress)
            has_failed = any(isinstance(child.outcome, Exception) for child in children)
            if not is_stopping and (has_failed or (should_stop is not None and should_stop())):
                is_stopping = True
                for child in working:
                    with suppress(OSError):  # it has ended meanwhile
                        child.connection.send(STOP)
        for child in children:
            child.process.join()
    finally:
        for child in children:
            child.process.kill()  # those that an exception here finds at work
            child.process.join()
            child.connection.close()
    outcomes = [child.outcome for child in children]
    failures = [one for one in outcomes if isinstance(one, Exception)]
    for failure in sorted(failures, key=lambda one: isinstance(one, WorkInterrupted)):
        if isinstance(failure, WorkInterrupted):
            raise interrupted(open_store(work.store_place), series_of(work.spec))
        raise failure
    filled = Filled()
    for one in outcomes:
        assert isinstance(one, Filled)
        filled = filled.merged(one)
    return open_store(work.store_place), filled


@dataclass
class _Child:
    """A process, and what it has said so far."""

    device: str
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    progress: BuildProgress | None = None
    outcome: Filled | Exception | None = None

    def receive(self) -> None:
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self.outcome = LostProcessError(
                f"the process of device `{self.device}` {how}",
                hint="SIGKILL often means that the machine ran out of memory; what is committed stays, run it again",
            )
            return
        if isinstance(said, BuildProgress):
            self.progress = said
        elif isinstance(said, str):
            self.outcome = RuntimeError(f"the process of device `{self.device}` failed:\n{said}")
        else:
            self.outcome = said


def _start(work: Pass, device: str, open_source: OpenSource) -> _Child:
    context = get_context("spawn")  # a fork would share threads and the state of a GPU
    here, there = context.Pipe()
    process = context.Process(target=_fill, args=(there, work, device, open_source), daemon=True)
    process.start()
    there.close()  # so that its end is seen here
    return _Child(device, process, here)


def _fill(connection: "Connection[Any, Any]", work: Pass, device: str, open_source: OpenSource) -> None:
    """What a process does: sends how far it is, and at last what it has done or why not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all processes: the parent says what to do
    should_stop = threading.Event()
    threading.Thread(target=_hear, args=(connection, should_stop), daemon=True).start()
    last_sent = 0.0

    def tell(progress: BuildProgress) -> None:
        nonlocal last_sent
        if progress.images_done == progress.images_total or time.monotonic() - last_sent >= POLL_S:
            last_sent = time.monotonic()
            send(progress)

    def send(said: object) -> None:
        with suppress(BrokenPipeError):  # the parent is dead, and `should_stop` is set by now
            connection.send(said)

    try:
        _, filled = fill_store(work, device, open_source=open_source, on_progress=tell, should_stop=should_stop.is_set)
        send(filled)
    except DlaError as error:
        send(error)
    except Exception:  # a fault of ours: the parent shows where
        send(traceback.format_exc())


def _hear(connection: "Connection[Any, Any]", should_stop: threading.Event) -> None:
    """Waits for the one word that the parent may say, or for its end."""
    with suppress(EOFError, OSError):
        connection.recv()
    should_stop.set()


def _joined(children: Sequence[_Child]) -> BuildProgress | None:
    """How far all are; None until each has said something."""
    if any(child.progress is None and child.outcome is None for child in children):
        return None
    parts = [child.progress for child in children if child.progress is not None]
    if not parts:
        return None
    busy = [part for part in parts if part.device_busy is not None]
    worst = min(busy, key=lambda part: part.device_busy or 0.0, default=None)
    names = dict.fromkeys(name for part in parts for name in part.total_of)
    return replace(
        parts[-1],
        images_done=sum(part.images_done for part in parts),
        images_total=sum(part.images_total for part in parts),
        is_waiting=all(part.is_waiting for part in parts),
        done_of={name: sum(part.done_of.get(name, 0) for part in parts) for name in names},
        total_of={name: sum(part.total_of.get(name, 0) for part in parts) for name in names},
        images_bad=sum(part.images_bad for part in parts),
        device_busy=mean(part.device_busy or 0.0 for part in busy) if busy else None,
        bottleneck=worst.bottleneck if worst is not None else None,
    )
