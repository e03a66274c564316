"""Jobs of a few lines for worker processes, which find them by this module's name."""

import os
import signal
import time
from pathlib import Path

import torch

from dla_cache.errors import SpecError, WorkInterrupted


def note(job, tell, should_stop):
    """Writes the process and the number of threads into a file."""
    Path(job).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def die_once(job, tell, should_stop):
    """Dies the first time."""
    path = Path(job)
    if not path.exists():
        path.write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text("lived")


def die(job, tell, should_stop):
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(job, tell, should_stop):
    raise SpecError(f"no {job}", hint="try another")


def have_a_bug(job, tell, should_stop):
    raise ZeroDivisionError("one over none")


def wait_to_stop(job, tell, should_stop):
    """Tells that it is there, and ends as a run that was asked to."""
    Path(job).write_text(str(os.getpid()))
    while not should_stop():
        tell(1, 3)
        time.sleep(0.05)
    Path(job).write_text("checkpoint")
    raise WorkInterrupted("stopped")
