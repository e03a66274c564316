"""What a student may learn from: a frozen model at hand, or what one has said before.

Dimensions: D width of a block's tokens.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainer.data import Batch
from trainer.features import Features, Target


class Reference(Protocol):
    """A frozen model that a student learns from, at hand or by what it said before."""

    @property
    def block_names(self) -> tuple[str, ...]:
        """Of its blocks, in their order; none of a probe."""

    @property
    def spans(self) -> tuple[str, ...]:
        """What its tokens stand for: `cls` and `image` as far as it has them, and the modalities that it sees."""

    def width(self, block: int) -> int:
        """D of a block's tokens."""

    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        """What it says of a batch, without gradient."""


class FeatureTask(Protocol):
    """A task whose model can be learned from."""

    @property
    def module(self) -> torch.nn.Module:
        """The model."""

    @property
    def widths(self) -> Mapping[str, int]:
        """D of each block by the block's name, in their order."""

    @property
    def spans(self) -> tuple[str, ...]:
        """What its tokens stand for."""

    def features(self, batch: Batch) -> Features:
        """Logits and blocks of a batch."""


class FrozenClassifier:
    """A probe, teacher or student that a student learns from, run on the student's own view."""

    def __init__(self, task: FeatureTask) -> None:
        self.task = task
        task.module.eval().requires_grad_(False)

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(self.task.widths)

    @property
    def spans(self) -> tuple[str, ...]:
        return self.task.spans

    def width(self, block: int) -> int:
        return list(self.task.widths.values())[block]

    @torch.no_grad()
    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        features = self.task.features(batch)
        return {target: features.target(target) for target in wanted}
