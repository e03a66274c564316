"""`test.csv` of a run folder: what the run answered to each image of the test split, the one time it was read.

A line an image: its ID, its label, the class that was answered. Where an image may have several classes the label is a
JSON list of their numbers, and the answer one of a logit for each class.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dla_cache.errors import CheckpointError
from trainer.checkpoint import write_atomically
from trainer.evaluate import Predictions
from trainer.records import start_again

ANSWERS_NAME = "test.csv"
COLUMNS = ("image_id", "label", "prediction")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a run answered, in the order in which the store has the images."""

    image_ids: tuple[str, ...]
    labels: tuple[str, ...]
    """Class numbers, or JSON lists of them."""
    predictions: tuple[str, ...]
    """Class numbers, or JSON lists of logits."""

    def hits(self) -> list[bool]:
        """Whether each answer is right, where an image has one class."""
        return [label == answer for label, answer in zip(self.labels, self.predictions, strict=True)]


def write_answers(path: Path, parts: Sequence[Predictions]) -> None:
    """Writes the answers of some batches, in their order.

    Raises:
        StoreError: if the folder cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for part in parts:
        answers = _logits(part.logits) if part.is_multi_label else part.predicted.tolist()
        labels = _classes(part.labels) if part.is_multi_label else part.labels.tolist()
        table.writerows(zip(part.image_ids, labels, answers, strict=True))
    write_atomically(path, text.getvalue().encode())


def read_answers(folder: Path) -> Answers:
    """The answers of a finished run.

    Raises:
        CheckpointError: if there are none, or the file is damaged.
    """
    path = folder / ANSWERS_NAME
    try:
        with path.open(encoding="utf-8", newline="") as file:
            columns, *lines = csv.reader(file)
        is_whole = tuple(columns) == COLUMNS and all(len(line) == len(COLUMNS) for line in lines) and bool(lines)
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}", hint=start_again(folder)) from error
    if not is_whole:
        raise CheckpointError(f"`{path}` is no table of {', '.join(COLUMNS)}", hint=start_again(folder))
    image_ids, labels, predictions = zip(*lines, strict=True)
    return Answers(image_ids, labels, predictions)


def _classes(labels: Tensor) -> Iterator[str]:
    """Of labels [B, K] of 0 and 1."""
    return (json.dumps(row.nonzero()[:, 0].tolist()) for row in labels)


def _logits(logits: Tensor) -> Iterator[str]:
    """Of logits [B, K], with the digits that float32 has."""
    return (json.dumps([float(f"{value:.7g}") for value in row]) for row in logits.tolist())
