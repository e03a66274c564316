"""The embedded sources: an image becomes the latent of its depth map or of its sound, and is never decoded here."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SourceError
from dla_cache.sources.catalog import SOURCES
from dla_cache.sources.catalog.embedded import DECODED_SPACE
from dla_cache.sources.networks import (
    LATENT_SHAPE,
    SIDE,
    LatentFlow,
    PictureAutoencoder,
    RidgeMap,
    load_weights,
    noise_for,
    read_weights,
    to_model_range,
)
from dla_cache.spec import LatentFormat, LatentSpec, Modality, Recipe, StrictModel, parse_spec

M = TypeVar("M", bound=nn.Module)

CHUNK = 64
"""Images that are computed at a time, never more and never fewer.

Kernels for other numbers of images sum in another order, and the stored bytes may not depend on that.
Of 16, 32 and 64 the fastest for the flow on one thread. Another number is another `WRITER_VERSION`.
"""

PATCH = 8
"""Side in pixels of the patches that a decoded picture is stored in: as many as a latent has places."""

MODALITIES = {"embedded-depth": Modality.DEPTH, "embedded-audio": Modality.AUDIO}
"""By the name that the weights are shipped under."""

AXES = {Modality.DEPTH: ("channel", "height", "width"), Modality.AUDIO: ("channel", "frequency", "time")}


class FlowParameters(StrictModel):
    """What a cache spec may set on an embedded flow."""

    sampling_steps: Annotated[int, Field(ge=1, le=100)] = 5
    """Euler steps from noise to latent."""


class NoParameters(StrictModel):
    """A source without settings."""


def latent_format(modality: Modality, dtype: str) -> LatentFormat:
    """The format of an embedded latent: float [8, 4, 4]."""
    return LatentFormat.model_validate(
        {
            "kind": "continuous",
            "shape": LATENT_SHAPE,
            "axes": AXES[modality],
            "dtype": dtype,
            "space": f"latent of the embedded {modality} autoencoder, unscaled; decode with `decode_{modality}`",
        }
    )


def decoded_format(dtype: str) -> LatentFormat:
    """The format of a decoded picture: float [16, 64]."""
    n_tokens, n_pixels = (SIDE // PATCH) ** 2, PATCH**2
    return LatentFormat.model_validate(
        {
            "kind": "continuous",
            "shape": (n_tokens, n_pixels),
            "axes": ("token", "channel"),
            "dtype": dtype,
            "space": DECODED_SPACE,
        }
    )


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
    """Latents [B, *shape] by calls of exactly `CHUNK` images; the last call is filled up with the last image.

    So a latent is the same to the bit whatever images come with it, and however many.

    Args:
        encode_chunk: latents [CHUNK, *shape] of pixels float32 [CHUNK, 3, 32, 32] in [-1, 1] and their seeds.
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


class EmbeddedFlow:
    """The flow of an embedded generator, stopped before the autoencoder's decoder."""

    weights: str

    def __init__(self, spec: LatentSpec, device: str) -> None:
        self.parameters = parse_spec(dict(spec.parameters), FlowParameters, where=f"parameters of `{spec.source}`")
        data, digest = read_weights(self.weights)
        flow = LatentFlow()
        load_weights(flow, load(data), "flow")
        self.flow = moved_to(flow, device)
        self.device = device
        self.recipe = embedded_recipe(spec, MODALITIES[self.weights], digest, self.parameters)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Raw latents [B, 8, 4, 4] of pixels uint8 [B, 3, 32, 32]; the store rounds them."""
        return encode_in_chunks(self._encode_chunk, pixels, seeds)

    def _encode_chunk(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        noise = noise_for(seeds, LATENT_SHAPE)
        return self.flow.sample(pixels.to(self.device), noise.to(self.device), self.parameters.sampling_steps)

    def close(self) -> None:
        """Frees nothing: the weights go with the object."""


class DecodingFlow(EmbeddedFlow):
    """A control: the flow, and the decoder that it is to stop before."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        super().__init__(spec, device)
        self.row = SOURCES[spec.source].row
        autoencoder = PictureAutoencoder()
        load_weights(autoencoder, load(read_weights(self.weights)[0]), "autoencoder")
        self.autoencoder = moved_to(autoencoder, device)


