"""What a model says of a batch, and a name for each thing of it that another may learn from.

Dimensions: B images, N tokens of a block, D its width, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor

from dla_cache.errors import SpecError
from trainer.precision import at_least_float32

Layer = int | float | str
"""A block of a model: its number counted from 0, the fraction of the depth at which it ends, or its module's name."""

CLS = "cls"
"""Span of the one token that stands for the image, where a model has it."""

IMAGE = "image"
"""Span of all tokens, or places, of the image itself."""


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One thing that a model says of a view."""

    what: Literal["logits", "pooled", "tokens"]
    """`logits` [B, K]; of a block the mean over a span [B, D], or all of its tokens [B, N, D]."""
    span: str = ""
    """`cls`, `image` or a modality; empty of logits."""
    block: int = -1
    """Counted from 0; -1 of logits."""

    def __str__(self) -> str:
        return self.what if self.what == "logits" else f"{self.what}/{self.span}/{self.block}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The target of that name.

        Raises:
            ValueError: if it is none.
        """
        match text.split("/"):
            case ["logits"]:
                return cls("logits")
            case ["pooled", span, block] if block.isdecimal():
                return cls("pooled", span, int(block))
            case ["tokens", span, block] if block.isdecimal():
                return cls("tokens", span, int(block))
        raise ValueError(f"`{text}` is no target: it is `logits`, `pooled/SPAN/BLOCK` or `tokens/SPAN/BLOCK`")


LOGITS = Target("logits")

ROUNDING = 1e-9
"""Of a fraction times a depth: 7/25 of 25 blocks is 7.000000000000001, and ends block 6."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a model says of a batch, and what its blocks hold."""

    logits: Tensor
    """[B, K]."""
    blocks: tuple[Tensor, ...] = ()
    """[B, N, D] of each, before the final norm; N and D may differ, a map's places are tokens."""
    spans: Mapping[str, slice] | None = None
    """Where `cls`, `image` and each modality lie among the tokens of every block."""

    def target(self, target: Target) -> Tensor:
        """The target, without gradient; what is pooled is so in float32 or wider."""
        if target == LOGITS:
            return self.logits.detach()
        assert self.spans is not None
        tokens = self.blocks[target.block][:, self.spans[target.span]].detach()
        return at_least_float32(tokens).mean(dim=1) if target.what == "pooled" else tokens


def resolve_layer(layer: Layer, names: Sequence[str], whose: str) -> int:
    """The number of a block.

    Args:
        names: of a model's blocks, in their order.
        whose: the model, for messages.

    Raises:
        SpecError: if the model has no such block.
    """
    if isinstance(layer, str) and layer in names:
        return list(names).index(layer)
    if isinstance(layer, float) and 0 < layer <= 1 and names:
        return max(0, math.ceil(layer * len(names) - ROUNDING) - 1)
    if isinstance(layer, int) and 0 <= layer < len(names):
        return layer
    shown = ", ".join(f"`{name}`" for name in (names if len(names) <= 6 else [*names[:3], "...", names[-1]]))
    raise SpecError(
        f"the {whose} has no block `{layer}`, it has {len(names)}: {shown}",
        hint="name one, count from 0, or give the fraction of the depth, as 0.75 or 1.0",
    )
