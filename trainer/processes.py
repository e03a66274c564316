"""The processes that train one run together: one by default, or as many as torchrun or `accelerate launch` started.

Each takes its part of every batch; gradients are averaged, evaluation is shared, and the first alone writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from dla_cache.errors import DlaError, LostProcessError, SpecError
from dla_cache.pairs import Share
from trainer.schedule import LoopConfig

T = TypeVar("T")

LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "timeout")
"""Words of torch's errors, lower case, where another process is not there any more: it has no class of its own."""


class Processes:
    """This process among those that train together, and how they talk.

    Values and words go over a gloo group of their own, also beside NCCL: it sees at once that a process has died, and
    a device is not made to wait. What is gathered is pickled between processes of one run, never read from a disk.
    """

    def __init__(self, accelerator: Accelerator, config: LoopConfig) -> None:
        self.accelerator = accelerator
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self._group: Any = None
        self._asked: tuple[Any, Tensor] | None = None
        if self.share.world_size > 1:
            timeout = timedelta(seconds=config.process_timeout_s)
            self._group = distributed.new_group(backend="gloo", timeout=timeout)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, prints and shows progress."""
        return self.share.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.share.world_size == 1

    def device(self, name: str) -> str:
        """The device of this process where the run names `name`: of several GPUs each process has its own."""
        return name if self.is_alone or name == "cpu" else str(self.accelerator.device)

    def prepared(self, module: nn.Module) -> nn.Module:
        """The module with mixed precision in its forward, and with gradients that are averaged over all processes."""
        prepared: nn.Module = self.accelerator.prepare_model(module, device_placement=False)
        return prepared

    def unaveraged(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients of a prepared module stay this process's own."""
        context: AbstractContextManager[None] = self.accelerator.no_sync(module)
        return context

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.share.world_size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` makes in the first process, which alone calls it.

        Raises:
            DlaError: in all processes, what `make` raises in the first: each says what is wrong, and none that it has
                lost another.
        """
        if self.is_alone:
            return make()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = make()
            except DlaError as error:
                box[1] = error
        distributed.broadcast_object_list(box, src=0, group=self._group)
        value, failed = box
        if failed is not None:
            raise failed
        made: T = value
        return made

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.gather(None)

    def agreed(self, asks: bool) -> bool:
        """Whether a process asks for something, the same answer in all: of several one call late.

        So the word travels while the step after it is computed, and no step waits for it.
        """
        if self.is_alone:
            return asks
        heard = self.last_heard()
        flag = torch.tensor(int(asks))
        work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = (work, flag)
        return heard

    def last_heard(self) -> bool:
        """What the last call of `agreed` asked about, when all have answered."""
        if self._asked is None:
            return False
        work, flag = self._asked
        self._asked = None
        work.wait()
        return bool(flag)

    def share_buffers(self, module: nn.Module) -> None:
        """Gives all processes the first one's buffers: statistics of a batch norm are each process's own."""
        for buffer in module.buffers() if not self.is_alone else ():
            distributed.broadcast(buffer, src=0)


@contextmanager
def open_processes(config: LoopConfig, device: str, logs: Path | None = None) -> Iterator[Processes]:
    """The processes of a run, as the launcher's environment variables say; without them this one alone.

    Args:
        device: as the run names it.
        logs: folder of the trackers; None for a run that is not tracked.

    Raises:
        SpecError: if the launcher or the device cannot do what the run asks for.
        LostProcessError: at whatever place, if another process has died or does not answer in time.
    """
    check_precision(config, device)
    is_ours = AcceleratorState._shared_state == {}  # else a run inside a run: what is open stays open
    accelerator = None
    try:
        accelerator = open_accelerator(config, device, logs)
        yield Processes(accelerator, config)
    except RuntimeError as error:
        if isinstance(error, DlaError) or not is_lost(error):
            raise
        raise LostProcessError(
            f"another process of this run has ended or does not answer: {str(error).splitlines()[0][:200]}",
            hint="see what it said; then start all of them again with `--resume`",
        ) from error
    finally:
        for tracker in accelerator.trackers if accelerator is not None else ():
            tracker.finish()
        if is_ours:
            if distributed.is_initialized():
                distributed.destroy_process_group()
            forget_state()


def alone(config: LoopConfig) -> Processes:
    """This process by itself, as a loop takes it that nobody hands any."""
    check_precision(config, "cpu")
    return Processes(open_accelerator(config, "cpu", None), config)


def open_accelerator(config: LoopConfig, device: str, logs: Path | None) -> Accelerator:
    """The Accelerator of a run. Nothing that `accelerate config` may have put into the environment decides a result.

    Raises:
        SpecError: if the launcher wants what the loop cannot do, or another device than the run.
    """
    wanted = torch.device(device).type
    known = AcceleratorState._shared_state
    if known and (known["_mixed_precision"], known["device"].type) != (config.mixed_precision, wanted):
        forget_state()
    accelerator = Accelerator(
        device_placement=False,
        cpu=wanted == "cpu",
        mixed_precision=config.mixed_precision,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(config.trackers) or None if logs is not None else None,
        project_dir=logs,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout_s)),
            # A term may have nothing to say on one process's part of a batch; without this DDP would wait for ever.
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    )
    how = accelerator.distributed_type.value
    if how not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise SpecError(f"the launcher asks for {how}", hint="start with torchrun, or `accelerate launch --multi_gpu`")
    if accelerator.device.type != wanted:
        raise SpecError(
            f"the run asks for `{device}`, the launcher for `{accelerator.device.type}`",
            hint="set `device` as the launcher is told",
        )
    if accelerator.num_processes > 1 and torch.device(device).index is not None:
        raise SpecError(
            f"`device` is `{device}`, and {accelerator.num_processes} processes take one each",
            hint=f"set `device: {wanted}`, and CUDA_VISIBLE_DEVICES to choose among them",
        )
    return accelerator


def forget_state() -> None:
    """Lets the next run of this process open its own: accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def launched_rank() -> int:
    """The rank that a launcher gave this process, 0 without one; known before the processes have met."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def check_precision(config: LoopConfig, device: str) -> None:
    """Passes a precision that the device has.

    Raises:
        SpecError: for float16 elsewhere than on CUDA: its gradients need the scaler, and CPUs have no fast float16.
    """
    if config.mixed_precision == "fp16" and torch.device(device).type != "cuda":
        raise SpecError(
            f"`loop.mixed_precision: fp16` needs a CUDA device, and `device` is `{device}`",
            hint="set `loop.mixed_precision: bf16` or `no`",
        )


def is_lost(error: RuntimeError) -> bool:
    """Whether torch says that another process is not there any more."""
    said = str(error).lower()
    return isinstance(error, distributed.DistError) or (
        distributed.is_initialized() and any(word in said for word in LOST)
    )
