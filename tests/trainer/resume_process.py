"""RUN.yaml STEP...: the run as a process of its own for each step, after which it kills itself; one import for all.

The folder of each is that of the run with `-STEP` behind it.
"""

import os
import signal
import sys
from pathlib import Path

import yaml

from trainer.config import resolve_run
from trainer.run import train_run


def die_after(path, step):
    value = yaml.safe_load(path.read_text())
    config = resolve_run(value | {"output": f"{value['output']}-{step}"}, base=Path(), where=str(path))

    def die(at):
        if at.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train_run(config, on_progress=die)


if __name__ == "__main__":
    for step in map(int, sys.argv[2:]):
        child = os.fork()
        if not child:
            try:
                die_after(Path(sys.argv[1]), step)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"the run to be killed after step {step} ended with {status}")
