"""Images described in words, which pipelines that take text are asked with."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CAPTION = "{caption}"
"""What stands for the caption in a prompt."""


class Captioner(Protocol):
    """Says what is in an image."""

    def describe(self, pixels: NDArray[np.uint8]) -> Sequence[str]:
        """One text an image, of pixels uint8 [B, 3, S, S]."""


def open_captioner(parameters: Any, device: str) -> tuple[Captioner, dict[str, str], dict[str, str]]:
    """The captioner that parameters name, its weights' hash by name, and where they came from."""
    raise NotImplementedError
