"""What a student may learn from: a frozen model at hand, or what one has said before."""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from trainer.batch import Batch
from trainer.features import Features, Target
from trainer.objectives.objective import ModelOutline


class Reference(Protocol):
    """A frozen model that a student learns from, at hand or by what it said before."""

    @property
    def outline(self) -> ModelOutline:
        """Its blocks, what its tokens stand for, its classes."""

    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        """What it says of a batch, without gradient."""


class FeatureTask(Protocol):
    """A task whose model can be learned from."""

    @property
    def module(self) -> torch.nn.Module:
        """The model."""

    @property
    def outline(self) -> ModelOutline:
        """Its blocks, what its tokens stand for, its classes."""

    def features(self, batch: Batch) -> Features:
        """Logits and blocks of a batch."""


class FrozenClassifier:
    """A probe, teacher or student that a student learns from, run on the student's own view."""

    def __init__(self, task: FeatureTask) -> None:
        self.task = task
        task.module.eval().requires_grad_(False)

    @property
    def outline(self) -> ModelOutline:
        return self.task.outline

    @torch.no_grad()
    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        features = self.task.features(batch)
        return {target: features.target(target) for target in wanted}
