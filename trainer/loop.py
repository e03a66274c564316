"""The one training loop. It knows no task: a task is handed to it and returns its own losses."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from dla_cache.errors import CheckpointError, DeadLossError, TrainingError, WorkInterrupted
from dla_cache.spec import StrictModel
from trainer.checkpoint import (
    MetricsFile,
    fitting,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    start_again,
    with_prefix,
    without_prefix,
)


class LoopConfig(StrictModel):
    """How long and how fast a task is trained."""

    steps: Annotated[int, Field(gt=0)] = 500
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak rate, after warm-up; per step, not scaled by batch size."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule_steps: Annotated[int, Field(gt=0)] = 1
    """The rate changes once in so many steps; the paper's changes once an epoch."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay a step of the averaged weights that are evaluated and kept; 0 keeps the trained ones."""
    evaluate_steps: Annotated[int, Field(gt=0)] = 100
    """Steps between evaluations, log lines and checkpoints."""


class StepLosses(Protocol):
    """What a task returns for a batch."""

    @property
    def total(self) -> Tensor:
        """[], the sum of `terms`."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """The active terms, weighted, each []; one that has nothing to say on this batch is left out."""


class Task(Protocol):
    """A module whose call on a batch gives losses, and that knows whom they must teach."""

    @property
    def module(self) -> nn.Module:
        """Everything that is trained and checkpointed."""

    def losses(self, batch: Any) -> StepLosses:
        """The losses of one batch; also called to probe gradients, so without side effects but randomness."""

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """The parameters that every loss term must reach."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is; `waited` is the fraction of time spent waiting for data."""

    step: int
    steps: int
    loss: float
    waited: float


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What a finished loop leaves: the step chosen on validation and its metrics, and the time it took."""

    best_step: int
    best_metrics: Mapping[str, float]
    train_seconds: float
    """Time in training steps, evaluation and checkpoints left out; summed over resumes."""
    resumed_from: int


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine from the peak to the final rate.

    Source: SGDR, arXiv:1608.03983, equation 5, without restarts.
    """
    step = step // config.schedule_steps * config.schedule_steps
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * done))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * falling


