"""What a teacher makes of latents that are padded, missing or dropped, whatever its fusion."""

import pytest
import torch

from dla_cache.errors import TrainingError
from tests.trainer.teachers import EVERY_FUSION, make_batch, make_teacher


@EVERY_FUSION
def test_padding_changes_nothing_whatever_it_holds(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch()
    short = {"shape": latents["shape"][:, :4], "audio": latents["audio"][:, :, :5]}
    masks = {"shape": (torch.arange(6) < 4).expand(5, 6), "audio": (torch.arange(9) < 5).expand(5, 9)}
    padded = {"shape": latents["shape"].clone(), "audio": latents["audio"].clone()}
    padded["audio"][:, :, 5:] = -1  # no code at all; a lookup of it would raise
    expected = teacher(pixels, short).logits
    torch.testing.assert_close(teacher(pixels, padded, masks).logits, expected, atol=1e-5, rtol=0)


@EVERY_FUSION
def test_samples_of_different_lengths_share_a_batch(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch(3)
    lengths = torch.tensor([2, 6, 4])
    masks = {"shape": torch.arange(6) < lengths[:, None], "audio": torch.arange(9) < lengths[:, None]}
    together = teacher(pixels, latents, masks).logits
    for index, length in enumerate(lengths.tolist()):
        alone = {
            "shape": latents["shape"][index : index + 1, :length],
            "audio": latents["audio"][index : index + 1, :, :length],
        }
        expected = teacher(pixels[index : index + 1], alone).logits
        torch.testing.assert_close(together[index : index + 1], expected, atol=1e-5, rtol=0)


@EVERY_FUSION
def test_code_zero_and_zero_vectors_count_unless_a_mask_says_otherwise(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch()
    latents = {"shape": latents["shape"], "audio": latents["audio"].clone()}
    latents["audio"][:, :, 5:] = 0
    latents["shape"][:, 4:] = 0
    whole = teacher(pixels, latents).logits
    for name, length, full in (("audio", 5, 9), ("shape", 4, 6)):
        masked = teacher(pixels, latents, {name: (torch.arange(full) < length).expand(5, full)}).logits
        assert (whole - masked).abs().max() > 1e-3


@EVERY_FUSION
def test_a_wholly_padded_sample_equals_one_without_the_modality_and_has_finite_gradients(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch(2)
    masks = {"audio": torch.tensor([[True] * 9, [False] * 9])}
    logits = teacher(pixels, latents, masks).logits
    without = teacher(pixels, latents, present={"audio": False}).logits
    torch.testing.assert_close(logits[1], without[1], atol=1e-5, rtol=0)
    assert (logits[0] - without[0]).abs().max() > 1e-3
    logits.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in teacher.parameters())


@EVERY_FUSION
def test_leaving_a_modality_out_makes_it_null_tokens_for_all_images(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch()
    without = teacher(pixels, latents, present={"audio": False})
    other_codes = {**latents, "audio": (latents["audio"] + 1) % 5}
    assert torch.equal(without.logits, teacher(pixels, other_codes, present={"audio": False}).logits)
    assert torch.equal(without.logits, teacher(pixels, {"shape": latents["shape"]}, present={"audio": False}).logits)
    assert (without.logits - teacher(pixels, latents).logits).abs().max() > 1e-3
    with torch.no_grad():
        teacher.encoders["audio"].null_tokens.add_(1)
    otherwise = teacher(pixels, latents, present={"audio": False})
    assert not torch.equal(without.block_outputs[-1], otherwise.block_outputs[-1])


@pytest.mark.parametrize(
    ("latents", "present", "message"),
    [
        (("shape",), None, "no latent is given for `audio`"),
        (("shape", "audio", "3d"), None, "no modality `3d`"),
        (("shape", "audio"), {"3d": False}, "no modality `3d`"),
    ],
)
def test_a_misspelt_modality_is_refused_not_dropped(latents, present, message):
    pixels, given = make_batch()
    handed = {name: given.get(name, given["shape"]) for name in latents}
    with pytest.raises(TrainingError, match=message):
        make_teacher()(pixels, handed, present=present)


def dropped_tokens(teacher, n_images):
    """For each modality, which images' tokens enter the first block as null tokens."""
    entered = []
    teacher.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    pixels, latents = make_batch(n_images)
    teacher(pixels, latents)
    content = entered[0] - teacher.positions
    nulls = {
        name: (content[:, teacher.spans[name]] - teacher.encoders[name].null_tokens).abs().amax((1, 2)) < 1e-5
        for name in teacher.config.modalities
    }
    patches = teacher.patch_embedding(pixels).flatten(2).transpose(1, 2)
    return nulls, (content[:, teacher.spans["image"]] - patches).abs().max()


def test_modality_dropout_is_per_image_and_modality_and_never_takes_the_image():
    teacher = make_teacher(dropout=0.0).train()
    with torch.no_grad():
        nulls, image_change = dropped_tokens(teacher, 4000)
    shape, audio = nulls["shape"].float(), nulls["audio"].float()
    # 4000 images: tolerances are 5 standard errors.
    assert float(shape.mean()) == pytest.approx(0.8, abs=0.032)
    assert float(audio.mean()) == pytest.approx(0.8, abs=0.032)
    assert float((shape * audio).mean()) == pytest.approx(0.64, abs=0.038)
    assert float(((1 - shape) * (1 - audio)).mean()) == pytest.approx(0.04, abs=0.016)
    assert image_change < 1e-5


def test_nothing_is_dropped_at_evaluation():
    nulls, _ = dropped_tokens(make_teacher(), 50)
    assert not any(null.any() for null in nulls.values())
