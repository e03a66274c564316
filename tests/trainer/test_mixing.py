"""Mixup and CutMix: pairs whatever the cut of a batch, labels in the shares of the pixels, and what is refused."""

import pytest
import torch

from dla_cache.errors import SpecError
from dla_cache.store import open_store
from trainer.data import PairSource, PixelScale, Role
from trainer.mixing import MixingConfig, mix_pairs, refuse_mixing
from trainer.objectives.cross_entropy import MixedLabels, cross_entropy
from trainer.run import load_run, train_run
from trainer.views import ViewConfig

SIZE = 16
IMAGE_IDS = [f"image_{number}" for number in range(400)]
MIXUP, CUTMIX = MixingConfig(cutmix_alpha=0), MixingConfig(mixup_alpha=0)


def mixed(config, image_ids=IMAGE_IDS, *, seed=0, draw=0):
    """Images of one value each, their number, and their labels, the same number."""
    numbers = torch.tensor([float(name.split("_")[1]) for name in image_ids])
    pixels = numbers[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    return mix_pairs(config, seed, draw, image_ids, pixels, numbers.long())


@pytest.mark.parametrize("config", [MixingConfig(), MIXUP, CUTMIX], ids=["both", "mixup", "cutmix"])
def test_the_share_of_a_label_is_that_of_the_pixels(config):
    pixels, labels = mixed(config)
    own = torch.arange(len(IMAGE_IDS)).float()
    expected = labels.share * own + (1 - labels.share) * labels.partner
    torch.testing.assert_close(pixels.mean(dim=(1, 2, 3)), expected, atol=1e-3, rtol=0)
    assert labels.partner.tolist() == [number ^ 1 for number in range(len(IMAGE_IDS))]
    assert torch.equal(labels.share[::2], labels.share[1::2])


def test_a_pair_is_mixed_the_same_in_any_batch_and_otherwise_in_another_view_seed_or_pair():
    whole, labels = mixed(MixingConfig())
    part, part_labels = mixed(MixingConfig(), IMAGE_IDS[100:120])
    assert torch.equal(part, whole[100:120])
    assert torch.equal(part_labels.share, labels.share[100:120])
    _, labels = mixed(MIXUP)
    for other in (mixed(MIXUP, draw=1), mixed(MIXUP, seed=1), mixed(MIXUP, IMAGE_IDS[::-1])):
        assert not set(labels.share.tolist()) & set(other[1].share.tolist())
    apart = [mixed(MIXUP, [IMAGE_IDS[0], IMAGE_IDS[partner]])[1].share[0] for partner in (1, 2)]
    assert apart[0] != apart[1]


def test_pairs_are_mixed_as_often_and_in_as_many_ways_as_the_config_says():
    pixels, labels = mixed(MixingConfig(probability=0.5))
    is_mixed = labels.share < 1
    assert float(is_mixed.float().mean()) == pytest.approx(0.5, abs=0.18)  # 200 pairs: 5 standard errors
    is_cut = torch.tensor([len(image.unique()) == 2 for image in pixels])
    assert float(is_cut[is_mixed].float().mean()) == pytest.approx(0.5, abs=0.25)
    share = mixed(MIXUP)[1].share
    assert float(share.mean()) == pytest.approx(0.5, abs=0.12)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.03)  # of Beta(.8, .8)


def test_cutmix_replaces_one_rectangle_and_its_share_is_what_is_left_of_the_image():
    pixels, labels = mixed(CUTMIX)
    is_cut = pixels[::2, 0] != torch.arange(0, len(IMAGE_IDS), 2)[:, None, None]
    assert torch.equal(1 - is_cut.float().mean(dim=(1, 2)), labels.share[::2])
    assert all(bool((one == (one.any(1)[:, None] & one.any(0))).all()) for one in is_cut)