class EmbeddedReencoded(DecodingFlow):
    """The latent decoded to a picture, and what the encoder makes of that."""

    def _encode_chunk(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        pictures = self.autoencoder.decode(super()._encode_chunk(pixels, seeds)).clamp(-1, 1)
        return self.autoencoder.moments(pictures)[0]


class EmbeddedDecoded(DecodingFlow):
    """The picture itself, in [0, 1]: what a teacher of decoded modalities sees.

    Its patches are tokens without a width: a mirrored picture has mirrored patches, which turning a grid of them does
    not make.
    """

    def __init__(self, spec: LatentSpec, device: str) -> None:
        super().__init__(spec, device)
        self.recipe = self.recipe.model_copy(update={"format": decoded_format(spec.dtype)})

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Pictures as patches [B, 16, 64] of pixels uint8 [B, 3, 32, 32]."""
        return super().encode(pixels, seeds)

    def _encode_chunk(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        pictures = self.autoencoder.decode(super()._encode_chunk(pixels, seeds))
        # [B, 64, 4, 4]: the channels of a place are the pixels of its patch, row by row.
        return functional.pixel_unshuffle(in_unit_range(pictures), PATCH).flatten(2).transpose(1, 2)


class EmbeddedRidge:
    """The cheap map into the latent space of an embedded generator; seeds play no part."""

    weights: str

    def __init__(self, spec: LatentSpec, device: str) -> None:
        parameters = parse_spec(dict(spec.parameters), NoParameters, where=f"parameters of `{spec.source}`")
        data, digest = read_weights(f"{self.weights}-ridge")
        ridge = RidgeMap()
        load_weights(ridge, load(data), "ridge")
        self.ridge = moved_to(ridge, device)
        self.device = device
        self.recipe = embedded_recipe(spec, MODALITIES[self.weights], digest, parameters)

    def encode(self, pixels: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Raw latents [B, 8, 4, 4] of pixels uint8 [B, 3, 32, 32]; the store rounds them."""
        return encode_in_chunks(self._encode_chunk, pixels, seeds)

    def _encode_chunk(self, pixels: Tensor, _seeds: Sequence[int]) -> Tensor:
        latents: Tensor = self.ridge(pixels.to(self.device))
        return latents

    def close(self) -> None:
        """Frees nothing: the weights go with the object."""


class EmbeddedDepth(EmbeddedFlow):
    """`embedded-depth`."""

    weights = "embedded-depth"


class EmbeddedDepthRidge(EmbeddedRidge):
    """`embedded-depth-ridge`."""

    weights = "embedded-depth"


class EmbeddedAudio(EmbeddedFlow):
    """`embedded-audio`."""

    weights = "embedded-audio"


class EmbeddedAudioRidge(EmbeddedRidge):
    """`embedded-audio-ridge`."""

    weights = "embedded-audio"


class EmbeddedDepthDecoded(EmbeddedDecoded):
    """`embedded-depth-decoded`."""

    weights = "embedded-depth"


class EmbeddedDepthReencoded(EmbeddedReencoded):
    """`embedded-depth-reencoded`."""

    weights = "embedded-depth"


class EmbeddedAudioDecoded(EmbeddedDecoded):
    """`embedded-audio-decoded`."""

    weights = "embedded-audio"


class EmbeddedAudioReencoded(EmbeddedReencoded):
    """`embedded-audio-reencoded`."""

    weights = "embedded-audio"


def embedded_recipe(spec: LatentSpec, modality: Modality, weights_sha256: str, parameters: StrictModel) -> Recipe:
    """The recipe of an embedded source."""
    return Recipe(
        modality=spec.modality,
        source=spec.source,
        weights_sha256=weights_sha256,
        parameters=parameters.model_dump(),
        seed=spec.seed,
        source_view_size=SIDE,
        format=latent_format(modality, spec.dtype),
    )


def decode_depth(latents: NDArray[np.floating]) -> NDArray[np.float32]:
    """Depth float32 [B, 32, 32] in [0, 1] of raw latents [B, 8, 4, 4]: for pictures, never for training."""
    return decode_pictures("embedded-depth", latents)


def decode_audio(latents: NDArray[np.floating]) -> NDArray[np.float32]:
    """Log-mel pictures float32 [B, 32 mels, 32 frames] in [0, 1] of raw latents [B, 8, 4, 4], low tones first."""
    return decode_pictures("embedded-audio", latents)


def decode_pictures(weights: str, latents: NDArray[np.floating]) -> NDArray[np.float32]:
    """What the autoencoder of some shipped weights makes of latents, [B, 32, 32] in [0, 1]."""
    autoencoder = PictureAutoencoder().eval()
    load_weights(autoencoder, load(read_weights(weights)[0]), "autoencoder")
    with torch.inference_mode():
        pictures = autoencoder.decode(torch.from_numpy(latents.astype(np.float32)))
    scaled: NDArray[np.float32] = in_unit_range(pictures[:, 0]).numpy()
    return scaled


def in_unit_range(pictures: Tensor) -> Tensor:
    """What the autoencoder decoded, in [0, 1]."""
    return ((pictures + 1) / 2).clamp(0, 1)
