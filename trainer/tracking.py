"""The log of a run in TensorBoard, Weights & Biases or MLflow, through accelerate; nothing reads it back."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dla_cache.errors import MissingDependencyError

PROJECT = "dla"


def check_trackers(names: Sequence[str]) -> None:
    """Passes trackers whose packages are installed.

    Raises:
        MissingDependencyError: naming one that is not; accelerate would leave it out without a word.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"`loop.trackers` names `{name}`, which is not installed",
                hint=f"pip install {name}, or take it out: --set 'loop.trackers=[]'",
            )


def flattened(record: Mapping[str, Any]) -> dict[str, float]:
    """A log line as names and numbers: `losses/kd`, `metrics/student`, `learning_rate`."""
    values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{key}": float(one) for key, one in value.items()}
        elif name != "step":
            values[name] = float(value)
    return values


class Trackers:
    """Tells the trackers of an accelerator each log line; opened at the first, so that a start does not wait for them.

    In a folder of TensorBoard's a resumed run hides what it had told of later steps; to the others it is another run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: Mapping[str, Any], images_per_step: int) -> None:
        """
        Args:
            folder: where those that write files write them.
            config: what the run is, shown beside it.
        """
        self.accelerator = accelerator
        self.folder = folder
        self.config = config
        self.images_per_step = images_per_step

    def log(self, record: Mapping[str, Any], *, resumed_from: int) -> None:
        """Tells one line of `metrics.jsonl`."""
        if not self.accelerator.log_with:
            return
        if not self.accelerator.trackers:
            self._open(resumed_from)
        values = flattened(record)
        values["images_per_s"] = values.pop("steps_per_s") * self.images_per_step
        self.accelerator.log(values, step=record["step"])

    def _open(self, resumed_from: int) -> None:
        name = self.folder.parent.name
        self.accelerator.init_trackers(
            PROJECT,
            init_kwargs={
                "tensorboard": {"purge_step": resumed_from + 1},
                "wandb": {"dir": str(self.folder), "name": name},
                "mlflow": {"logging_dir": str(self.folder / "mlflow"), "run_name": name},
            },
        )
        for tracker in self.accelerator.trackers:
            if tracker.name != "tensorboard":  # its hyperparameters would be a run of their own in every view
                tracker.store_init_configuration(dict(self.config))
