"""A trained student as a folder for other programs, checked against the student itself before it is there.

Dimensions: B images, S side of what the student sees, K classes.
"""

import copy
import errno
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from dla_cache.durable import make_folder, sync_folder, writing_to
from dla_cache.errors import CheckpointError, DlaError, ExportError, MissingDependencyError
from dla_cache.images import Pixels, centre_square, decode_image
from dla_cache.pairs import PairStream
from dla_cache.store import open_store
from trainer.card import model_card
from trainer.config import folder_of
from trainer.data import PixelScale
from trainer.predict import require_student
from trainer.run import load_run
from trainer.run_folder import read_result
from trainer.student import export_student
from trainer.tasks import StudentTask
from trainer.upbringing import TrainedRun

N_CHECKED = 8
"""Images that an export is checked on."""

TOLERANCE = 1e-3
"""Largest difference of a logit, in units of the largest logit or of 1: other kernels add in another order."""

LoadedExport = Callable[[Sequence[Pixels]], Tensor]
"""From images uint8 [3, H, W], each of its own size, to logits [B, K]: what a user of the export gets."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how near it comes to the student."""

    folder: str
    format: str
    size_bytes: int
    checked_on: str
    """Which images."""
    max_difference: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """To compare it with."""


@dataclass(frozen=True, slots=True)
class Student:
    """What all formats are made of."""

    model: PreTrainedModel
    class_names: tuple[str, ...]
    is_multi_label: bool
    image_size: int
    pixel_scale: PixelScale

    def pixels(self, images: Sequence[Pixels]) -> Tensor:
        """float32 [B, 3, S, S], as evaluation sees them."""
        return self.pixel_scale.apply(torch.from_numpy(np.stack([centre_square(i, self.image_size) for i in images])))


