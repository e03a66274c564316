"""A task of ten lines for the loop, and what its tests ask of a run."""

import json
from dataclasses import dataclass

import torch
from torch import nn

from trainer.checkpoint import load_checkpoint
from trainer.loop import Loop
from trainer.schedule import RUNTIME_FIELDS, LoopConfig

STEPS = 20
EVALUATE_STEPS = 6
CONFIG = LoopConfig(steps=STEPS, evaluate_steps=EVALUATE_STEPS, learning_rate=0.05, warmup_steps=3, ema_decay=0.8)


@dataclass
class Losses:
    terms: dict

    @property
    def total(self):
        return sum(self.terms.values())


class ToyTask:
    """Learns y = sum(x), through dropout and a batch norm, whose counter is no floating point number."""

    def __init__(self, terms=None):
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.terms = terms or (lambda error, step: {"fit": error.square().mean()})

    def losses(self, batch):
        step, inputs = batch
        return Losses(self.terms(self.module(inputs)[:, 0] - inputs.sum(dim=1), step))

    def taught_parameters(self):
        return list(self.module[0].parameters())


def toy_batches(step):
    while True:
        yield step, torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        step += 1


def make_loop(folder, config=CONFIG, terms=None, *, task=None, **options):
    return Loop(task or ToyTask(terms), config, folder, seed=3, **options)


def run_loop(loop, evaluate=None, **options):
    def weights_norm():
        return {"selection": -float(loop.task.module[0].weight.norm())}

    return loop.run(toy_batches, evaluate or weights_norm, **options)


def state_of(loop):
    return {name: value.clone() for name, value in loop.task.module.state_dict().items()}


def assert_same_run(folder, unbroken):
    for name in ("best", "last"):
        expected, expected_facts = load_checkpoint(unbroken / f"{name}.safetensors")
        tensors, facts = load_checkpoint(folder / f"{name}.safetensors")
        assert tensors.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == []
        assert identity_of(facts) == identity_of(expected_facts)


def identity_of(facts):
    """What a checkpoint tells, but for times and for where it was made."""
    facts = {name: value for name, value in facts.items() if name != "train_seconds"}
    if "config" in facts:
        facts["config"] = {name: value for name, value in facts["config"].items() if name not in RUNTIME_FIELDS}
    return facts


def steps_told(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Death(BaseException):
    """Ends the process as far as our code can see: no handler of ours catches it."""
