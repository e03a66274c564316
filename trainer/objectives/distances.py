"""How far predicted features are from those that they should be; every objective that predicts features takes these.

Dimensions: B images, N tokens, D width.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from trainer.precision import at_least_float32

Distance = Literal["mse", "smooth_l1", "cosine", "infonce"]
"""`mse` and `smooth_l1` take the scale of the target as it is; `cosine` its direction alone; `infonce` asks which of
the batch's targets is the image's own."""

TEMPERATURE = 0.07
"""Of `infonce`, as in CRD and MoCo."""

NO_NORM = 1e-6
"""A vector that is shorter counts as one of this length: its direction, and the gradient of it, stay finite."""


def distance_between(
    prediction: Tensor, target: Tensor, distance: Distance = "mse", temperature: float = TEMPERATURE
) -> Tensor:
    """Mean distance over images, tokens and, of `mse` and `smooth_l1`, over D.

    - `mse`: (p - t)²
    - `smooth_l1`: (p - t)²/2 where |p - t| < 1, else |p - t| - 1/2
    - `cosine`: 1 - p·t / (‖p‖‖t‖)
    - `infonce`: see `info_nce`

    Args:
        prediction: [B, D] or [B, N, D], any float dtype.
        target: the same shape; detached here.
        temperature: of `infonce`.

    Returns:
        [], float32 or wider.

    Raises:
        ValueError: if the shapes differ, rather than broadcasting them.

    Source: smooth L1 as in I-JEPA, arXiv:2301.08243, its `src/train.py`.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"predicts shape {tuple(prediction.shape)} of {tuple(target.shape)}")
    prediction, target = at_least_float32(prediction), at_least_float32(target.detach())
    match distance:
        case "mse":
            return functional.mse_loss(prediction, target)
        case "smooth_l1":
            return functional.smooth_l1_loss(prediction, target)
        case "cosine":
            return 1 - (unit(prediction) * unit(target)).sum(dim=-1).mean()
        case "infonce":
            return info_nce(prediction, target, temperature)


def info_nce(prediction: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-log of the softmax, over the batch's targets t_j, of cos(p_i, t_j)/τ at the image's own; mean over images.

    Of tokens each place is a question of its own, against the same place of the other images. One image alone has
    nothing to be told from: its loss is 0, without gradient.

    Args:
        prediction: [B, D] or [B, N, D], float32 or wider.
        target: the same shape.

    Returns:
        [].

    Source: van den Oord et al., arXiv:1807.03748, equation 4, with the cosine over a temperature as in SimCLR,
    arXiv:2002.05709, equation 1; negatives are other images' targets only.
    """
    # A half-precision product would tell neighbours apart by three digits.
    with torch.autocast(prediction.device.type, enabled=False):
        similarity = torch.einsum("i...d,j...d->...ij", unit(prediction), unit(target)) / temperature
    own = torch.arange(len(prediction), device=prediction.device).expand(similarity.shape[:-1])
    return functional.cross_entropy(similarity.flatten(0, -2), own.flatten())


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., D] at length 1."""
    return functional.normalize(vectors, dim=-1, eps=NO_NORM)
