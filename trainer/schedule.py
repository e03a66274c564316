"""How long, how fast and on what a task is trained: the settings of the loop, and the arithmetic that follows."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from dla_cache.errors import SpecError, TrainingError, name_some
from dla_cache.spec import StrictModel

TrackerName = Literal["tensorboard", "wandb", "mlflow"]

RUNTIME_FIELDS = frozenset({"accumulation", "checkpoint_steps", "trackers", "process_timeout_s"})
"""Settings of the loop that are no part of what a run is: it may be gone on with under others. Of `accumulation` the
number of parts that a batch is cut into stays, processes times micro-batches."""


class LoopConfig(StrictModel):
    """How long and how fast a task is trained."""

    steps: Annotated[int, Field(ge=0)] = 500
    """0 keeps the weights that the run began with: of a teacher from scratch a random one, as a control."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Peak rate, after warm-up; per step, not scaled by batch size."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule_steps: Annotated[int, Field(gt=0)] = 1
    """The rate changes once in so many steps; the paper's changes once an epoch."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The rate of a layer over that of the layer above it: below 1 what lies near the pixels learns more slowly, as
    one wants of pretrained weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decay_vectors: bool = True
    """Whether weight decay also shrinks biases, norms and whatever else has one dimension, as in the paper."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay a step of the averaged weights that are evaluated and kept; 0 keeps the trained ones."""
    accumulation: Annotated[int, Field(gt=0)] = 1
    """Micro-batches that a process cuts its part of a batch into, one in memory at a time. The step stays that of the
    whole batch, but for what a term or a batch norm computes across images."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What losses are computed in, where torch's autocast thinks it safe; weights and evaluation stay float32. `fp16`
    scales the loss and needs CUDA."""
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """Backend of torch.compile for the losses; none runs them as they are."""
    evaluate_steps: Annotated[int, Field(gt=0)] = 100
    """Steps between evaluations, log lines and checkpoints."""
    checkpoint_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps between checkpoints besides those of the evaluations."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Who is told the log beside `metrics.jsonl`."""
    process_timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """With several processes: seconds that one waits for the others before it gives them up."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, value: Any) -> Any:
        return "no" if value is False else value


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


def seed_of(seed: int, step: int, part: int) -> int:
    """What torch's generators are seeded with before a part of a step: 64 bits that the three numbers alone decide.

    So dropout needs no state: a resumed run draws what the unbroken one drew, and two processes what one draws that
    cuts its batch in two.

    Source: numpy's `SeedSequence`, after O'Neill, "Developing a seed_seq alternative" (2015).
    """
    return int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds what dropout draws from: the CPU's generator, and that of a CUDA device in use."""
    # `torch.manual_seed` does the same for every kind of device, at half a millisecond for those that are not there.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def parameter_groups(module: nn.Module, config: LoopConfig, depths: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimizer, each with its `rate_scale` and its `weight_decay`.

    With layer decay d the rate of a parameter of depth n is d^(N - n) of the schedule's, N the largest depth.

    Args:
        depths: of each parameter by name, from 0 for what embeds pixels to that of the head; None if the task knows
            of none.

    Raises:
        SpecError: if there is layer decay and there are no depths.
        TrainingError: if a trained parameter has none.

    Source: BEiT, arXiv:2106.08254, appendix; `get_num_layer_for_vit` of its code.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if config.layer_decay == 1:
        depths = dict.fromkeys(trained, 0)
    elif depths is None:
        raise SpecError(
            f"`loop.layer_decay` is {config.layer_decay}, and this model has no layers to go by",
            hint="set `loop.layer_decay: 1`",
        )
    nowhere = [name for name in trained if name not in depths]
    if nowhere:
        raise TrainingError(f"the task gives no depth of {name_some(nowhere)}", hint="name it in `parameter_depths`")
    top = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault((depths[name], parameter.ndim > 1 or config.decay_vectors), []).append(parameter)
    return [
        {
            "params": parameters,
            "rate_scale": config.layer_decay ** (top - depth),
            "weight_decay": config.weight_decay if is_decayed else 0.0,
        }
        for (depth, is_decayed), parameters in groups.items()
    ]
