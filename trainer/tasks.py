"""What can be trained: a probe, a teacher, a student. Each gives the loop its losses, and logits to measure.

Dimensions: B images, D width, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dla_cache.errors import SpecError
from dla_cache.spec import LatentFormat
from trainer.batch import Batch
from trainer.classifiers import uses_batch_statistics
from trainer.config import SelfTraining
from trainer.features import Features
from trainer.objectives import Need, ObjectiveConfig, ObjectiveInputs, Parties, WeightedSum
from trainer.objectives.cross_entropy import PLAIN, Balance, cross_entropy, has_label
from trainer.objectives.kd import yes_and_no
from trainer.objectives.objective import ModelOutline
from trainer.outline import Blocks, find_blocks, parameter_depths
from trainer.probe import LatentProbe
from trainer.reference import Reference
from trainer.student import student_features, student_position_to_content
from trainer.teacher import Teacher


@dataclass(frozen=True, slots=True)
class TaskLosses:
    """Weighted terms [] and their sum."""

    total: Tensor
    terms: Mapping[str, Tensor]


def sum_terms(terms: Mapping[str, Tensor]) -> TaskLosses:
    """The losses of a step from its terms."""
    return TaskLosses(torch.stack(list(terms.values())).sum(), terms)


class ClassifierTask(Protocol):
    """A task of the loop that also classifies."""

    @property
    def module(self) -> nn.Module:
        """Everything that is trained and checkpointed."""

    def losses(self, batch: Batch) -> TaskLosses:
        """The losses of one batch."""

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """The parameters that every loss term must reach."""

    def branch_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits [B, K] by name; the first is what the model answers, the others are its parts."""

    def position_to_content(self, batch: Batch) -> dict[str, float]:
        """Norm of the positions over norm of the tokens they are added to, for each span; none without tokens."""


def labelled_terms(logits: Mapping[str, Tensor], batch: Batch, balance: Balance = PLAIN) -> dict[str, Tensor]:
    """The cross entropy of each branch on the labelled images."""
    losses = {f"ce_{name}": cross_entropy(value, batch.labels, balance, batch.mixed) for name, value in logits.items()}
    return {name: loss for name, loss in losses.items() if loss is not None}


def self_training_terms(
    logits: Mapping[str, Tensor], answers: Tensor, batch: Batch, config: SelfTraining
) -> dict[str, Tensor]:
    """Cross entropy of each branch with the confident `answers`, logits [B, K], on unlabelled images.

    The mean runs over all unlabelled images, confident or not, so that few answers weigh little; over their classes
    as well where an image may have several.

    Source: FixMatch, arXiv:2001.07685, equation 4.
    """
    unlabelled = ~has_label(batch.labels)
    if batch.is_multi_label:
        # Each class is a question of its own: its answer is yes or no, of logits (z, 0).
        n_classes = answers.shape[1]
        answers, unlabelled = yes_and_no(answers), unlabelled.repeat_interleave(n_classes)
        logits = {name: yes_and_no(value) for name, value in logits.items()}
    confidence, answer = answers.softmax(dim=-1).max(dim=-1)
    chosen = unlabelled & (confidence >= config.confidence)
    if not bool(chosen.any()):
        return {}
    share = config.weight / int(unlabelled.sum())
    return {
        f"self_{name}": share * functional.cross_entropy(value[chosen], answer[chosen], reduction="sum")
        for name, value in logits.items()
    }


class ProbeTask:
    """A classifier on latents alone."""

    def __init__(self, probe: LatentProbe, self_training: SelfTraining | None, balance: Balance = PLAIN) -> None:
        self.module = probe
        self.self_training = self_training
        self.balance = balance

    @property
    def modalities(self) -> tuple[str, ...]:
        """The latents it looks at."""
        return tuple(self.module.config.formats)

    @property
    def outline(self) -> ModelOutline:
        return ModelOutline({}, (), self.module.config.n_classes)

    def features(self, batch: Batch) -> Features:
        return Features(self.module(batch.latents))

    def branch_logits(self, batch: Batch, present: Mapping[str, bool] | None = None) -> dict[str, Tensor]:
        return {"probe": self.module(batch.latents, present=present)}

    def position_to_content(self, batch: Batch) -> dict[str, float]:
        return {}

    def losses(self, batch: Batch) -> TaskLosses:
        return classifier_losses(self, batch, self.self_training, self.balance)

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        return list(self.module.parameters())


