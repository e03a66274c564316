"""The losses of a task as the forward of one module: what DDP, mixed precision and torch.compile take hold of."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from dla_cache.errors import TrainingError

TOTAL = "total"
"""The name of the sum beside those of its terms."""


class StepLosses(Protocol):
    """What a task returns for a batch."""

    @property
    def total(self) -> Tensor:
        """[], the sum of `terms`."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """The active terms, weighted, each []; one that has nothing to say on this batch is left out."""


class LossModule(nn.Module):
    """Its forward on a batch gives the terms [] by name, and their sum as `total`, last."""

    def __init__(
        self,
        trained: nn.Module,
        losses: Callable[[Any], StepLosses],
        backend: Literal["inductor", "aot_eager", "eager"] | None = None,
    ) -> None:
        """
        Args:
            backend: of torch.compile; None runs `losses` as they are.
        """
        super().__init__()
        self.trained = trained
        self.backend = backend
        self._losses = losses if backend is None else compiled(losses, backend)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        if self.backend is None:
            losses = self._losses(batch)
        else:
            from torch._dynamo.exc import TorchDynamoException

            try:
                losses = self._losses(batch)
            except TorchDynamoException as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise TrainingError(
                    f"the losses cannot be compiled by `{self.backend}`: {reason[:200]}",
                    hint="set `loop.compile: null`",
                ) from error
        return {**losses.terms, TOTAL: losses.total}


def compiled(losses: Callable[[Any], StepLosses], backend: str) -> Callable[[Any], StepLosses]:
    """The losses through torch.compile."""
    import torch
    import torch._functorch.config

    # The gradient of each term is asked for before that of the sum: the graph must stay whole until then.
    torch._functorch.config.donated_buffer = False
    return torch.compile(losses, backend=backend)
