"""How often a classifier is right, and how sure that number is."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from trainer.data import Batch
from trainer.tasks import ClassifierTask


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 as a fraction of `n` images."""

    correct: int
    n: int

    @property
    def top1(self) -> float:
        """Fraction in [0, 1]."""
        return self.correct / self.n

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval: the spread of drawing `n` images, not of training again.

        Source: Wilson (1927), as in Brown, Cai and DasGupta (2001), equation 4.
        """
        z = 1.959964
        centre = (self.top1 + z * z / (2 * self.n)) / (1 + z * z / self.n)
        spread = math.sqrt(self.top1 * (1 - self.top1) / self.n + z * z / (4 * self.n * self.n))
        half = z / (1 + z * z / self.n) * spread
        return centre - half, centre + half


def measure_accuracy(task: ClassifierTask, batches: Callable[[], Iterator[Batch]]) -> dict[str, Accuracy]:
    """Accuracy of the answer, and of each branch beside it, over labelled images; the answer stands first."""
    correct: dict[str, int] = {}
    n = 0
    task.module.eval()
    with torch.inference_mode():
        for batch in batches():
            n += len(batch)
            for name, logits in task.branch_logits(batch).items():
                hits = int((logits.argmax(dim=-1) == batch.labels).sum())
                correct[name] = correct.get(name, 0) + hits
    return {name: Accuracy(hits, n) for name, hits in correct.items()}
