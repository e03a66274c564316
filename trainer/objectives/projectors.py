"""From a student's features to the width of what they are compared with; trained beside it and thrown away."""

from typing import Literal

from torch import nn

from dla_cache.errors import SpecError

Projector = Literal["linear", "mlp", "identity"]
"""One affine layer; Linear → GELU → Linear; or nothing, for features of one width."""


def make_projector(
    width_in: int, width_out: int, kind: Projector | None = None, *, hidden: int | None = None
) -> nn.Module:
    """A module [..., width_in] → [..., width_out].

    Args:
        kind: when None `identity` where the widths agree, else `linear`.
        hidden: width between the two layers of an `mlp`; that of the output when absent.

    Raises:
        SpecError: if `identity` is asked of two widths.
    """
    if kind is None:
        kind = "identity" if width_in == width_out else "linear"
    if kind == "mlp":
        hidden = width_out if hidden is None else hidden
        return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))
    if kind == "linear":
        return nn.Linear(width_in, width_out)
    if width_in != width_out:
        raise SpecError(
            f"the projector is `identity`, and the student's block has width {width_in}, the reference's {width_out}",
            hint="set the projector to `linear` or `mlp`",
        )
    return nn.Identity()
