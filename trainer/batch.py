"""What a task sees of some images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.features import Target
from trainer.objectives.cross_entropy import MixedLabels


@dataclass(frozen=True, slots=True)
class Batch:
    """What a task sees, joined by image ID."""

    image_ids: tuple[str, ...]
    pixels: Tensor
    """float32 [B, 3, H, W], the training view, normalised; [B, 0] of a run that sees no images."""
    latents: dict[str, Tensor]
    """Raw latents of the whole image, one draw of each: float32, or int64 codes."""
    labels: Tensor
    """int64 [B], -1 where there is none; of a multi-label store [B, K] of 0 and 1, or -1 all along."""
    targets: dict[Target, Tensor] = field(default_factory=dict)
    """What a frozen model once said of these very views, float32."""
    mixed: MixedLabels | None = None
    """Whose labels count beside an image's own, where images were mixed."""
    rows: Tensor | None = None
    """int64 [B], the images' rows in the store; None of a batch that no store made."""
    step: int = 0
    """Of training, counted from 0."""

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: str) -> "Batch":
        """The same on a device; itself if it is there."""
        if self.pixels.device == torch.device(device):
            return self
        return replace(
            self,
            pixels=self.pixels.to(device),
            latents={name: values.to(device) for name, values in self.latents.items()},
            labels=self.labels.to(device),
            targets={target: values.to(device) for target, values in self.targets.items()},
            mixed=self.mixed.to(device) if self.mixed is not None else None,
            rows=self.rows.to(device) if self.rows is not None else None,
        )


def side_by_side(parts: Sequence[Batch]) -> Batch:
    """The images of all parts as one batch."""

    def whole(name: str) -> dict[Any, Tensor]:
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}

    return Batch(
        image_ids=tuple(image_id for part in parts for image_id in part.image_ids),
        pixels=torch.from_numpy(np.concatenate([part.pixels.numpy() for part in parts])),
        latents=whole("latents"),
        labels=torch.cat([part.labels for part in parts]),
        targets=whole("targets"),
        rows=torch.cat([part.rows for part in parts if part.rows is not None]),
    )
