"""The embedded generator: an image becomes the latent of its depth map, and is never decoded here.

Small, but built like the large ones: an autoencoder gives depth a latent space, a rectified flow
conditioned on the image fills it in a few steps from per-sample noise. Beside it the cheap map to
beat, ridge regression from random image features to the same latents.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from itertools import pairwise
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DModel
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SourceError
from dla_cache.spec import LatentFormat, LatentSpec, Modality, Recipe, StrictModel, parse_spec

M = TypeVar("M", bound=nn.Module)

SIDE = 32
LATENT_SHAPE = (8, 4, 4)
CONDITION_CHANNELS = 64
RIDGE_FILTERS = 128
RIDGE_PATCH = 6

CHUNK = 64
"""Images that are computed at a time, never more and never fewer.

Kernels for other numbers of images sum in another order, and the stored bytes may not depend on that.
Of 16, 32 and 64 the fastest for the flow on one thread. Another number is another `WRITER_VERSION`.
"""


class FlowParameters(StrictModel):
    """What a cache spec may set on `embedded-depth`."""

    sampling_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Euler steps from noise to latent."""


class NoParameters(StrictModel):
    """A source without settings."""


def latent_format(dtype: str) -> LatentFormat:
    """The format of a depth latent: float [8, 4, 4]."""
    return LatentFormat.model_validate(
        {
            "kind": "continuous",
            "shape": LATENT_SHAPE,
            "axes": ("channel", "height", "width"),
            "dtype": dtype,
            "space": "latent of the embedded depth autoencoder, unscaled; decode with `decode_depth`",
        }
    )


class DepthAutoencoder(nn.Module):
    """Depth [B, 1, 32, 32] in [-1, 1] to and from latents [B, 8, 4, 4]."""

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

    def moments(self, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each [B, 8, 4, 4]."""
        posterior = self.network.encode(functional.pixel_unshuffle(depth, 2)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Depth [B, 1, 32, 32] of latents [B, 8, 4, 4]."""
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


class DepthFlow(nn.Module):
    """Rectified flow from noise to standardised depth latents, given an image.

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


class DepthRidge(nn.Module):
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one CPU thread: four cut sums elsewhere and change stored bytes. For more cores take more ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def encode_in_chunks(
    encode_chunk: Callable[[Tensor, Sequence[int]], Tensor], pixels: NDArray[np.uint8], seeds: Sequence[int]
) -> NDArray[np.float32]:
    """Latents [B, 8, 4, 4] by calls of exactly `CHUNK` images; the last call is filled up with the last image.

    So a latent is the same to the bit whatever images come with it, and however many.

    Args:
        encode_chunk: latents [CHUNK, 8, 4, 4] of pixels float32 [CHUNK, 3, 32, 32] in [-1, 1] and their seeds.
        pixels: uint8 [B, 3, 32, 32].
    """
    chunks = []
    with one_thread(), torch.inference_mode():
        for start in range(0, len(pixels), CHUNK):
            places = np.arange(start, start + CHUNK).clip(max=len(pixels) - 1)
            chunk = encode_chunk(to_model_range(pixels[places]), [seeds[place] for place in places])
            chunks.append(chunk.cpu().numpy())
    return np.concatenate(chunks)[: len(pixels)]


def moved_to(module: M, device: str) -> M:
    """The module on a device, ready to be used.

    Raises:
        SourceError: if torch does not know the device or does not have it here.
    """
    try:
        module.to(device)
        torch.zeros(1, device=device).tolist()  # `meta` takes weights and computes nothing
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has no class of its own for this
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"device `{device}` cannot be used: {reason[:200]}",
            hint="use `cpu`, or a device of this machine",
        ) from error
    return module.eval()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Fills `module` from float16 tensors under `prefix.`; computing stays float32."""
    start = f"{prefix}."
    module.load_state_dict({n.removeprefix(start): t.float() for n, t in tensors.items() if n.startswith(start)})


class EmbeddedDepth:
    """`embedded-depth`: the flow, stopped before the autoencoder's decoder."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.parameters = parse_spec(dict(spec.parameters), FlowParameters, where="parameters of `embedded-depth`")
        data, digest = read_weights("embedded-depth")
        flow = DepthFlow()
        load_weights(flow, load(data), "flow")
        self.flow = moved_to(flow, device)
        self.device = device
        self.recipe = depth_recipe(spec, digest, self.parameters)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.floating]:
        """Raw latents [B, 8, 4, 4] of pixels uint8 [B, 3, 32, 32], in the dtype of the recipe."""
        latents = encode_in_chunks(self._encode_chunk, pixels, seeds)
        return latents.astype(np.dtype(self.recipe.format.dtype))

    def _encode_chunk(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        noise = noise_for(seeds, LATENT_SHAPE)
        return self.flow.sample(pixels.to(self.device), noise.to(self.device), self.parameters.sampling_steps)

    def close(self) -> None:
        """Frees nothing: the weights go with the object."""


class EmbeddedDepthRidge:
    """`embedded-depth-ridge`: the cheap map into the same latent space; seeds play no part."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        parameters = parse_spec(dict(spec.parameters), NoParameters, where="parameters of `embedded-depth-ridge`")
        data, digest = read_weights("embedded-depth-ridge")
        ridge = DepthRidge()
        load_weights(ridge, load(data), "ridge")
        self.ridge = moved_to(ridge, device)
        self.device = device
        self.recipe = depth_recipe(spec, digest, parameters)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.floating]:
        """Raw latents [B, 8, 4, 4] of pixels uint8 [B, 3, 32, 32], in the dtype of the recipe."""
        latents = encode_in_chunks(self._encode_chunk, pixels, seeds)
        return latents.astype(np.dtype(self.recipe.format.dtype))

    def _encode_chunk(self, pixels: Tensor, _seeds: Sequence[int]) -> Tensor:
        latents: Tensor = self.ridge(pixels.to(self.device))
        return latents

    def close(self) -> None:
        """Frees nothing: the weights go with the object."""


def depth_recipe(spec: LatentSpec, weights_sha256: str, parameters: StrictModel) -> Recipe:
    """The recipe of a depth source; another modality is refused."""
    if spec.modality is not Modality.DEPTH:
        raise SourceError(f"`{spec.source}` makes `depth`, not `{spec.modality}`", hint="set `modality: depth`")
    return Recipe(
        modality=spec.modality,
        source=spec.source,
        weights_sha256=weights_sha256,
        parameters=parameters.model_dump(),
        seed=spec.seed,
        source_view_size=SIDE,
        format=latent_format(spec.dtype),
    )


def decode_depth(latents: NDArray[np.floating]) -> NDArray[np.float32]:
    """Depth float32 [B, 32, 32] in [0, 1] of raw latents [B, 8, 4, 4]: for pictures, never for training."""
    autoencoder = DepthAutoencoder().eval()
    load_weights(autoencoder, load(read_weights("embedded-depth")[0]), "autoencoder")
    with torch.inference_mode():
        depth = autoencoder.decode(torch.from_numpy(latents.astype(np.float32)))
    pixels: NDArray[np.float32] = ((depth[:, 0] + 1) / 2).clamp(0, 1).numpy()
    return pixels
