"""What a student is trained on: a weighted sum of named objectives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain
from typing import Any, Self

from pydantic import model_validator
from torch import Tensor

from dla_cache.spec import StrictModel
from trainer.features import LOGITS, Target
from trainer.heads import MessyTerm
from trainer.objectives.ce import PLAIN, Balance, CeConfig, MixedLabels, cross_entropy
from trainer.objectives.kd import KdConfig, kd_loss
from trainer.objectives.messy import MessyConfig, messy_loss, messy_targets


class Need(Enum):
    """What an objective must be given beside the student's logits."""

    LABELS = auto()
    TEACHER_LOGITS = auto()
    BLOCK_TARGETS = auto()


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """What is known of a batch; what no active objective needs may be left out."""

    student_logits: Tensor
    """[B, K]."""
    labels: Tensor | None = None
    """int64 [B], or [B, K] where images have several; -1 where an image has none."""
    targets: Mapping[Target, Tensor] = field(default_factory=dict)
    """What the student learns from says of the batch."""
    predictions: Mapping[MessyTerm, Tensor] = field(default_factory=dict)
    """[B, D] each, from the student's heads."""
    is_multi_label: bool = False
    """Whether each class is a question of its own."""
    balance: Balance = PLAIN
    """How the cross entropy evens out classes."""
    mixed: MixedLabels | None = None
    """Whose labels count beside an image's own, where images are mixed."""

    def has(self, need: Need) -> bool:
        """Whether `need` is given."""
        given = {
            Need.LABELS: self.labels is not None,
            Need.TEACHER_LOGITS: LOGITS in self.targets,
            Need.BLOCK_TARGETS: bool(self.predictions),
        }
        return given[need]


@dataclass(frozen=True, slots=True)
class Objective:
    """An entry of the registry: what it needs, and its unweighted loss (None: nothing to say)."""

    needs: frozenset[Need]
    loss: Callable[[Any, ObjectiveInputs], Tensor | None]
    """Takes the objective's own config and the inputs it needs."""


def _ce(config: CeConfig, inputs: ObjectiveInputs) -> Tensor | None:
    assert inputs.labels is not None
    return cross_entropy(inputs.student_logits, inputs.labels, inputs.balance, inputs.mixed)


def _kd(config: KdConfig, inputs: ObjectiveInputs) -> Tensor:
    teacher_logits = inputs.targets[LOGITS]
    return kd_loss(inputs.student_logits, teacher_logits, config.temperature, is_multi_label=inputs.is_multi_label)


def _messy(config: MessyConfig, inputs: ObjectiveInputs) -> Tensor:
    return messy_loss(inputs.predictions, inputs.targets, normalise_targets=config.normalise_targets)


OBJECTIVES: dict[str, Objective] = {
    "ce": Objective(frozenset({Need.LABELS}), _ce),
    "kd": Objective(frozenset({Need.TEACHER_LOGITS}), _kd),
    "messy": Objective(frozenset({Need.BLOCK_TARGETS}), _messy),
}


class ObjectiveConfig(StrictModel):
    """The active objectives; one that is absent takes no part. Field names are those of the registry."""

    ce: CeConfig | None = None
    kd: KdConfig | None = None
    messy: MessyConfig | None = None

    @model_validator(mode="after")
    def _teaches_something(self) -> Self:
        if not self.active:
            raise ValueError(f"no objective is active; there are {list(OBJECTIVES)}")
        return self

    @property
    def active(self) -> dict[str, StrictModel]:
        """Name → config of the objectives that take part."""
        return {name: getattr(self, name) for name in OBJECTIVES if getattr(self, name) is not None}

    @property
    def needs(self) -> frozenset[Need]:
        """All that the active objectives must be given."""
        return frozenset().union(*(OBJECTIVES[name].needs for name in self.active))

    def targets(self, blocks: Sequence[str], spans: Sequence[str]) -> tuple[Target, ...]:
        """What a model with such blocks and spans must be asked about a batch; see `messy_targets`."""
        logits = [LOGITS] if Need.TEACHER_LOGITS in self.needs else []
        of_layers = messy_targets(self.messy, blocks, spans) if self.messy is not None else []
        return tuple(dict.fromkeys([*logits, *chain.from_iterable(of_layers)]))


def weighted_terms(config: ObjectiveConfig, inputs: ObjectiveInputs) -> dict[str, Tensor]:
    """Each active objective's weighted loss []; one that has nothing to say on this batch is left out.

    Raises:
        ValueError: if an active objective lacks an input: it must not drop out without a word.
    """
    lacking = sorted(need.name for need in config.needs if not inputs.has(need))
    if lacking:
        raise ValueError(f"active objectives {list(config.active)} need {lacking}")
    losses = {name: OBJECTIVES[name].loss(settings, inputs) for name, settings in config.active.items()}
    return {name: getattr(config, name).weight * loss for name, loss in losses.items() if loss is not None}
