"""Latents as tokens: their axes, their scale."""

import pytest
import torch

from dla_cache.errors import LatentShapeError
from dla_cache.spec import LatentFormat
from tests.trainer.teachers import DEPTH, SHAPE
from trainer.adapters import LatentScaler, tokens_of


def test_a_square_latent_is_read_by_its_axes_never_by_its_sizes():
    latent = torch.arange(36.0).view(1, 6, 6)
    channels_first = LatentFormat(kind="continuous", shape=(6, 6), axes=("channel", "token"), dtype="float32")
    assert torch.equal(tokens_of(latent, SHAPE), latent)
    assert torch.equal(tokens_of(latent, channels_first), latent.transpose(1, 2))


def test_spatial_latents_become_one_token_per_place_row_major():
    latent = torch.arange(2 * 8 * 4 * 4.0).view(2, 8, 4, 4)
    tokens = tokens_of(latent, DEPTH)
    assert tokens.shape == (2, 16, 8)
    assert torch.equal(tokens[:, 4 * 1 + 3], latent[:, :, 1, 3])


def test_a_latent_of_channels_alone_is_one_token():
    vector = LatentFormat(kind="continuous", shape=(6,), axes=("channel",), dtype="float32")
    latent = torch.randn(2, 6)
    assert torch.equal(tokens_of(latent, vector), latent[:, None])


@pytest.mark.parametrize("shape", [(6, 5), (7, 6), (0, 6), (6,), (1, 6, 6)])
def test_a_latent_that_does_not_fit_its_format_is_refused(shape):
    with pytest.raises(LatentShapeError, match="format says"):
        tokens_of(torch.zeros(2, *shape), SHAPE)


def test_standardised_latents_have_mean_0_and_deviation_1_in_each_channel():
    latent = torch.randn(50, 8, 4, 4) * torch.arange(1, 9).view(8, 1, 1) + torch.arange(8).view(8, 1, 1)
    scaler = LatentScaler(DEPTH)
    scaler.set_statistics(latent.mean((0, 2, 3)), latent.std((0, 2, 3)))
    scaled = scaler(latent.half())
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(8), atol=2e-3, rtol=0)  # half precision
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(8), atol=2e-3, rtol=0)


def test_a_channel_that_never_varies_stays_finite():
    scaler = LatentScaler(SHAPE)
    scaler.set_statistics(torch.ones(6), torch.zeros(6))
    assert torch.equal(scaler(torch.ones(2, 6, 6)), torch.zeros(2, 6, 6))