class TeacherTask:
    """The DLA teacher; with late fusion each branch has its own cross entropy."""

    def __init__(self, teacher: Teacher, self_training: SelfTraining | None, balance: Balance = PLAIN) -> None:
        self.module = teacher
        self.self_training = self_training
        self.balance = balance

    @property
    def modalities(self) -> tuple[str, ...]:
        """The latents it looks at beside the image."""
        return self.module.config.modalities

    @property
    def outline(self) -> ModelOutline:
        return ModelOutline(self.module.widths, tuple(self.module.spans), self.module.config.n_classes)

    def features(self, batch: Batch) -> Features:
        output = self.module(batch.pixels, batch.latents)
        return Features(output.logits, output.block_outputs, self.module.spans)

    def branch_logits(self, batch: Batch, present: Mapping[str, bool] | None = None) -> dict[str, Tensor]:
        output = self.module(batch.pixels, batch.latents, present=present)
        return {"teacher": output.logits, **output.branch_logits}

    def position_to_content(self, batch: Batch) -> dict[str, float]:
        return self.module.position_to_content(batch.pixels, batch.latents)

    def losses(self, batch: Batch) -> TaskLosses:
        return classifier_losses(self, batch, self.self_training, self.balance)

    def parameter_depths(self) -> dict[str, int]:
        """Of each parameter by name, see `trainer.loop.HasDepths`; the late branch learns as fast as the head."""
        return parameter_depths(self.module, [f"blocks.{number}" for number in range(len(self.module.blocks))])

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def classifier_losses(
    task: ProbeTask | TeacherTask, batch: Batch, self_training: SelfTraining | None, balance: Balance = PLAIN
) -> TaskLosses:
    """Losses of every branch on labels, and on the model's own confident answers where there is none."""
    branches = task.branch_logits(batch)
    # The answer itself is the mean of the branches: its own loss would count them twice.
    trained = dict(list(branches.items())[1:]) or branches
    terms = labelled_terms(trained, batch, balance)
    if self_training is not None:
        task.module.eval()
        with torch.no_grad():
            answers = next(iter(task.branch_logits(batch).values()))
        task.module.train()
        terms |= self_training_terms(trained, answers, batch, self_training)
    return sum_terms(terms)


class StudentTask:
    """An image-only student under its objectives."""

    def __init__(
        self,
        student: PreTrainedModel,
        objective: ObjectiveConfig | None = None,
        reference: Reference | None = None,
        balance: Balance = PLAIN,
        *,
        formats: Mapping[str, LatentFormat] | None = None,
        n_images: int = 0,
        is_multi_label: bool = False,
    ) -> None:
        """
        Args:
            objective: None for a student that is not trained but used.
            formats: of the latents that the objectives read.
            n_images: rows of the store.
            is_multi_label: whether an image may have several classes.

        Raises:
            SpecError: if an objective asks for what the student or the reference has not.
        """
        self.student = student
        self.balance = balance
        self.reference = reference
        self.needs_two_images = uses_batch_statistics(student)
        self.objectives: WeightedSum | None = None
        self.reads_blocks = False
        parts: dict[str, nn.Module] = {"student": student}
        if objective is not None:
            self.reads_blocks = Need.STUDENT_BLOCKS in objective.needs
            parties = Parties(
                self.outline if self.reads_blocks else ModelOutline({}, (), len(student.config.id2label or ())),
                reference.outline if reference is not None else None,
                formats or {},
                n_images,
                is_multi_label,
            )
            self.objectives = parts["objectives"] = WeightedSum(objective, parties)
        self.module = nn.ModuleDict(parts)

    @cached_property
    def blocks(self) -> Blocks:
        """Where its features are; looked for when somebody wants them."""
        return find_blocks(self.student)

    @property
    def outline(self) -> ModelOutline:
        return ModelOutline(self.blocks.widths, tuple(self.blocks.spans), len(self.student.config.id2label or ()))

    def features(self, batch: Batch) -> Features:
        return student_features(self.student, self.blocks, batch.pixels)

    def branch_logits(self, batch: Batch) -> dict[str, Tensor]:
        return {"student": self.student(pixel_values=batch.pixels).logits}

    def position_to_content(self, batch: Batch) -> dict[str, float]:
        ratio = student_position_to_content(self.student, batch.pixels)
        return {} if ratio is None else {"image": ratio}

    def check_batch(self, batch: Batch) -> None:
        """Refuses a batch that says nothing of its statistics.

        Raises:
            SpecError: if a student with batch norm is shown one image alone.
        """
        if self.needs_two_images and len(batch) < 2:
            raise SpecError(
                f"the student's batch norm (`{self.student.config.model_type}`) cannot learn from one image at a time",
                hint="set `labelled_per_batch`, or what is left of it on each process, to 2 or more",
            )

    def losses(self, batch: Batch) -> TaskLosses:
        assert self.objectives is not None
        self.check_batch(batch)
        inputs = ObjectiveInputs(
            self.features(batch) if self.reads_blocks else Features(self.student(pixel_values=batch.pixels).logits),
            batch.labels,
            targets=self.reference.targets(batch, self.objectives.targets) if self.reference is not None else {},
            latents=batch.latents,
            rows=batch.rows,
            step=batch.step,
            is_multi_label=batch.is_multi_label,
            balance=self.balance,
            mixed=batch.mixed,
        )
        return sum_terms(self.objectives(inputs))

    def taught_parameters(self) -> Sequence[nn.Parameter]:
        """The student's own: a term that teaches its head alone teaches nothing that is kept."""
        return list(self.student.parameters())

    def parameter_depths(self) -> dict[str, int]:
        """Parameter name in `module` → 0 before the first block, to one more than the last block's after it."""
        depths = parameter_depths(self.student, tuple(self.blocks.widths))
        top = max(depths.values())
        of_objectives = self.objectives.named_parameters() if self.objectives is not None else ()
        of_student = {f"student.{name}": depth for name, depth in depths.items()}
        return of_student | {f"objectives.{name}": top for name, _ in of_objectives}
