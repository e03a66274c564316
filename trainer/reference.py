"""What a student may learn from: a frozen model at hand, several, or what one has said before.

Dimensions: B images, N tokens, D width, C channels, H and W sides of a map, K classes, n models.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batch import Batch
from trainer.features import LOGITS, Features, Target
from trainer.objectives.objective import Mask, ModelOutline
from trainer.outline import as_tokens
from trainer.precision import at_least_float32


class Reference(Protocol):
    """A frozen model that a student learns from, at hand or by what it said before."""

    @property
    def outline(self) -> ModelOutline:
        """Its blocks, what its tokens stand for, its classes."""

    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        """What it says of a batch, without gradient."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where features of a model can be weighed: what a module of it returns."""

    module: nn.Module
    """Its output is tokens [B, N, D], vectors [B, D] or a map [B, D, H, W], or a tuple that begins with one."""
    width: int
    """D."""


class FeatureTask(Protocol):
    """A task whose model can be learned from."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The latents it looks at."""

    @property
    def outline(self) -> ModelOutline:
        """Its blocks, what its tokens stand for, its classes."""

    @property
    def places(self) -> Mapping[str, Place]:
        """Where its features can be weighed, by the names of modules, in their order."""

    def features(self, batch: Batch) -> Features:
        """Logits and blocks of a batch."""


class FrozenClassifier:
    """A probe, teacher or student that a student learns from, run on the student's own view."""

    def __init__(self, task: FeatureTask) -> None:
        self.task = task
        self.trainable = [parameter for parameter in task.module.parameters() if parameter.requires_grad]
        task.module.eval().requires_grad_(False)

    @property
    def outline(self) -> ModelOutline:
        return self.task.outline

    @torch.no_grad()
    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        with standing_still(self.task.module):
            features = self.task.features(seen_by(self.task, batch))
        return {target: features.target(target) for target in wanted}

    def logits(self, batch: Batch, *, place: str = "", mask: Mask | None = None, is_trained: bool = False) -> Tensor:
        """See `LiveModels`."""
        module = self.task.module
        with ExitStack() as held:
            if is_trained:
                module.train()
            else:
                held.enter_context(standing_still(module))
            if mask is not None:
                hook = self.task.places[place].module.register_forward_hook(weighing(mask))
                held.callback(hook.remove)
            return self.task.features(seen_by(self.task, batch)).logits


def seen_by(task: FeatureTask, batch: Batch) -> Batch:
    """The batch without latents of which a model knows nothing: another one may have asked for them."""
    return replace(batch, latents={name: batch.latents[name] for name in task.modalities if name in batch.latents})


@contextmanager
def standing_still(module: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and none of its parameters is given a gradient, though they are trained."""
    if module.training:
        module.eval()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def weighing(mask: Mask) -> Callable[[nn.Module, Any, Any], Any]:
    """A forward hook that multiplies what a module returns by the weights that `mask` gives of it."""

    def weigh(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (weigh(module, inputs, output[0]), *output[1:])
        tokens = output[:, None] if output.ndim == 2 else as_tokens(output)
        weights = mask(tokens).to(output.dtype)
        shape = {2: weights.shape, 3: (len(weights), 1, -1), 4: (len(weights), -1, 1, 1)}[output.ndim]
        return output * weights.reshape(shape)

    return weigh


class Teachers:
    """Several models at hand, by name; or the only one."""

    def __init__(
        self,
        models: Mapping[str, FrozenClassifier],
        how: Literal["logits", "probabilities"] = "logits",
        *,
        is_multi_label: bool = False,
    ) -> None:
        """
        Args:
            how: their answers become one, see `mean_answer`.
        """
        self.models = models
        self.how = how
        self.is_multi_label = is_multi_label

    @property
    def places(self) -> dict[str, dict[str, int]]:
        """Width of each place of each model."""
        return {
            name: {place: one.width for place, one in model.task.places.items()} for name, model in self.models.items()
        }

    def to_be_trained(self) -> nn.ModuleDict:
        """The models themselves, of which all is trained again that was trained before."""
        for model in self.models.values():
            for parameter in model.trainable:
                parameter.requires_grad_(True)
        return nn.ModuleDict({name: model.task.module for name, model in self.models.items()})

    @property
    def outline(self) -> ModelOutline:
        """Of all as one `Reference`: an answer without blocks."""
        return ModelOutline({}, (), next(iter(self.models.values())).outline.n_classes)

    def targets(self, batch: Batch, wanted: Collection[Target]) -> dict[Target, Tensor]:
        """The mean answer to a batch, without gradient."""
        answers = torch.stack([model.targets(batch, (LOGITS,))[LOGITS] for model in self.models.values()])
        mean = mean_answer(answers, self.how, is_multi_label=self.is_multi_label)
        return dict.fromkeys(wanted, mean)

    def about(self, batch: Batch) -> "TeachersOfBatch":
        """All of them, about one batch."""
        return TeachersOfBatch(self.models, batch)


def live_models(reference: Reference | None) -> Teachers | None:
    """The models at hand that a reference is, by name: `teacher`, if it is one alone; none of stored targets."""
    if isinstance(reference, FrozenClassifier):
        return Teachers({"teacher": reference})
    return reference if isinstance(reference, Teachers) else None


@dataclass(frozen=True, slots=True)
class TeachersOfBatch:
    """See `LiveModels`."""

    models: Mapping[str, FrozenClassifier]
    batch: Batch

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of hooks that come and go
    def logits(self, name: str, *, place: str = "", mask: Mask | None = None, is_trained: bool = False) -> Tensor:
        return self.models[name].logits(self.batch, place=place, mask=mask, is_trained=is_trained)


def mean_answer(answers: Tensor, how: Literal["logits", "probabilities"], *, is_multi_label: bool = False) -> Tensor:
    """Several answers as one.

    The mean of logits is, of whatever temperature, the normalised geometric mean of the distributions. That of
    probabilities p is taken at temperature 1 and told as logits again: log p, and log p/(1 - p) where each class is a
    question of its own. So a temperature softens the answer of the ensemble, as it does that of one model.

    Args:
        answers: logits [n, B, K], any float dtype.

    Returns:
        logits [B, K], float32 or wider.

    Source: Hinton et al., arXiv:1503.02531, section 2 (soft targets of an ensemble: the arithmetic or geometric mean
    of their distributions).
    """
    answers = at_least_float32(answers)
    if how == "logits":
        return answers.mean(dim=0)
    if is_multi_label:
        return functional.logsigmoid(answers).logsumexp(dim=0) - functional.logsigmoid(-answers).logsumexp(dim=0)
    log_n = torch.tensor(float(len(answers)), device=answers.device).log()
    return answers.log_softmax(dim=-1).logsumexp(dim=0) - log_n
