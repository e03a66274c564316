"""What `test_processes` runs, alone or in processes that a launcher's environment variables put together.

FOLDER SCENARIO...: runs each scenario into a folder of its name.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from dla_cache.errors import CheckpointError, DlaError, WorkInterrupted
from tests.trainer.toy import Losses, toy_batches
from trainer.loop import Loop
from trainer.processes import open_processes
from trainer.schedule import LoopConfig

CONFIG = LoopConfig(steps=12, evaluate_steps=5, learning_rate=0.05, ema_decay=0.8)


class WideTask:
    """Learns y = sum(x) through dropout; `odd`, if it is on, speaks of one half of every second batch alone, and alone
    reaches the spare layer."""

    def __init__(self, dropout, *, odd):
        self.odd = odd
        torch.manual_seed(7)
        self.module = nn.ModuleDict(
            {
                "trunk": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)),
                "spare": nn.Linear(4, 1),
                "unused": nn.Linear(4, 1),
            }
        )

    def losses(self, batch):
        step, half, inputs = batch
        truth = inputs.sum(dim=1)
        terms = {"fit": (self.module["trunk"](inputs)[:, 0] - truth).square().mean()}
        if self.odd and half == 1 and step % 2:
            both = self.module["trunk"](inputs)[:, 0] + self.module["spare"](inputs)[:, 0]
            terms["odd"] = (both - truth).abs().mean()
        return Losses(terms)

    def taught_parameters(self):
        return list(self.module["trunk"].parameters())


def part_batches(share, n_micro):
    """Each batch of 16 in world size times `n_micro` parts; `half` says in which half of the batch a part lies."""

    def batches(step):
        n_parts = share.world_size * n_micro
        for number, inputs in toy_batches(step):
            for micro in range(n_micro):
                part = share.rank * n_micro + micro
                yield number, part * 2 // n_parts, inputs.chunk(n_parts)[part]

    return batches


def run_wide(
    folder, processes, *, n_micro=1, dropout=0.3, odd=True, stop_at=None, signal_at=(None, None), resume=False
):
    """The run; the last rank asks for a stop at a step, or gives itself a signal."""
    config = CONFIG.model_copy(update={"accumulation": n_micro})
    loop = Loop(WideTask(dropout, odd=odd), config, folder, seed=3, processes=processes)
    if resume:
        loop.resume()

    def should_stop():
        is_ours = processes.share.rank == processes.share.world_size - 1
        if is_ours and loop.step == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        return is_ours and loop.step == stop_at

    def evaluate():
        values = processes.gather(float(loop.task.module["trunk"][0].weight.norm()))
        assert len(set(values)) == 1, "weights differ between processes"
        return {"selection": -values[0]}

    return loop.run(part_batches(processes.share, n_micro), evaluate, should_stop=should_stop)


SCENARIOS = {
    "dropout": {},
    "dropout and accumulation": {"n_micro": 2},
    "no dropout": {"dropout": 0.0, "odd": False},
    "stopped": {"stop_at": 6},
    "killed": {"signal_at": (8, signal.SIGKILL)},
    "stuck": {"signal_at": (8, signal.SIGSTOP)},
}


def refuse():
    raise CheckpointError("the folder is taken,", hint="take another")


def main(folder, names):
    timeout_s = float(os.environ.get("TIMEOUT_S", "60"))
    with open_processes(CONFIG.model_copy(update={"process_timeout_s": timeout_s}), "cpu") as processes:
        for name in names:
            try:
                if name == "refused":
                    processes.from_first(refuse)
                run_wide(folder / name, processes, **SCENARIOS[name])
            except CheckpointError as refused:
                print(refused.message, refused.hint, flush=True)
            except WorkInterrupted as stopped:
                print(stopped.message.split(";")[0], flush=True)
                run_wide(folder / name, processes, resume=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except DlaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
