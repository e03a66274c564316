"""The toy run of `test_loop` in a process of its own, killed after a step: FOLDER STEP."""

import os
import signal
import sys
from pathlib import Path

from tests.trainer.toy import make_loop, run_loop

if __name__ == "__main__":
    folder, last_step = Path(sys.argv[1]), int(sys.argv[2])

    def die(at):
        if at.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    run_loop(make_loop(folder), on_progress=die)
