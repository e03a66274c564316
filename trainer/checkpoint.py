"""Checkpoints and run records: one safetensors file each, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dla_cache.durable import make_folder, write_durably, writing_to
from dla_cache.errors import CheckpointError, StoreError, name_some
from trainer.records import start_again

LAST = "last.safetensors"
PREVIOUS = "previous.safetensors"
"""The checkpoint before the last."""


def write_atomically(path: Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader, or a power cut, sees the old file or the new one whole.

    Raises:
        StoreError: if the folder cannot be written.
    """
    with writing_to(path):
        make_folder(path.parent)
        write_durably(path, data)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors and JSON-able facts as one safetensors file with its checksum, atomically."""
    # Tied weights and views are copied: safetensors refuses tensors that share memory.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    said = json.dumps(facts)
    content = save(copies, metadata={"facts": said, "sha256": checksum_of(copies, said)})
    write_atomically(path, with_sorted_header(content))


def with_sorted_header(content: bytes) -> bytes:
    """A safetensors file with the names of its header in order, so that equal content gives equal bytes.

    The library writes the metadata in an order that changes from process to process; a run is known to its students by
    the hash of this file.

    Source: the format in the README of safetensors.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def save_keeping_previous(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint as `save_checkpoint` does; what stood at `path` stays as `previous.safetensors` beside it.

    At every moment a whole file stands at `path`, once one has.

    Raises:
        StoreError: if the folder cannot be written.
    """
    kept = path.with_name(PREVIOUS)
    aside = kept.with_name(f".{PREVIOUS}.tmp")
    had_one = path.exists()
    if had_one:
        with writing_to(kept):
            aside.unlink(missing_ok=True)
            try:
                os.link(path, aside)
            except OSError:  # a file system without hard links
                write_durably(aside, path.read_bytes())
    try:
        save_checkpoint(path, tensors, facts)
    except StoreError:
        with suppress(OSError):
            aside.unlink()
        raise
    if had_one:
        with writing_to(kept):
            aside.rename(kept)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and facts of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, truncated, altered, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        hint = way_on(path) if has_checkpoint(path.parent) else "train the run first, or check the path"
        raise CheckpointError(f"no checkpoint at `{path}`", hint=hint) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` is no checkpoint of dla: {error}", hint=way_on(path)) from error
    if not {"facts", "sha256"} <= metadata.keys():
        raise CheckpointError(
            f"`{path}` is no checkpoint of this version of dla: it has no checksum", hint=way_on(path)
        )
    if checksum_of(tensors, metadata["facts"]) != metadata["sha256"]:
        raise CheckpointError(f"`{path}` is damaged: its content does not have its checksum", hint=way_on(path))
    return tensors, json.loads(metadata["facts"])


def checksum_of(tensors: Mapping[str, Tensor], facts: str) -> str:
    """sha256 over facts, names, dtypes, shapes and bytes of contiguous CPU tensors, hexadecimal."""
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has got as far as a checkpoint, be it that the last one is not there any more."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def way_on(path: Path) -> str:
    """The hint where a checkpoint cannot be read: the one before it, if there is one that may be gone on from."""
    previous = path.with_name(PREVIOUS)
    if path.name == LAST and previous.exists():
        return f"go on from the checkpoint before it: mv {previous} {path}, and then `--resume`"
    return start_again(path.parent)


def fitting(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Those of the tensors read from `path` that `wanted` names.

    Raises:
        CheckpointError: if one is missing or has another shape: the file is of another model.
    """
    strange = [name for name, like in wanted.items() if name not in tensors or tensors[name].shape != like.shape]
    if strange:
        raise CheckpointError(
            f"`{path}` is of another model: {name_some(strange)} missing or of another shape",
            hint=start_again(path.parent),
        )
    return {name: tensors[name] for name in wanted}


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
        """The records in order; a last line without its end, as a kill leaves it, counts as not written.

        Raises:
            CheckpointError: if a line is no JSON object with a `step`.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError:  # no JSON, or no UTF-8
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise CheckpointError(
                    f"line {number} of `{self.path}` is damaged: no JSON object with a `step`",
                    hint="mend the line, or remove the file: training needs nothing in it",
                )
            yield record

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
            CheckpointError: if a line is damaged.
            StoreError: if the folder cannot be written.
        """
        kept = "".join(json.dumps(record) + "\n" for record in self if record["step"] <= step)
        write_atomically(self.path, kept.encode())
