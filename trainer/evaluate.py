"""How good a classifier is, how sure it is, and how sure those numbers are.

Dimensions: N images, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from trainer.batch import Batch
from trainer.records import Metric
from trainer.scores import Accuracy, MeanPrecision, Score, Tally, new_tally
from trainer.tasks import ClassifierTask, ProbeTask, TeacherTask

CALIBRATION_BINS = 15

TOP = 5
"""Guesses of the looser accuracy, for more classes than that."""

Batches = Callable[[], Iterator[Batch]]
"""Labelled images, each once."""


K = TypeVar("K")

Gather = Callable[[Any], Sequence[Any]]
"""Gives the values of all processes, in the order of their ranks."""


def alone(value: Any) -> Sequence[Any]:
    """The values of all processes where there is one."""
    return [value]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a classifier says of some labelled images, in their order."""

    image_ids: tuple[str, ...]
    labels: Tensor
    """int64 [N]; [N, K] of 0 and 1 where an image may have several."""
    logits: Tensor
    """float32 [N, K]."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes; what is of one class an image is then not to be asked."""
        return self.labels.ndim == 2

    @property
    def metric(self) -> Metric:
        """What `score` is."""
        return "mAP" if self.is_multi_label else "top-1"

    def score(self) -> Score:
        """The number that a run is chosen by."""
        return self.precision() if self.is_multi_label else self.accuracy()

    def precision(self) -> MeanPrecision:
        """How well the images of each class are ranked, for labels [N, K]."""
        return MeanPrecision(self.logits, self.labels)

    @property
    def predicted(self) -> Tensor:
        """The likeliest class, int64 [N]."""
        return self.logits.argmax(dim=-1)

    @property
    def probabilities(self) -> Tensor:
        """float64 [N, K]; of one class an image they sum to 1, of several each is that of having the class."""
        return probabilities_of(self.logits.double(), is_multi_label=self.is_multi_label)

    def accuracy(self) -> Accuracy:
        """How often the likeliest class is the label."""
        return Accuracy(int((self.predicted == self.labels).sum()), len(self.labels))

    def accuracy_within(self, guesses: int) -> Accuracy:
        """How often the label is among the likeliest classes, so many `guesses` of them."""
        likeliest = self.logits.topk(guesses, dim=-1).indices
        return Accuracy(int((likeliest == self.labels[:, None]).any(dim=-1).sum()), len(self.labels))

    def log_loss(self) -> float:
        """Mean negative log-probability of the labels, in nats; over images and classes where there may be several."""
        if self.is_multi_label:
            return float(functional.binary_cross_entropy_with_logits(self.logits.double(), self.labels.double()))
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


def probabilities_of(logits: Tensor, *, is_multi_label: bool) -> Tensor:
    """Of logits [N, K]: softmax over the classes, or where an image may have several the sigmoid of each."""
    return logits.sigmoid() if is_multi_label else logits.softmax(dim=-1)


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
def measure_branches(
    task: ClassifierTask, batches: Batches, gather: Gather = alone, answers: list[Predictions] | None = None
) -> dict[str, Score]:
    """The score of the answer, and of each branch beside it, over labelled images; the answer stands first.

    Args:
        gather: gives the tallies of all processes that have taken batches in turn.
        answers: gets what this process answered, batch by batch.
    """
    tallies: dict[str, Tally] = {}
    task.module.eval()
    for batch in batches():
        branches = task.branch_logits(batch)
        for name, logits in branches.items():
            tallies.setdefault(name, new_tally(batch.labels)).add(logits, batch.labels)
        if answers is not None:
            answer = next(iter(branches.values())).float().cpu()
            answers.append(Predictions(batch.image_ids, batch.labels.cpu(), answer))
    return merged_scores(gather(tallies))


@torch.inference_mode()
def measure_subsets(
    task: ProbeTask | TeacherTask, batches: Batches, gather: Gather = alone
) -> dict[tuple[str, ...], Score]:
    """The score of the answer for every subset of the task's modalities, the others left out of all images.

    From none to all, each in the task's order. With none a teacher sees the image alone, and a probe nothing:
    it gives one answer to all.
    """
    names = task.modalities
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    tallies: dict[tuple[str, ...], Tally] = {}
    task.module.eval()
    for batch in batches():
        for subset in subsets:
            present = {name: name in subset for name in names}
            logits = next(iter(task.branch_logits(batch, present).values()))
            tallies.setdefault(subset, new_tally(batch.labels)).add(logits, batch.labels)
    return merged_scores(gather(tallies))


def merged_scores(parts: Sequence[Mapping[K, Tally]]) -> dict[K, Score]:
    """The scores of what several processes counted; the first has had a batch, others perhaps none."""
    return {name: tally.merged([part[name] for part in parts if part]).score() for name, tally in parts[0].items()}


def name_subsets(task: ProbeTask | TeacherTask, subsets: Mapping[tuple[str, ...], Score]) -> dict[str, Score]:
    """The subsets in words, such as `image and depth`: those with something left out and something to see."""
    always = () if isinstance(task, ProbeTask) else ("image",)
    return {
        " and ".join((*always, *subset)) + " alone" * (len(always + subset) == 1): score
        for subset, score in subsets.items()
        if always + subset and len(subset) < len(task.modalities)
    }
