"""The networks of the embedded generators, and how their shipped weights come back.

Small, but built like the large ones: an autoencoder gives pictures of one modality a latent space, a
rectified flow conditioned on the image fills it in a few steps from per-sample noise. Beside it the
cheap map to beat, ridge regression from random image features to the same latents.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DModel
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SourceError

SIDE = 32
"""Side in pixels of an image, and of the picture of it in another modality."""
LATENT_SHAPE = (8, 4, 4)
CONDITION_CHANNELS = 64
RIDGE_FILTERS = 128
RIDGE_PATCH = 6


class PictureAutoencoder(nn.Module):
    """Pictures [B, 1, 32, 32] in [-1, 1], such as depth maps, to and from latents [B, 8, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = AutoencoderKL(  # type: ignore[no-untyped-call]  # diffusers is untyped
            in_channels=4,
            out_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(24, 32, 48),
            layers_per_block=1,
            latent_channels=LATENT_SHAPE[0],
            norm_num_groups=8,
            mid_block_add_attention=False,
        )

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each [B, 8, 4, 4]."""
        posterior = self.network.encode(functional.pixel_unshuffle(pictures, 2)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 1, 32, 32] of latents [B, 8, 4, 4]."""
        decoded: Tensor = self.network.decode(latents).sample
        return functional.pixel_shuffle(decoded, 2)


class ImageEncoder(nn.Module):
    """Pixels [B, 3, 32, 32] in [-1, 1] to the condition [B, 64, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 80, CONDITION_CHANNELS)
        layers: list[nn.Module] = []
        for index, (below, above) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(below, above, 3, stride=1 if index == 0 else 2, padding=1),
                nn.GroupNorm(8, above),
                nn.SiLU(),
                nn.Conv2d(above, above, 3, padding=1),
                nn.GroupNorm(8, above),
                nn.SiLU(),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        encoded: Tensor = self.layers(pixels)
        return encoded


class LatentFlow(nn.Module):
    """Rectified flow from noise to standardised latents, given an image.

    Source: Flow Straight and Fast, arXiv:2209.03003, equation 1; the condition is concatenated to
    the noisy latent as in Marigold, arXiv:2312.02145, section 3.2.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoder()
        self.network: Any = UNet2DModel(  # type: ignore[no-untyped-call]
            sample_size=LATENT_SHAPE[1],
            in_channels=LATENT_SHAPE[0] + CONDITION_CHANNELS,
            out_channels=LATENT_SHAPE[0],
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            block_out_channels=(48, 72),
            layers_per_block=1,
            norm_num_groups=8,
            add_attention=False,
        )
        self.register_buffer("latent_mean", torch.zeros(LATENT_SHAPE[0]))
        self.register_buffer("latent_std", torch.ones(LATENT_SHAPE[0]))

    def velocity(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Predicted noise minus latent, [B, 8, 4, 4]; `time` [B] in [0, 1], 1 is pure noise."""
        velocity: Tensor = self.network(torch.cat([noisy, condition], dim=1), time * 1000).sample
        return velocity

    def sample(self, pixels: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Latents [B, 8, 4, 4] of the autoencoder, by Euler's method from `noise`."""
        condition = self.encoder(pixels)
        state = noise
        for step in range(steps, 0, -1):
            time = torch.full((len(state),), step / steps, device=state.device)
            state = state - self.velocity(state, time, condition) / steps
        return state * self.latent_std.view(1, -1, 1, 1) + self.latent_mean.view(1, -1, 1, 1)


class RidgeMap(nn.Module):
    """The cheap map: rectified responses of random image patches, pooled, then one linear map.

    Source: single-layer networks of Coates, Lee and Ng (AISTATS 2011), ridge in place of an SVM.
    """

    filters: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        n_features = 2 * RIDGE_FILTERS * LATENT_SHAPE[1] * LATENT_SHAPE[2]
        self.register_buffer("filters", torch.zeros(RIDGE_FILTERS, 3, RIDGE_PATCH, RIDGE_PATCH))
        self.register_buffer("weight", torch.zeros(n_features, int(np.prod(LATENT_SHAPE))))
        self.register_buffer("bias", torch.zeros(int(np.prod(LATENT_SHAPE))))

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 4096] from pixels [B, 3, 32, 32] in [-1, 1]: both signs of every response, pooled to 4 x 4."""
        responses = functional.conv2d(pixels, self.filters, padding=RIDGE_PATCH // 2)
        both = torch.cat([responses.relu(), (-responses).relu()], dim=1)
        return functional.adaptive_avg_pool2d(both, LATENT_SHAPE[1:]).flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        return (self.features(pixels) @ self.weight + self.bias).view(-1, *LATENT_SHAPE)


def noise_for(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise float32 [B, *shape], each sample from a CPU generator of its own seed.

    A sample's noise does not depend on its batch, and is the same on every device.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def to_model_range(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def read_weights(name: str) -> tuple[bytes, str]:
    """The shipped weights of that name, and their sha256."""
    try:
        data = resources.files(__package__).joinpath("weights", f"{name}.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise SourceError(
            f"the weights of `{name}` are not shipped with this installation",
            hint="make them with `dla sources fit`",
        ) from error
    return data, hashlib.sha256(data).hexdigest()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Fills `module` from float16 tensors under `prefix.`; computing stays float32."""
    start = f"{prefix}."
    module.load_state_dict({n.removeprefix(start): t.float() for n, t in tensors.items() if n.startswith(start)})
