"""What a view of an image means for its latents.

Latents are those of the whole image, whatever is cropped of it: a teacher reads its crop beside all of them, as the
paper's does. Only a mirrored view changes them:

| kind | axes | mirrored view |
|---|---|---|
| any but `normals` | with a `width` | turned along `width` (frames of `motion` and `video` too, each by itself) |
| `depth`, `intrinsics`, `video`, `variation`, `features` | a `token` in place of places | refused: a grid, flattened |
| `normals` | any | refused: mirroring changes the sign of what points left or right, which no latent tells |
| `motion` | without frames of pictures | refused, for the same reason |
| `features` | `channel` alone: pooled | unchanged: of the whole image |
| `audio`, `shape`, `caption` | without a `width` | unchanged: of the whole image |

A probe sees no view, so what it reads is never turned, also where a student learns from it.
A latent that was turned is not to the bit the latent of the turned image: its generator drew other noise for it.

Dimensions: B images.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_cache.errors import SpecError
from dla_cache.modality import Modality
from dla_cache.spec import LatentFormat


def check_mirroring(formats: Mapping[str, LatentFormat]) -> None:
    """Passes latents that views may be mirrored with.

    Raises:
        SpecError: naming those that nobody can mirror.
    """
    for name, latent_format in formats.items():
        reason = latent_format.no_mirror_of(Modality(name))
        if reason is not None:
            raise SpecError(
                f"views are mirrored, and latents of `{name}` with the axes {', '.join(latent_format.axes)} cannot be:"
                f" {reason}",
                hint="--set view.horizontal_flip=false, or train without this modality: --set modalities=[…]",
            )


def mirror_latents(latents: Tensor, latent_format: LatentFormat, flip: NDArray[np.bool_]) -> Tensor:
    """A batch of latents [B, *shape], turned along their width where the view is mirrored.

    Args:
        latent_format: of one draw; `check_mirroring` has passed it.
        flip: [B].
    """
    if "width" not in latent_format.axes or not flip.any():
        return latents
    turned = latents.flip(1 + latent_format.axes.index("width"))
    return torch.where(torch.from_numpy(flip).view(-1, *[1] * len(latent_format.shape)), turned, latents)
