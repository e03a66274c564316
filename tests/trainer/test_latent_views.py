"""Latents under a mirrored view: turned along their width, left alone, or refused."""

import pytest
import torch

from dla_cache.errors import SpecError
from dla_cache.modality import KINDS, Modality
from dla_cache.spec import LatentFormat
from dla_cache.store import open_store
from trainer.data import PairSource, PixelScale, Role
from trainer.latent_views import check_mirroring, mirror_latents
from trainer.run import train_run
from trainer.views import ViewConfig

MAP = ("channel", "height", "width")
FRAMES = ("frame", "channel", "height", "width")
TOKENS = ("token", "channel")
FLIP = torch.tensor([True, False, True]).numpy()


def latent_format(axes):
    kind = {"kind": "codes", "dtype": "int16", "vocabulary": 9} if "codebook" in axes else {"kind": "continuous"}
    return LatentFormat.model_validate({"dtype": "float32", **kind, "shape": (3, 2, 4, 5)[: len(axes)], "axes": axes})


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("normals", MAP),
        ("normals", TOKENS),
        ("motion", MAP),
        ("motion", TOKENS),
        *((kind, TOKENS) for kind in ("depth", "intrinsics", "video", "variation", "features")),
        ("features-dinov2", ("layer", "token", "channel")),
    ],
)
def test_latents_that_nobody_can_mirror_are_refused(name, axes):
    with pytest.raises(SpecError, match=f"latents of `{name}`") as refused:
        check_mirroring({name: latent_format(axes)})
    assert "horizontal_flip=false" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        *((kind, MAP) for kind in ("depth", "intrinsics", "variation", "features")),
        *((kind, FRAMES) for kind in ("motion", "video")),
        ("features", ("codebook", "height", "width")),
    ],
)
def test_latents_with_a_width_are_turned_along_it_where_the_view_is_mirrored(name, axes):
    form = latent_format(axes)
    check_mirroring({name: form})
    latents = torch.arange(3 * torch.Size(form.shape).numel()).reshape(3, *form.shape)
    turned = mirror_latents(latents, form, FLIP)
    assert torch.equal(turned[[0, 2]], latents[[0, 2]].flip(-1))
    assert torch.equal(turned[1], latents[1])


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("audio", ("codebook", "time")),
        ("audio", ("channel", "frequency", "time")),
        ("shape", TOKENS),
        ("caption", ("codebook", "step")),
        ("features", ("channel",)),
    ],
)
def test_latents_of_the_whole_image_stay_as_they_are(name, axes):
    form = latent_format(axes)
    check_mirroring({name: form})
    latents = torch.randn(3, *form.shape)
    assert mirror_latents(latents, form, FLIP) is latents


def test_every_kind_has_a_rule_for_a_map_and_for_tokens():
    rules = {
        kind: [latent_format(axes).no_mirror_of(Modality(kind)) is None for axes in (MAP, TOKENS)] for kind in KINDS
    }
    refused = {kind for kind, rule in rules.items() if rule == [False, False]}
    whole = {kind for kind, rule in rules.items() if rule == [True, True]}
    assert (refused, whole) == ({"normals", "motion"}, {"audio", "shape", "caption", "target"})


def source(tiny, *, flip, crop=1.0, **fields):
    return PairSource(
        open_store(tiny.store),
        tiny.images,
        image_size=8,
        pixel_scale=PixelScale((0.5,) * 3, (0.5,) * 3),
        modalities=("depth",),
        view=ViewConfig(horizontal_flip=flip, scale_min=crop),
        seed=0,
        device="cpu",
        **fields,
    )


def test_in_a_batch_pixels_and_latents_are_mirrored_together_and_a_crop_leaves_latents_whole(tiny):
    role = [Role(("transfer",), 8)]
    plain, flipped, cropped = (
        next(source(tiny, **view).training(role)(0))
        for view in ({"flip": False}, {"flip": True}, {"flip": False, "crop": 0.3})
    )
    is_mirrored = [not torch.equal(*pair) for pair in zip(plain.pixels, flipped.pixels, strict=True)]
    assert 0 < sum(is_mirrored) < 8
    for place, mirrored in enumerate(is_mirrored):
        expected = [one[place].flip(-1) if mirrored else one[place] for one in (plain.pixels, plain.latents["depth"])]
        torch.testing.assert_close(flipped.pixels[place], expected[0])
        assert torch.equal(flipped.latents["depth"][place], expected[1])
    assert torch.equal(cropped.latents["depth"], plain.latents["depth"])
    (evaluated,) = source(tiny, flip=True).evaluation(role[0], ["depth"])()
    (whole,) = source(tiny, flip=False).evaluation(role[0], ["depth"])()
    assert torch.equal(evaluated.latents["depth"], whole.latents["depth"])


def test_a_probe_that_is_learned_from_reads_latents_as_it_was_trained_on_them(tiny):
    role = [Role(("transfer",), 8)]
    plain, flipped = (
        next(source(tiny, flip=flip, latents_follow_views=False).training(role)(0)) for flip in (False, True)
    )
    assert not torch.equal(plain.pixels, flipped.pixels)
    assert torch.equal(plain.latents["depth"], flipped.latents["depth"])


def test_a_run_that_would_mirror_what_cannot_be_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dla_cache.spec.DIRECTIONS", frozenset({"depth"}))
    run = tiny.run("teacher", tmp_path / "run", view={"horizontal_flip": True})
    with pytest.raises(SpecError, match="sign of a direction"):
        train_run(run)
    assert not (tmp_path / "run").exists()
    train_run(tiny.run("probe", tmp_path / "probe", view={"horizontal_flip": True}))  # it sees no view
