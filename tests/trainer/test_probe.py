"""The probe: a classifier on latents alone."""

import pytest
import torch

from dla_cache.errors import TrainingError
from dla_cache.spec import LatentFormat
from trainer.probe import LatentProbe, ProbeConfig

DEPTH = LatentFormat(kind="continuous", shape=(8, 4, 4), axes=("channel", "height", "width"), dtype="float16")
AUDIO = LatentFormat(kind="codes", shape=(2, 9), axes=("codebook", "step"), dtype="int16", vocabulary=5)
FORMATS = {"depth": DEPTH, "audio": AUDIO}


def make_probe(kind, formats=FORMATS, **settings):
    torch.manual_seed(0)
    probe = LatentProbe(ProbeConfig(n_classes=3, formats=formats, kind=kind, hidden=32, **settings))
    probe.set_statistics("depth", torch.ones(8), torch.full((8,), 2.0))
    return probe.eval()


def make_latents(n_images=12):
    generator = torch.Generator().manual_seed(1)
    depth = 1 + 2 * torch.randn(n_images, 8, 4, 4, generator=generator)
    return {"depth": depth.half(), "audio": torch.randint(0, 5, (n_images, 2, 9), generator=generator)}


def test_a_linear_probe_is_linear_in_the_standardised_latent():
    probe, latents = make_probe("linear", {"depth": DEPTH}), {"depth": make_latents()["depth"]}
    weight, bias = (parameter.detach() for parameter in probe.parameters())
    expected = ((latents["depth"].float() - 1) / 2).movedim(1, -1).flatten(1) @ weight.T + bias
    torch.testing.assert_close(probe(latents), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("modality", ["depth", "audio"])
def test_it_looks_at_every_modality(kind, modality):
    probe, latents = make_probe(kind), make_latents()
    changed = {**latents, modality: latents[modality].roll(1, dims=0)}
    assert not torch.allclose(probe(latents), probe(changed))


def test_codes_that_are_padding_do_not_count():
    probe, latents = make_probe("mlp"), make_latents()
    masks = {"audio": (torch.arange(9) < 5).expand(12, 9)}
    short = {**latents, "audio": latents["audio"][:, :, :5]}
    torch.testing.assert_close(probe(latents, masks), probe(short))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_it_learns_a_batch_by_heart(kind):
    probe, latents, labels = make_probe(kind), make_latents(), torch.arange(12) % 3
    optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(probe(latents), labels).backward()
        optimizer.step()
    assert torch.equal(probe(latents).argmax(-1), labels)


def test_a_checkpoint_brings_its_statistics():
    probe, latents = make_probe("mlp"), make_latents()
    loaded = LatentProbe(probe.config).eval()
    loaded.load_state_dict(probe.state_dict())
    assert torch.equal(loaded(latents), probe(latents))


def test_the_order_in_which_formats_are_given_does_not_matter():
    probe, latents = make_probe("mlp"), make_latents()
    turned = make_probe("mlp", {"audio": AUDIO, "depth": DEPTH})
    turned.load_state_dict(probe.state_dict())
    assert torch.equal(turned(latents), probe(latents))


def test_a_missing_modality_is_refused():
    with pytest.raises(TrainingError, match="no latent is given for `audio`"):
        make_probe("mlp")({"depth": make_latents()["depth"]})
