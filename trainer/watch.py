"""What the loop looks at while it trains: that every number is finite, and that every loss term teaches."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dla_cache.errors import DeadLossError, TrainingError, name_some

GRADIENT = "gradient"
"""Under this name the norm of the whole gradient is looked at beside the losses."""


def gradient_norms(terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """The norm of each term's own gradient on `parameters`; the graph stays usable.

    Raises:
        DeadLossError: if a term reaches none of them. A loss term that is silently cut off trains
            nothing and is reported as if it had been tried; that has happened in published comparisons.
    """
    norms = {}
    for name, term in terms.items():
        gradients: Sequence[Tensor | None] = [None]
        if term.requires_grad:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    dead = [name for name, norm in norms.items() if norm == 0]
    if dead:
        raise DeadLossError(
            f"loss term `{dead[0]}` is active and gives the trained model no gradient",
            hint="check the names of its inputs and its weight, or remove the term from the objective",
        )
    return norms


INERT_SHARE = 0.01
"""Of the summed gradient norms of all terms: below it a term is called nearly inert."""


def mean_shares(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Each term's mean share of the summed gradient norms, over the evaluations that had it."""
    shares: dict[str, list[float]] = {}
    for evaluation in evaluations:
        for name, share in evaluation.items():
            shares.setdefault(name, []).append(share)
    return {name: sum(of_term) / len(of_term) for name, of_term in shares.items()}


def nearly_inert(shares: Mapping[str, float]) -> tuple[str, ...]:
    """The terms that move the trained model hardly at all: alive, so no error, but what they promise is not tried.

    A term's norm says how hard it pulls where it is, and nothing of how useful that is.
    """
    return tuple(name for name, share in shares.items() if share < INERT_SHARE)


class FiniteWatch:
    """Looks at the losses and the gradient's norm of each step, and stops a run at the first that is not finite.

    On a CPU before the step changes a weight. A GPU is never waited for: its numbers are copied beside its work and
    looked at one step late, but before anything is saved.
    """

    def __init__(self, module: nn.Module, *, late: bool) -> None:
        self.module = module
        self.late = late
        self.values: dict[str, float] = {}
        """Those last looked at."""
        self._unread: tuple[int, list[str], Tensor, torch.cuda.Event | None] | None = None

    def take(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Takes the numbers [] of a step, a fault to be named after the first that has it.

        Raises:
            TrainingError: see `look`.
        """
        if not self.late:
            self._check(step, {name: float(value) for name, value in values.items()})
            return
        device = torch.stack([value.float() for value in values.values()])
        host = torch.empty(device.shape, pin_memory=True).copy_(device, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._unread = (step, list(values), host, event)

    def look(self) -> None:
        """Looks at what was taken last. The gradients must still be those of its step.

        Raises:
            TrainingError: naming the step, and the loss or the parameters.
        """
        if self._unread is None:
            return
        step, names, host, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()
        self._check(step, dict(zip(names, host.tolist(), strict=True)))

    def _check(self, step: int, values: dict[str, float]) -> None:
        self.values = values
        for name, value in values.items():
            if math.isfinite(value):
                continue
            if name != GRADIENT:
                raise TrainingError(
                    f"loss `{name}` is {value} at step {step}",
                    hint="lower `learning_rate`, or look at the latents with `dla cache inspect`",
                )
            gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            faulty = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
            where = f" of {name_some(faulty)}" if faulty else "'s norm"  # each is finite, their sum of squares is not
            raise TrainingError(
                f"the gradient{where} is not finite at step {step}",
                hint="lower `learning_rate`, or set `loop.clip_norm`",
            )
