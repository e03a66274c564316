"""Signals that ask for an end: a flag for work that polls between two batches, an exception where nobody polls."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal came where nobody polls. No `Exception`: nothing on the way may take it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal_name = signal.Signals(number).name


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM and a closed terminal; not the last one where `nohup` has said that it shall not matter."""
    both = (signal.SIGINT, signal.SIGTERM)
    return both if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*both, signal.SIGHUP)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Gives the question "has somebody asked us to stop?"; a second signal acts as if we were not here."""
    asked = False
    previous = {number: signal.getsignal(number) for number in stopping_signals()}

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """A signal raises Interrupted; one more kills the process, whatever the way out waits for.

    Raises:
        Interrupted: at whatever place the signal finds the main thread.
    """
    after = {number: signal.getsignal(number) for number in stopping_signals()}

    def end(number: int, _frame: FrameType | None) -> None:
        after.update(dict.fromkeys(after, signal.SIG_DFL))
        restore()
        raise Interrupted(number)

    def restore() -> None:
        for number, handler in after.items():
            signal.signal(number, handler)

    for number in after:
        signal.signal(number, end)
    try:
        yield
    finally:
        restore()
