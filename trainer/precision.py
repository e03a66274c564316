"""The dtype that losses are computed in."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32, or as they are when wider: half precision overflows in sums and exponents."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
