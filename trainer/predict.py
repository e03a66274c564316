"""Image files to classes, by a student alone: no store, no latents, no generator.

Dimensions: B images, S side of what the student sees, K classes.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from dla_cache.candidates import IMAGE_SUFFIXES, RAW_SUFFIXES
from dla_cache.errors import CheckpointError, ImageError, name_some
from dla_cache.images import Pixels, centre_square, decode_image
from dla_cache.ingest import WHAT_IT_IS
from dla_cache.tars import read_range
from trainer.data import PixelScale
from trainer.evaluate import probabilities_of
from trainer.pretrained import FAULTS
from trainer.run import load_run
from trainer.run_folder import read_config
from trainer.student import MULTI_LABEL
from trainer.tasks import StudentTask

READING_THREADS = 8
"""At most; decoding leaves the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class ImageClassifier:
    """A student and all that it needs to get from an image to a class."""

    model: nn.Module
    """Takes `pixel_values` and gives an output with `logits`."""
    class_names: tuple[str, ...]
    is_multi_label: bool
    image_size: int
    pixel_scale: PixelScale
    device: str

    @torch.inference_mode()
    def probabilities(self, pixels: Sequence[Pixels]) -> Tensor:
        """float32 [B, K], on the CPU, of views uint8 [3, S, S]; see `probabilities_of`."""
        scaled = self.pixel_scale.apply(torch.from_numpy(np.stack(pixels))).to(self.device)
        logits: Tensor = self.model(pixel_values=scaled).logits
        return probabilities_of(logits.float(), is_multi_label=self.is_multi_label).cpu()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a student says of a file."""

    path: Path
    classes: tuple[tuple[str, float], ...]
    """The likeliest classes and their probabilities, falling; none for a file that is no image, nor for an image that
    seems to have no class."""
    fault: str | None = None
    """Why there is no answer."""


def open_student(folder: Path, *, device: str = "cpu") -> ImageClassifier:
    """The student in the folder of a finished run, or in one exported for transformers.

    Raises:
        CheckpointError: if there is none, it is damaged or not finished, or the run is no student's.
    """
    if (folder / "config.yaml").exists():
        return student_of_run(folder, device)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"`{folder}` holds neither a run nor a student in the format of transformers",
            hint="name the folder of a finished run, or what `dla export RUN --out DIR` wrote",
        )
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        names = model.config.id2label
        class_names = tuple(str(names[number]) for number in range(len(names)))
        view = json.loads((folder / "preprocessor_config.json").read_bytes())
        is_multi_label = model.config.problem_type == MULTI_LABEL
        image_size = int(view["size"]["shortest_edge"])
        scale = PixelScale(three_floats(view["image_mean"]), three_floats(view["image_std"]))
    except FAULTS as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"`{folder}` holds no student that can be loaded: {type(error).__name__}: {reason}",
            hint="export it again with `dla export`",
        ) from error
    if loading["missing_keys"]:  # transformers would go on with random numbers
        raise CheckpointError(
            f"the weights in `{folder}` lack {name_some(sorted(loading['missing_keys']))}",
            hint="export it again with `dla export`",
        )
    check_view(view, image_size, folder)
    return ImageClassifier(model.to(device), class_names, is_multi_label, image_size, scale, device)


def student_of_run(folder: Path, device: str) -> ImageClassifier:
    """The student that a finished run kept.

    Raises:
        CheckpointError: if the run is no student's, or not finished.
    """
    require_student(folder)
    run = load_run(folder)
    assert isinstance(run.task, StudentTask)
    model: nn.Module = run.task.student
    scale = PixelScale(run.config.pixel_mean, run.config.pixel_std)
    return ImageClassifier(
        model.to(device), run.facts.class_names, run.facts.is_multi_label, run.config.image_size, scale, device
    )


def require_student(folder: Path) -> None:
    """Refuses the run of a model that cannot do without latents.

    Raises:
        CheckpointError: if the run in `folder` is a probe's or a teacher's, or there is none.
    """
    kind = read_config(folder).kind
    if kind != "student":
        raise CheckpointError(
            f"the run in `{folder}` is a {kind}, which needs latents for every image",
            hint=f"name a student's run, such as one distilled from it; `dla evaluate` measures a {kind} on a store",
        )


def three_floats(values: Any) -> tuple[float, float, float]:
    """One number a colour channel."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def check_view(view: Mapping[str, Any], image_size: int, folder: Path) -> None:
    """Refuses an image processor that prepares images in another way than evaluation does.

    Raises:
        CheckpointError: naming the settings that differ.
    """
    ours = {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "do_normalize": True,
    }
    differing = [name for name, value in ours.items() if view.get(name) != value]
    if differing:
        raise CheckpointError(
            f"the image processor in `{folder}` is none of dla's: {name_some(differing)}",
            hint="use it with transformers' own pipeline, or export the student with `dla export`",
        )


