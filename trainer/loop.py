"""The one training loop. It knows no task: a task is handed to it and returns its own losses."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dla_cache.errors import CheckpointError, TrainingError, WorkInterrupted
from trainer.checkpoint import (
    MetricsFile,
    fitting,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    save_keeping_previous,
    way_on,
    with_prefix,
    without_prefix,
)
from trainer.loss_module import TOTAL, LossModule, StepLosses
from trainer.processes import Processes, alone
from trainer.progress import Pace, Progress, TimedStream
from trainer.records import start_again
from trainer.schedule import RUNTIME_FIELDS, LoopConfig, learning_rate_at, parameter_groups, seed_generators, seed_of
from trainer.watch import GRADIENT, FiniteWatch, gradient_norms

MAX_SKIPPED = 100
"""Steps in a row that float16 may skip while it looks for a scale of the loss that does not overflow."""


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
class LoopResult:
    """What a finished loop leaves: the step chosen on validation and its metrics, and the time it took."""

    best_step: int
    best_metrics: Mapping[str, float]
    train_seconds: float
    """Time in training steps, evaluation and checkpoints left out; summed over resumes."""
    resumed_from: int


@runtime_checkable
class HasDepths(Protocol):
    """A task that knows which of its parameters lie near the pixels, and so can be trained with layer decay."""

    def parameter_depths(self) -> Mapping[str, int]:
        """Of each parameter of `module` by name: 0 of what embeds pixels, n + 1 in block n, the largest in the head."""


class Loop:
    """State of one run: task, optimizer, averaged weights, position. `run` drives it to its end."""

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        folder: Path,
        *,
        seed: int,
        processes: Processes | None = None,
        log: Callable[..., None] = lambda record, *, resumed_from: None,
    ) -> None:
        """
        Args:
            processes: those that train together; this one alone if None.
            log: is told each line of `metrics.jsonl` in the first process.

        Raises:
            SpecError: if the config asks for what the task or the device has not.
        """
        self.task = task
        self.config = config
        self.folder = folder
        self.seed = seed
        self.processes = processes if processes is not None else alone(config)
        self.log = log
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        depths: Mapping[str, int] | None = None
        if config.layer_decay < 1 and isinstance(task, HasDepths):
            depths = task.parameter_depths()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(task.module, config, depths),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.parameters = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        # Once: at each step it would take longer than the average itself.
        self.state = {name: value.detach() for name, value in task.module.state_dict().items()}
        self.averaged: dict[str, Tensor] = {}
        if config.ema_decay:
            self.averaged = {name: value.clone() for name, value in self.state.items()}
        self.losses = self.processes.prepared(LossModule(task.module, task.losses, config.compile))
        self.watch = FiniteWatch(task.module, late=self.device.type == "cuda")
        self.step = 0
        self.best_step = 0
        self.best_metrics: dict[str, float] = {}
        self.train_seconds = 0.0
        self.skipped = self.skipped_in_a_row = 0

    @property
    def device(self) -> torch.device:
        """Where the task is."""
        return next(self.task.module.parameters()).device

    @property
    def n_parts(self) -> int:
        """Parts of a batch: processes times micro-batches."""
        return self.processes.share.world_size * self.config.accumulation

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

        A step is a function of the weights, the seed and its own number: before each part of a batch torch's
        generators are seeded anew. So a resumed run needs no state of theirs.

        Args:
            batches: gives the endless micro-batches from a step on, `accumulation` of them a step: this process's
                part of the batch. They depend on the step only.
            evaluate: metrics of the task as it stands, the same in all processes; the highest `selection` is kept as
                best.
            on_progress: is called in the first process.
            hint_to_resume: what to do after a stop, as the caller's own interface has it.

        Raises:
            DeadLossError: see `gradient_norms`; looked at on the first step and at every evaluation, on the first
                micro-batch of each process. The log tells of the first process's.
            TrainingError: if a loss or a gradient is not finite.
            WorkInterrupted: if `should_stop` said so in any process; the run can be resumed at that very step. Of
                several processes all stop at the same step, the one after the next.
        """
        resumed_from = self.step
        if self.processes.is_first:
            self.metrics.cut_after(self.step)
        stream = TimedStream(batches(self.step))
        pace = Pace(stream)
        self.task.module.train()  # here and after evaluations: to say it to every module at every step takes a while
        with contextlib.closing(stream):
            if not self.config.steps and not self.best_metrics:  # nothing to choose from but how it began
                self.evaluate(evaluate, {}, pace.spent(), resumed_from)
            while self.step < self.config.steps:
                if self.processes.agreed(should_stop()):
                    self.save("last")
                    self.processes.wait()  # a launcher ends the others as soon as one has ended
                    raise WorkInterrupted(
                        f"training stopped at step {self.step} of {self.config.steps}; `{self.folder}` is kept",
                        hint=hint_to_resume,
                    )
                began = time.perf_counter()
                is_due = self.step + 1 == self.config.steps or (self.step + 1) % self.config.evaluate_steps == 0
                norms = self.train_step(stream, watch_gradients=is_due or self.step == resumed_from)
                took_s = time.perf_counter() - began
                pace.count(took_s)
                self.train_seconds += took_s
                if self.processes.is_first:
                    loss = self.watch.values.get(TOTAL, math.nan)
                    at = self.step, self.config.steps, loss
                    on_progress(Progress(*at, pace.waited, pace.steps_per_s, resumed_from))
                if is_due:
                    self.evaluate(evaluate, norms, pace.spent(), resumed_from)
                    self.task.module.train()
                    pace = Pace(stream)
                elif self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                    self.save("last")
        self.processes.last_heard()  # nobody is left waiting for an answer
        return LoopResult(self.best_step, self.best_metrics, self.train_seconds, resumed_from)

    def train_step(self, stream: Iterator[Any], *, watch_gradients: bool) -> dict[str, float]:
        """One update; each term's gradient norm when asked for."""
        rate = learning_rate_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        n_micro, scaler = self.config.accumulation, self.processes.accelerator.scaler
        sums: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        for number in range(n_micro):
            batch = next(stream)
            is_last = number + 1 == n_micro
            with contextlib.nullcontext() if is_last else self.processes.unaveraged(self.losses):
                part = self.processes.share.rank * n_micro + number
                seed_generators(seed_of(self.seed, self.step, part), self.device)
                losses: dict[str, Tensor] = self.losses(batch)
                if number == 0:
                    self.watch.look()
                    self.optimizer.zero_grad(set_to_none=True)
                    if watch_gradients:
                        terms = {name: loss for name, loss in losses.items() if name != TOTAL}
                        norms = gradient_norms(terms, self.task.taught_parameters())
                for name, loss in losses.items():
                    share = loss.detach() / n_micro
                    sums[name] = sums[name] + share if name in sums else share
                self.processes.accelerator.backward(losses[TOTAL] / n_micro)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norm = self.clip_gradient()
        # The total comes after its terms: a fault is named after the term it comes from. What overflows in float16
        # is no fault: the scaler sees to it.
        sums[TOTAL] = sums.pop(TOTAL)
        self.watch.take(self.step, sums if scaler is not None else {**sums, GRADIENT: norm})
        if scaler is None:
            self.optimizer.step()
        else:
            self.step_if_finite(scaler)
        self.step += 1
        self.average()
        return norms

    @torch.no_grad()
    def clip_gradient(self) -> Tensor:
        """The norm [] of the whole gradient before it is clipped; one that is not finite is left to be looked at."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.clip_norm:
            known = torch.where(norm.isfinite(), norm, 0)
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, known, foreach=True)
        return norm

    def step_if_finite(self, scaler: torch.amp.GradScaler) -> None:
        """The update of a scaled loss, skipped where float16 overflowed; the next scale is smaller then.

        Raises:
            TrainingError: if no scale of the last `MAX_SKIPPED` steps was small enough.
        """
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        is_skipped = scaler.get_scale() < scale
        self.skipped += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(
                f"the gradient was not finite in float16 for {MAX_SKIPPED} steps, up to step {self.step}",
                hint="lower `learning_rate`, or set `loop.mixed_precision: bf16`",
            )

    @torch.no_grad()
    def average(self) -> None:
        """Moves the averaged weights towards the trained ones."""
        if not self.averaged:
            return
        # Early on a fixed decay would average in the random start for long.
        decay = min(self.config.ema_decay, self.step / (self.step + 10))
        pairs = list(zip(self.averaged.values(), self.state.values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([to for to, _ in floats], [value for _, value in floats], 1 - decay)
        for to, value in pairs:
            if not to.is_floating_point():
                to.copy_(value)

    def evaluate(
        self,
        evaluate: Callable[[], Mapping[str, float]],
        norms: Mapping[str, float],
        pace: Mapping[str, float],
        resumed_from: int,
    ) -> None:
        """Measures the (averaged) weights, keeps them if they are the best so far, logs, checkpoints."""
        self.watch.look()
        began = time.perf_counter()
        with self.averaged_weights():
            self.processes.share_buffers(self.task.module)
            self.task.module.eval()
            with torch.inference_mode():
                metrics = dict(evaluate())
            if not self.best_metrics or metrics["selection"] > self.best_metrics["selection"]:
                self.best_step, self.best_metrics = self.step, metrics
                if self.processes.is_first:
                    path = self.folder / "best.safetensors"
                    save_checkpoint(path, self.task.module.state_dict(), {"step": self.step})
        values = self.processes.gather({name: v for name, v in self.watch.values.items() if name != GRADIENT})
        names = dict.fromkeys(name for one in values for name in one)
        record = {
            "step": self.step,
            "losses": {name: sum(one.get(name, 0.0) for one in values) / len(values) for name in names},
            "gradient_shares": {name: norm / sum(norms.values()) for name, norm in norms.items()},
            "learning_rate": learning_rate_at(max(self.step - 1, 0), self.config),
            "metrics": metrics,
            **pace,
            "evaluation_seconds": time.perf_counter() - began,
        }
        if self.processes.accelerator.scaler is not None:
            record["skipped_steps"] = self.skipped
        if self.processes.is_first:
            self.metrics.append(record)
            self.log(record, resumed_from=resumed_from)
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
        """Everything a bitwise equal continuation needs, as `<name>.safetensors`; by the first process."""
        self.watch.look()
        if not self.processes.is_first:
            return
        tensors = (
            with_prefix("task", self.task.module.state_dict())
            | with_prefix("averaged", self.averaged)
            | with_prefix("optimizer", optimizer_tensors(self.optimizer))
        )
        scaler = self.processes.accelerator.scaler
        facts = {
            "step": self.step,
            "seed": self.seed,
            "best_step": self.best_step,
            "best_metrics": self.best_metrics,
            "train_seconds": self.train_seconds,
            "config": self.config.model_dump(mode="json"),
            "n_parts": self.n_parts,
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped": [self.skipped, self.skipped_in_a_row],
        }
        save_keeping_previous(self.folder / f"{name}.safetensors", tensors, facts)

    def resume(self) -> None:
        """Goes back to the last checkpoint of the folder, which every process reads.

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
        now = self.config.model_dump(mode="json")
        changed = [k for k, v in now.items() if k not in RUNTIME_FIELDS and facts["config"].get(k) != v]
        if changed:
            raise CheckpointError(
                f"`{path}` was trained with another {', '.join(f'`{name}`' for name in changed)}",
                hint="restore the setting, or train into another folder",
            )
        if facts.get("seed", self.seed) != self.seed:
            raise CheckpointError(
                f"`{path}` is of a run of seed {facts['seed']}, and this one has {self.seed}: it is a copy of another",
                hint=way_on(path),
            )
        if facts["n_parts"] != self.n_parts:
            raise CheckpointError(
                f"`{path}` was trained with batches in {facts['n_parts']} parts, and processes times"
                f" `loop.accumulation` are {self.n_parts} now",
                hint="choose them so that their product is the same: it decides what dropout draws",
            )
        module = self.task.module
        module.load_state_dict(fitting(without_prefix("task", tensors), module.state_dict(), path))
        restore_optimizer(self.optimizer, without_prefix("optimizer", tensors))
        for name, value in fitting(without_prefix("averaged", tensors), self.averaged, path).items():
            self.averaged[name].copy_(value)
        if self.processes.accelerator.scaler is not None:
            self.processes.accelerator.scaler.load_state_dict(facts["scaler"])
        self.step, self.best_step, self.best_metrics = facts["step"], facts["best_step"], facts["best_metrics"]
        self.train_seconds = facts["train_seconds"]
        self.skipped, self.skipped_in_a_row = facts["skipped"]
