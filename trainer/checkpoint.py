"""Checkpoints and run records: one safetensors file each, written whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import CheckpointError


def write_atomically(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader, or a power cut, sees the old file or the new one whole.

    Raises:
        StoreError: if the folder cannot be written.
    """
    with writing_to(path):
        make_folder(path.parent)
        write_durably(path, data)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-able facts as one safetensors file, atomically."""
    # Tied weights and views are copied: safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_atomically(path, save(copies, metadata={"facts": json.dumps(facts)}))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and facts of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, truncated, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint at `{path}`", hint="train the run first, or check the path") from error
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise CheckpointError(f"`{path}` is no checkpoint of dla: {error}", hint="train the run again") from error


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix.name`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors whose name starts with `prefix.`, under the rest of their name."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as flat tensors `<parameter number>.<name>`; hyperparameters are the config's."""
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, field = name.split(".", 1)
        state.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


class MetricsFile:
    """`metrics.jsonl` of a run: one JSON object a line, each with its `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line.

        Raises:
            StoreError: if the folder cannot be written.
        """
        with writing_to(self.path):
            make_folder(self.path.parent)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def cut_after(self, step: int) -> None:
        """Drops what a killed run wrote after its last checkpoint, so that a resumed run tells each step once.

        Raises:
            StoreError: if the folder cannot be written.
        """
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line a kill cut in two
                continue
            if record["step"] <= step:
                lines.append(line + "\n")
        write_atomically(self.path, "".join(lines).encode())