class PlainLogits(nn.Module):
    """A student that takes pixels [B, 3, S, S] and returns logits [B, K], both plain tensors."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.student(pixel_values=pixels).logits
        return logits


def export_run(
    folder: Path, out: Path, *, format_name: str = "transformers", notes: Mapping[str, str] | None = None
) -> ExportReport:
    """Writes the student that a finished run kept to the new folder `out`, in one of `FORMATS`.

    Args:
        notes: what to say in the model card of each source, by the source's name.

    Raises:
        CheckpointError: if the run is no student's, or not finished, or `out` is there.
        ExportError: if what was written gives other logits than the student.
        MissingDependencyError: if the format needs a package that is not installed.
        StoreError: if `out` cannot be written.
    """
    require_student(folder)
    run, result = load_run(folder), read_result(folder)
    assert isinstance(run.task, StudentTask)
    if os.path.lexists(out):
        raise CheckpointError(f"`{out}` is there already", hint="choose another folder, or remove it")
    scale = PixelScale(run.config.pixel_mean, run.config.pixel_std)
    student = Student(run.task.student, run.facts.class_names, run.facts.is_multi_label, run.config.image_size, scale)
    images, checked_on = images_to_check(run)
    with new_folder(out) as temporary:
        loaded = FORMATS[format_name](student, temporary)
        difference, largest = compare(loaded, student, images)
        if not difference <= TOLERANCE * max(1.0, largest):  # `not`, for NaN
            raise ExportError(
                f"the export as {format_name} differs from the student by {difference:.2g} in a logit, on {checked_on}",
                hint="nothing is written; update torch and transformers, or choose another `--format`",
            )
        card = model_card(run, result, format_name=format_name, notes=notes or {})
        (temporary / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    return ExportReport(str(out), format_name, size, checked_on, difference, largest)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, that becomes `out` if the block ends well, and else goes.

    Raises:
        StoreError: if it cannot be written, or `out` has come up meanwhile.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with writing_to(out):
        make_folder(out.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # of a dead process of the same number
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(temporary)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(out.parent)


def images_to_check(run: TrainedRun) -> tuple[tuple[Pixels, ...], str]:
    """Some images that the run was validated on, or made ones where its store is not at hand; and which."""
    config = run.config
    try:
        store = open_store(config.store)
        splits = config.roles.validation
        images = folder_of(config.images)
        stream = PairStream(store, images, splits, N_CHECKED, seed=0, decode=decode_image, modalities=(), shuffle=False)
        pixels = stream.batch(0).pixels
        return pixels, f"{len(pixels)} images of {' and '.join(splits)}"
    except DlaError as error:
        side, generator = config.image_size, np.random.default_rng(0)
        sizes = [(side + 7 * n, 2 * side - 5 * n % side) for n in range(N_CHECKED)]
        made = tuple(generator.integers(0, 256, (3, *size), dtype=np.uint8) for size in sizes)
        return made, f"{N_CHECKED} images of random pixels, since {error.message}"


@torch.inference_mode()
def compare(loaded: LoadedExport, student: Student, images: Sequence[Pixels]) -> tuple[float, float]:
    """Largest difference of a logit, over all images at once and the first alone; and the largest logit."""
    logits = student.model(pixel_values=student.pixels(images)).logits
    exported, alone = loaded(images), loaded(images[:1])
    if exported.shape != logits.shape or alone.shape != logits[:1].shape:
        raise ExportError(f"the export puts out logits {list(exported.shape)}, the student {list(logits.shape)}")
    differences = torch.cat([exported - logits, alone - logits[:1]]).abs()
    return float(differences.max()), float(logits.abs().max())


def export_transformers(student: Student, folder: Path) -> LoadedExport:
    """Weights, class map and image processor, as stock transformers loads them."""
    try:
        export_student(
            student.model,
            folder,
            class_names=student.class_names,
            is_multi_label=student.is_multi_label,
            image_size=student.image_size,
            pixel_scale=student.pixel_scale,
        )
    except SafetensorError as error:  # its word for a full disk
        raise OSError(errno.EIO, str(error)) from error
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
    model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)

    def logits(images: Sequence[Pixels]) -> Tensor:
        pixels = processor([image.transpose(1, 2, 0) for image in images], return_tensors="pt")["pixel_values"]
        output: Tensor = model(pixel_values=pixels).logits
        return output

    return logits


def export_torch(student: Student, folder: Path) -> LoadedExport:
    """`model.pt2`, from pixels [B, 3, S, S], any B, to logits."""
    write_class_names(student, folder)
    content = io.BytesIO()  # torch's own writer has no OSError for a full disk
    torch.export.save(traced(student), content)
    (folder / "model.pt2").write_bytes(content.getbuffer())
    model = torch.export.load(folder / "model.pt2").module()

    def logits(images: Sequence[Pixels]) -> Tensor:
        output: Tensor = model(student.pixels(images))
        return output

    return logits


def export_onnx(student: Student, folder: Path) -> LoadedExport:
    """`model.onnx`, from `pixels` [B, 3, S, S], any B, to `logits`.

    Raises:
        MissingDependencyError: if a package of the extra `onnx` is not installed.
    """
    runtime = [require_onnx(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    write_class_names(student, folder)
    # Fused attention over windows, as Swin's, has a layout that the exporter does not follow.
    plain = replace(student, model=copy.deepcopy(student.model))
    plain.model.set_attn_implementation("eager")
    with without_remarks("torch.onnx"):
        program = torch.onnx.export(
            traced(plain),
            dynamo=True,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: "batch"}},
            verbose=False,
        )
    assert program is not None
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"pixels": student.pixels(images).numpy()})[0])


FORMATS: Mapping[str, Callable[[Student, Path], LoadedExport]] = {
    "transformers": export_transformers,
    "torch-export": export_torch,
    "onnx": export_onnx,
}


def traced(student: Student) -> torch.export.ExportedProgram:
    """The student's graph, free in B, without the places on this machine where its code lies."""
    example = torch.zeros(2, 3, student.image_size, student.image_size)
    program = torch.export.export(
        PlainLogits(student.model).eval(), (example,), dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}}
    )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_class_names(student: Student, folder: Path) -> None:
    """`class_names.json`: what each of the K logits stands for."""
    (folder / "class_names.json").write_text(json.dumps(student.class_names, indent=1), encoding="utf-8")


def require_onnx(name: str) -> Any:
    """A package of the extra `onnx`.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"an export as onnx needs `{name}`: {error}", hint="pip install 'dla[onnx]'"
        ) from error


@contextmanager
def without_remarks(logger_name: str) -> Iterator[None]:
    """Keeps a library's warnings from the user: they are about its own code and ours, not about the export."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