def gradient_norms(losses: StepLosses, parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """The norm of each term's own gradient on `parameters`; the graph stays usable.

    Raises:
        DeadLossError: if a term reaches none of them. A loss term that is silently cut off trains
            nothing and is reported as if it had been tried; that has happened in published comparisons.
    """
    norms = {}
    for name, term in losses.terms.items():
        gradients: Sequence[Tensor | None] = [None]
        if term.requires_grad:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    dead = [name for name, norm in norms.items() if norm == 0]
    if dead:
        raise DeadLossError(
            f"loss term `{dead[0]}` is active and gives the trained model no gradient",
            hint="check the names of its inputs and its weight, or remove the term from the objective",
        )
    return norms


class Loop:
    """State of one run: task, optimizer, averaged weights, position. `run` drives it to its end."""

    def __init__(self, task: Task, config: LoopConfig, folder: Path, *, seed: int) -> None:
        self.task = task
        self.config = config
        self.folder = folder
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in task.module.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.averaged: dict[str, Tensor] = {}
        if config.ema_decay:
            self.averaged = {name: value.detach().clone() for name, value in task.module.state_dict().items()}
        self.step = 0
        self.best_step = 0
        self.best_metrics: dict[str, float] = {}
        self.train_seconds = 0.0
        torch.manual_seed(seed)  # dropout; the task was initialised before

    def run(
        self,
        batches: Callable[[int], Generator[Any, None, None]],
        evaluate: Callable[[], Mapping[str, float]],
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        hint_to_resume: str = "run the same command again; it goes on from there",
    ) -> LoopResult:
        """Trains from the current step to the last; evaluates, logs and checkpoints on the way.

        Args:
            batches: gives the endless batches from a step on; a batch depends on its step only.
            evaluate: metrics of the task as it stands; the highest `selection` is kept as best.
            hint_to_resume: what to do after a stop, as the caller's own interface has it.

        Raises:
            DeadLossError: see `gradient_norms`; looked at on the first step and at every evaluation.
            TrainingError: if a loss is not finite.
            WorkInterrupted: if `should_stop` said so; the run can be resumed at that very step.
        """
        resumed_from = self.step
        self.metrics.cut_after(self.step)
        stream = batches(self.step)
        waiting_s = running_s = 0.0
        norms: dict[str, float] = {}
        with contextlib.closing(stream):
            while self.step < self.config.steps:
                if should_stop():
                    self.train_seconds += running_s
                    self.save("last")
                    raise WorkInterrupted(
                        f"training stopped at step {self.step} of {self.config.steps}; `{self.folder}` is kept",
                        hint=hint_to_resume,
                    )
                began = time.perf_counter()
                batch = next(stream)
                waiting_s += time.perf_counter() - began
                is_due = self.step + 1 == self.config.steps or (self.step + 1) % self.config.evaluate_steps == 0
                losses, norms = self.train_step(batch, watch_gradients=is_due or self.step == resumed_from)
                running_s += time.perf_counter() - began
                waited = waiting_s / running_s
                on_progress(Progress(self.step, self.config.steps, float(losses["total"]), waited))
                if is_due:
                    self.train_seconds, running_now = self.train_seconds + running_s, running_s
                    waiting_s = running_s = 0.0
                    self.evaluate(evaluate, losses, norms, {"seconds": running_now, "data_wait": waited})
        return LoopResult(self.best_step, self.best_metrics, self.train_seconds, resumed_from)

    def train_step(self, batch: Any, *, watch_gradients: bool) -> tuple[dict[str, float], dict[str, float]]:
        """One update; the losses, and each term's gradient norm when asked for."""
        self.task.module.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.config)
        losses = self.task.losses(batch)
        # The total comes last: a fault is named after the term it comes from.
        named = {**losses.terms, "total": losses.total}
        values = {name: float(loss.detach()) for name, loss in named.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss `{name}` is {value} at step {self.step}",
                    hint="lower `learning_rate`, or look at the latents with `dla cache inspect`",
                )
        norms = gradient_norms(losses, self.task.taught_parameters()) if watch_gradients else {}
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([losses.total])
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.task.module.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            for name, value in self.task.module.state_dict().items() if self.averaged else ():
                if value.is_floating_point():
                    # Early on a fixed decay would average in the random start for long.
                    decay = min(self.config.ema_decay, self.step / (self.step + 10))
                    self.averaged[name].lerp_(value, 1 - decay)
                else:
                    self.averaged[name].copy_(value)
        return values, norms

    def evaluate(
        self,
        evaluate: Callable[[], Mapping[str, float]],
        losses: Mapping[str, float],
        norms: Mapping[str, float],
        times: Mapping[str, float],
    ) -> None:
        """Measures the (averaged) weights, keeps them if they are the best so far, logs, checkpoints."""
        with self.averaged_weights():
            self.task.module.eval()
            with torch.inference_mode():
                metrics = dict(evaluate())
            if not self.best_metrics or metrics["selection"] > self.best_metrics["selection"]:
                self.best_step, self.best_metrics = self.step, metrics
                save_checkpoint(self.folder / "best.safetensors", self.task.module.state_dict(), {"step": self.step})
        shares = {name: norm / sum(norms.values()) for name, norm in norms.items()}
        record = {"step": self.step, "losses": dict(losses), "gradient_shares": shares, "metrics": metrics, **times}
        self.metrics.append(record)
        self.save("last")

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the task has its averaged weights, if it keeps any."""
        if not self.averaged:
            yield
            return
        trained = {name: value.detach().clone() for name, value in self.task.module.state_dict().items()}
        self.task.module.load_state_dict(self.averaged)
        try:
            yield
        finally:
            self.task.module.load_state_dict(trained)

    def save(self, name: str) -> None:
        """Everything a bitwise equal continuation needs, as `<name>.safetensors`."""
        tensors = (
            with_prefix("task", self.task.module.state_dict())
            | with_prefix("averaged", self.averaged)
            | with_prefix("optimizer", optimizer_tensors(self.optimizer))
            | self.random_states()
        )
        facts = {
            "step": self.step,
            "best_step": self.best_step,
            "best_metrics": self.best_metrics,
            "train_seconds": self.train_seconds,
            "config": self.config.model_dump(),
        }
        save_checkpoint(self.folder / f"{name}.safetensors", tensors, facts)

    @property
    def device(self) -> torch.device:
        """Where the task is."""
        return next(self.task.module.parameters()).device

    def random_states(self) -> dict[str, Tensor]:
        """The states of the generators that dropout draws from: the CPU's, and that of a CUDA device in use."""
        states = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def resume(self) -> None:
        """Goes back to the last checkpoint of the folder.

        Raises:
            CheckpointError: if there is none, it is damaged, or it belongs to another model or loop config.
        """
        path = self.folder / "last.safetensors"
        tensors, facts = load_checkpoint(path)
        if "config" not in facts:
            raise CheckpointError(
                f"`{path}` holds weights alone, not where a run is: it is a copy of another file",
                hint=start_again(self.folder),
            )
        if facts["config"] != self.config.model_dump():
            changed = [k for k, v in self.config.model_dump().items() if facts["config"].get(k) != v]
            raise CheckpointError(
                f"`{path}` was trained with another {', '.join(f'`{name}`' for name in changed)}",
                hint="restore the setting, or train into another folder",
            )
        module = self.task.module
        module.load_state_dict(fitting(without_prefix("task", tensors), module.state_dict(), path))
        restore_optimizer(self.optimizer, without_prefix("optimizer", tensors))
        averaged = fitting(without_prefix("averaged", tensors), self.averaged, path)
        self.averaged = {name: value.to(self.averaged[name].device) for name, value in averaged.items()}
        self.step, self.best_step, self.best_metrics = facts["step"], facts["best_step"], facts["best_metrics"]
        self.train_seconds = facts["train_seconds"]
        torch.set_rng_state(tensors["rng"])
        if self.device.type == "cuda" and "rng_cuda" in tensors:  # a run may move from the CPU to a GPU
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.device)
