"""How often a classifier is right, how sure it is, and how sure those numbers are.

Dimensions: N images, K classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.tasks import ClassifierTask, ProbeTask, TeacherTask

CALIBRATION_BINS = 15

TOP = 5
"""Guesses of the looser accuracy, for more classes than that."""

Batches = Callable[[], Iterator[Batch]]
"""Labelled images, each once."""


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


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a classifier says of some labelled images, in their order."""

    image_ids: tuple[str, ...]
    labels: Tensor
    """int64 [N]."""
    logits: Tensor
    """float32 [N, K]."""

    @property
    def predicted(self) -> Tensor:
        """The likeliest class, int64 [N]."""
        return self.logits.argmax(dim=-1)

    @property
    def probabilities(self) -> Tensor:
        """float64 [N, K]."""
        return self.logits.double().softmax(dim=-1)

    def accuracy(self) -> Accuracy:
        """How often the likeliest class is the label."""
        return Accuracy(int((self.predicted == self.labels).sum()), len(self.labels))

    def accuracy_within(self, guesses: int) -> Accuracy:
        """How often the label is among the likeliest classes, so many `guesses` of them."""
        likeliest = self.logits.topk(guesses, dim=-1).indices
        return Accuracy(int((likeliest == self.labels[:, None]).any(dim=-1).sum()), len(self.labels))

    def log_loss(self) -> float:
        """Mean negative log-probability of the labels, in nats."""
        log_probabilities = self.logits.double().log_softmax(dim=-1)
        return float(-log_probabilities.gather(1, self.labels[:, None]).mean())

    def confusion(self) -> Tensor:
        """How many images of each class (row) were taken for each class (column), int64 [K, K]."""
        n_classes = self.logits.shape[1]
        pairs = self.labels * n_classes + self.predicted
        return torch.bincount(pairs, minlength=n_classes**2).view(n_classes, n_classes)

    def calibration_error(self) -> float:
        """Expected calibration error over `CALIBRATION_BINS` bins of equal width: mean |accuracy - confidence|.

        A bin holds confidences above its lower edge and up to its upper one, and counts by its images. The
        estimate is biased upwards where bins hold few images.

        Source: Guo et al., arXiv:1706.04599, equation 3.
        """
        confidences = self.probabilities.max(dim=-1).values
        edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)[1:-1]
        surplus = (self.predicted == self.labels).double() - confidences
        sums = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
        sums.index_add_(0, torch.bucketize(confidences, edges), surplus)
        return float(sums.abs().sum() / len(self.labels))


@torch.inference_mode()
def predict(task: ClassifierTask, batches: Batches) -> Predictions:
    """What the task answers for each image."""
    image_ids: list[str] = []
    labels, answers = [], []
    task.module.eval()
    for batch in batches():
        image_ids += batch.image_ids
        labels.append(batch.labels.cpu())
        logits = next(iter(task.branch_logits(batch).values()))
        answers.append(logits.float().cpu())
    return Predictions(tuple(image_ids), torch.cat(labels), torch.cat(answers))


@torch.inference_mode()
def measure_accuracy(task: ClassifierTask, batches: Batches) -> dict[str, Accuracy]:
    """Accuracy of the answer, and of each branch beside it, over labelled images; the answer stands first."""
    correct: dict[str, int] = {}
    n = 0
    task.module.eval()
    for batch in batches():
        n += len(batch)
        for name, logits in task.branch_logits(batch).items():
            correct[name] = correct.get(name, 0) + n_correct(logits, batch)
    return {name: Accuracy(hits, n) for name, hits in correct.items()}


@torch.inference_mode()
def measure_subsets(task: ProbeTask | TeacherTask, batches: Batches) -> dict[tuple[str, ...], Accuracy]:
    """Accuracy of the answer for every subset of the task's modalities, the others left out of all images.

    From none to all, each in the task's order. With none a teacher sees the image alone, and a probe nothing:
    it gives one answer to all.
    """
    names = task.modalities
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    correct = dict.fromkeys(subsets, 0)
    n = 0
    task.module.eval()
    for batch in batches():
        n += len(batch)
        for subset in subsets:
            present = {name: name in subset for name in names}
            correct[subset] += n_correct(next(iter(task.branch_logits(batch, present).values())), batch)
    return {subset: Accuracy(hits, n) for subset, hits in correct.items()}


def name_subsets(task: ProbeTask | TeacherTask, subsets: Mapping[tuple[str, ...], Accuracy]) -> dict[str, Accuracy]:
    """The subsets in words, such as `image and depth`: those with something left out and something to see."""
    always = () if isinstance(task, ProbeTask) else ("image",)
    return {
        " and ".join((*always, *subset)) + " alone" * (len(always + subset) == 1): accuracy
        for subset, accuracy in subsets.items()
        if always + subset and len(subset) < len(task.modalities)
    }


def n_correct(logits: Tensor, batch: Batch) -> int:
    """How many of a batch the logits [B, K] are right on."""
    return int((logits.argmax(dim=-1) == batch.labels).sum())
