"""Sources that processes of a build import by name: `tests.device_source:Corners`."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dla_cache.spec import LatentFormat, LatentSpec, Recipe

SIDE = 8


class Corners:
    """Latents [3, 2, 2]: four pixels of the image."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=SIDE,
            format=LatentFormat(
                kind="continuous", shape=(3, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype
            ),
        )
        self.made_with = {"process": os.getpid()}

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        return pixels[:, :, ::4, ::4].astype(np.float32)

    def close(self) -> None:
        pass


class Slow(Corners):
    """The same in its time."""

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        time.sleep(0.2)
        return super().encode(pixels, seeds)


class Dies(Slow):
    """One of two processes is killed in its first batch: whoever finds the file `victim` first."""

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        try:
            Path(os.environ["DLA_TEST_VICTIM"]).unlink()
        except FileNotFoundError:
            return super().encode(pixels, seeds)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Fails(Corners):
    """Has no latent of anything."""

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.generic]:
        raise ValueError("no such block")