def list_images(inputs: Iterable[Path]) -> tuple[list[Path], Counter[str]]:
    """The images that `inputs` name, in their order, and how many files of which kind were passed over.

    A file stands for itself, whatever it is called; a folder for all below it that are named like images, sorted.
    """
    images: list[Path] = []
    skipped: Counter[str] = Counter()
    for given in inputs:
        images += images_below(given, skipped) if given.is_dir() else [given]
    return images, skipped


def images_below(top: Path, skipped: Counter[str]) -> Iterator[Path]:
    """The files below a folder that are named like images, and last the folders that cannot be opened."""
    closed: list[Path] = []
    for folder, below, names in os.walk(top, onerror=lambda error: closed.append(Path(error.filename))):
        visible = sorted(name for name in names if not name.startswith("."))
        images = [name for name in visible if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        passed_over = {
            "hidden": len(names) - len(visible),
            "of other names": len(visible) - len(images),
            "linked folders": len(links),
        }
        skipped.update({kind: count for kind, count in passed_over.items() if count})
        below[:] = sorted(name for name in below if not name.startswith("."))  # links are not followed
        yield from (Path(folder, name) for name in images)
    yield from closed


def classify(
    classifier: ImageClassifier, paths: Iterable[Path], *, batch_size: int, top: int | None = None
) -> Iterator[Answer]:
    """The `top` likeliest classes of each file, in the order of `paths`.

    Args:
        top: None takes the likeliest, or, where an image may have several, all that are likelier than not.
    """
    views = read_ahead(paths, classifier.image_size, n_ahead=2 * batch_size)
    while batch := list(islice(views, batch_size)):
        pixels = [view for _, view in batch if not isinstance(view, str)]
        likeliest = iter(likeliest_classes(classifier, pixels, top) if pixels else [])
        for path, view in batch:
            yield Answer(path, (), view) if isinstance(view, str) else Answer(path, next(likeliest))


def likeliest_classes(
    classifier: ImageClassifier, pixels: Sequence[Pixels], top: int | None
) -> list[tuple[tuple[str, float], ...]]:
    """For each image its `top` classes with their probabilities, falling; see `classify`."""
    names = classifier.class_names
    is_by_half = top is None and classifier.is_multi_label
    values, numbers = classifier.probabilities(pixels).topk(len(names) if is_by_half else top or 1, dim=-1)
    return [
        tuple((names[number], value) for number, value in zip(*rows, strict=True) if value > 0.5 or not is_by_half)
        for rows in zip(numbers.tolist(), values.tolist(), strict=True)
    ]


def read_ahead(paths: Iterable[Path], size: int, *, n_ahead: int) -> Iterator[tuple[Path, Pixels | str]]:
    """The view of each file in order, read by threads while a batch is worked on."""
    ahead: deque[tuple[Path, Future[Pixels | str]]] = deque()
    pool = ThreadPoolExecutor(min(READING_THREADS, os.cpu_count() or 1), thread_name_prefix="images")
    try:
        for path in paths:
            ahead.append((path, pool.submit(view_of_file, path, size)))
            if len(ahead) > n_ahead:
                first, view = ahead.popleft()
                yield first, view.result()
        for path, view in ahead:
            yield path, view.result()
    finally:
        pool.shutdown(cancel_futures=True)


def view_of_file(path: Path, size: int) -> Pixels | str:
    """What evaluation sees of a file, uint8 [3, size, size], or why there is nothing to see."""
    name, content = str(path), b""
    if "\0" in name:
        return "has a null in its name: give one path a line"
    if path.suffix.lower() in RAW_SUFFIXES:  # many can be read as TIFF: what comes out is a thumbnail
        return "is a camera's raw file, which you can convert to JPEG"
    try:
        content = read_range(Path(), name)
        return centre_square(decode_image(content, name), size)
    except ImageError as error:
        what_it_is = next((kind for kind, start in WHAT_IT_IS.items() if start.match(content)), None)
        return f"is {what_it_is}" if what_it_is else error.message.removeprefix(f"image `{name}` ")