def test_the_loss_of_mixed_images_is_that_of_both_labels_in_their_shares():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, -1])
    both = MixedLabels(torch.tensor([1, 0, -1]), torch.tensor([0.7, 0.7, 1.0]))
    soft = torch.tensor([[0.7, 0.3, 0, 0], [0.3, 0.7, 0, 0]])
    torch.testing.assert_close(
        cross_entropy(logits, labels, mixed=both), torch.nn.functional.cross_entropy(logits[:2], soft)
    )
    several, partners = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:2], 0.7 * several + 0.3 * partners)
    share = torch.tensor([0.7, 0.7])
    torch.testing.assert_close(cross_entropy(logits[:2], several, mixed=MixedLabels(partners, share)), expected)


def batch_of(tiny, mixing):
    source = PairSource(
        open_store(tiny.store),
        tiny.images,
        image_size=8,
        pixel_scale=PixelScale((0.5,) * 3, (0.5,) * 3),
        modalities=(),
        view=ViewConfig(),
        seed=0,
        device="cpu",
        mixing=mixing,
    )
    return next(source.training([Role(("labelled",), 2), Role(("transfer",), 3, labels_hidden=True)])(0))


def test_of_a_batch_the_labelled_images_are_mixed_and_the_transfer_images_are_not(tiny):
    plain, batch = batch_of(tiny, None), batch_of(tiny, MIXUP)
    assert torch.equal(batch.pixels[2:], plain.pixels[2:])
    assert not torch.equal(batch.pixels[:2], plain.pixels[:2])
    assert torch.equal(batch.labels, plain.labels)
    assert batch.mixed.partner.tolist() == [*plain.labels[:2].flip(0).tolist(), -1, -1, -1]
    assert batch.mixed.share[2:].tolist() == [1, 1, 1]
    share = batch.mixed.share[0]
    torch.testing.assert_close(batch.pixels[0], share * plain.pixels[0] + (1 - share) * plain.pixels[1])


def test_a_student_learns_the_labels_of_both_images(tiny, tmp_path):
    train_run(tiny.run("student", tmp_path / "run"))
    task, batch = load_run(tmp_path / "run").task, batch_of(tiny, MIXUP)
    logits = task.branch_logits(batch)["student"]
    expected = 0.25 * cross_entropy(logits, batch.labels, mixed=batch.mixed)
    torch.testing.assert_close(task.losses(batch).terms["ce"], expected)
    assert not torch.allclose(expected, 0.25 * cross_entropy(logits, batch.labels))


MIXED = {"mixing": {}, "labelled_per_batch": 2}


def test_students_of_labels_and_of_an_image_only_model_train_on_mixed_images(tiny, tmp_path):
    train_run(tiny.run("student", tmp_path / "first", **MIXED))
    result = train_run(
        tiny.run("student", tmp_path / "second", teacher=tmp_path / "first", objective=tiny.objectives["kd"], **MIXED)
    )
    assert 0 <= result.test_score <= 1


def test_what_reads_latents_is_not_taught_by_mixed_images_and_nothing_is_written(tiny, tmp_path):
    for kind, reason in (("probe", "sees no image"), ("teacher", "reads latents")):
        with pytest.raises(SpecError, match=reason) as refused:
            train_run(tiny.run(kind, tmp_path / kind, **MIXED))
        assert "mixing=null" in refused.value.hint
        assert not (tmp_path / kind).exists()


def test_stored_targets_are_not_mixed(tiny, tmp_path):
    config = tiny.run("student", tmp_path / "run", **MIXED)
    refuse_mixing(config, reference_sees_latents=False, has_stored_targets=False)
    with pytest.raises(SpecError, match="stored for single images"):
        refuse_mixing(config, reference_sees_latents=False, has_stored_targets=True)


def test_an_odd_number_of_labelled_images_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(SpecError, match="in pairs, and 3") as refused:
        train_run(tiny.run("student", tmp_path / "run", mixing={}, labelled_per_batch=3))
    assert "even" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_mixing_in_no_way_is_refused():
    with pytest.raises(ValueError, match="leave `mixing` out"):
        MixingConfig(mixup_alpha=0, cutmix_alpha=0)
