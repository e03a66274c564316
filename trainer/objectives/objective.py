"""What one objective is: a config that says what it needs, and a module that gives its loss.

Dimensions: B images, N tokens of a block, D its width, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Annotated, ClassVar, Protocol

from pydantic import Field
from torch import Tensor, nn

from dla_cache.errors import SpecError
from dla_cache.spec import LatentFormat, StrictModel
from trainer.features import Features, Target
from trainer.objectives.cross_entropy import PLAIN, Balance, MixedLabels


class Need(Enum):
    """What an objective must be given beside the student's logits."""

    LABELS = auto()
    REFERENCE = auto()
    """What a probe, a teacher or another student says of a batch, at hand or stored."""
    STUDENT_BLOCKS = auto()
    TEACHERS = auto()
    """At hand, to be run on a batch with something done to their features."""
    LATENTS = auto()
    """Of the batch itself, without anybody who has looked at them."""


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """What an objective must know of a model to fit to it."""

    blocks: Mapping[str, int]
    """Width D of each block by its name, in their order; none of a probe."""
    spans: tuple[str, ...]
    """What its tokens stand for: `cls` and `image` as far as it has them, and the modalities that it sees."""
    n_classes: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of its blocks."""
        return tuple(self.blocks)

    def width(self, block: int) -> int:
        """D of a block's tokens."""
        return list(self.blocks.values())[block]


Mask = Callable[[Tensor], Tensor]
"""Weights [B, D] of features [B, N, D]."""


class LiveModels(Protocol):
    """Models at hand, about the images of one batch."""

    def logits(self, name: str, *, place: str = "", mask: Mask | None = None, is_trained: bool = False) -> Tensor:
        """What one of them answers, [B, K].

        Args:
            place: where its features are weighed, by its name; nowhere if empty.
            mask: is shown the features [B, N, D] of that place and gives their weights [B, D].
            is_trained: whether the model is in training mode and gets a gradient; else it stands still, and the mask
                alone gets one.
        """


@dataclass(frozen=True, slots=True)
class Parties:
    """Between whom an objective stands."""

    student: ModelOutline
    reference: ModelOutline | None
    """What the student learns from; None for a student of labels or latents alone."""
    formats: Mapping[str, LatentFormat] = field(default_factory=dict)
    """Of the latents that the objectives read."""
    n_images: int = 0
    """Rows of the store."""
    is_multi_label: bool = False
    """Whether an image may have several classes."""
    live: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Of the teachers at hand, by their names: width D of each place where features can be weighed, in their order."""
    n_steps: int = 0
    """Of the run."""

    def teacher(self) -> ModelOutline:
        """The reference, for an objective that needs one."""
        assert self.reference is not None
        return self.reference


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """What is known of a batch; what no active objective needs may be left out."""

    student: Features
    """With blocks, where an objective needs them."""
    labels: Tensor | None = None
    """int64 [B], or [B, K] where images have several; -1 where an image has none."""
    targets: Mapping[Target, Tensor] = field(default_factory=dict)
    """What the student learns from says of the batch."""
    latents: Mapping[str, Tensor] = field(default_factory=dict)
    """Raw latents of the images, float32 [B, *shape] or int64 codes."""
    rows: Tensor | None = None
    """int64 [B], the images' rows in the store."""
    step: int = 0
    """Counted from 0."""
    is_multi_label: bool = False
    """Whether each class is a question of its own."""
    balance: Balance = PLAIN
    """How the cross entropy evens out classes."""
    mixed: MixedLabels | None = None
    """Whose labels count beside an image's own, where images are mixed."""
    live: LiveModels | None = None
    """The teachers at hand, about this batch."""

    def lacks(self, config: "TermConfig", targets: tuple[Target, ...]) -> list[str]:
        """Names of what a term needs and is not there."""
        absent = [str(target) for target in targets if target not in self.targets]
        if Need.LABELS in config.needs and self.labels is None:
            absent.append("labels")
        if Need.STUDENT_BLOCKS in config.needs and not self.student.blocks:
            absent.append("the student's blocks")
        if Need.TEACHERS in config.needs and self.live is None:
            absent.append("the teachers themselves")
        return absent + [name for name in config.latents if name not in self.latents]


class Objective(nn.Module):
    """One term of the loss, with all that is trained for it beside the student and thrown away afterwards."""

    def forward(self, inputs: ObjectiveInputs) -> Tensor | Mapping[str, Tensor] | None:
        """The unweighted loss [], float32 or wider; None if it has nothing to say on this batch.

        Or its parts by name, which are added up. Each is then watched and reported as a term of its own, so each must
        teach the student: what teaches the objective's own parameters alone belongs into a sum that does.

        Targets are detached here, whatever they come from.
        """
        raise NotImplementedError

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Takes the per-channel mean and standard deviation [C] of a modality, over the training splits."""


class TermConfig(StrictModel):
    """Base of an objective's config: its weight, what it needs, and how its module is made."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    wants_one_class: ClassVar[bool] = False
    """Whether each image must be of one class, so that none can be mixed of two."""
    wants_all_logits: ClassVar[bool] = False
    """Whether stored targets that keep the largest logits alone would make another loss of it."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def is_of_labels(self) -> bool:
        """Whether it has nothing to say of an image without a label."""
        return False

    @property
    def latents(self) -> tuple[str, ...]:
        """Modalities whose latents it reads itself."""
        return ()

    @property
    def trains_teachers(self) -> bool:
        """Whether teachers at hand learn from it as well."""
        return False

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        """What the reference must be asked about each batch.

        Raises:
            SpecError: if the reference cannot say it.
        """
        return ()

    def build(self, parties: Parties) -> Objective:
        """Its module, freshly initialised from torch's generator.

        Raises:
            SpecError: if student or reference have not what it is about.
        """
        raise NotImplementedError


def refuse_several_labels(objective: str, parties: Parties, reason: str) -> None:
    """Passes images of one class each.

    Args:
        objective: its name.
        reason: what it does that several classes do not go with, as a predicate.

    Raises:
        SpecError: if an image may have several.
    """
    if parties.is_multi_label:
        raise SpecError(
            f"`{objective}` {reason}, and images of this store may have several",
            hint="`kd` and objectives that compare features are there for them",
        )
