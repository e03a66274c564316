"""The teacher: its sequence, its size, what it does with masks, missing modalities and statistics."""

import math

import pytest
import torch
from pydantic import ValidationError

from dla_cache.errors import LatentShapeError, TrainingError
from dla_cache.spec import LatentFormat
from trainer.adapters import LatentScaler, tokens_of
from trainer.presets import PRESETS
from trainer.teacher import Teacher, TeacherConfig

DEPTH = LatentFormat(kind="continuous", shape=(8, 4, 4), axes=("channel", "height", "width"), dtype="float16")
SHAPE = LatentFormat(kind="continuous", shape=(6, 6), axes=("token", "channel"), dtype="float32")
AUDIO = LatentFormat(kind="codes", shape=(2, 9), axes=("codebook", "step"), dtype="int16", vocabulary=5)
PAPER = TeacherConfig.model_validate(
    {
        "n_classes": 100,
        "formats": {
            "shape": {"kind": "continuous", "shape": (256, 64), "axes": ("token", "channel"), "dtype": "float32"},
            "audio": {
                "kind": "codes",
                "shape": (4, 250),
                "axes": ("codebook", "step"),
                "dtype": "int16",
                "vocabulary": 2048,
            },
        },
        **PRESETS["paper"]["teacher"].get("model", {}),
    }
)
EMBEDDED = TeacherConfig.model_validate(
    {"n_classes": 3, "image_size": 32, "formats": {"depth": DEPTH}, **PRESETS["embedded"]["teacher"]["model"]}
)


def small_config(**settings):
    small = {
        "n_classes": 4,
        "formats": {"shape": SHAPE, "audio": AUDIO},
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "n_heads": 2,
        "tokens_per_modality": 3,
        "resampler_heads": 4,
    }
    return TeacherConfig.model_validate({**small, **settings})


def with_statistics(teacher):
    for name, latent_format in teacher.config.formats.items():
        if latent_format.kind == "continuous":
            n_channels = latent_format.shape[latent_format.channel_axis]
            teacher.set_statistics(name, torch.arange(n_channels) / 4, 1 + torch.arange(n_channels) / 8)
    return teacher


def make_teacher(**settings):
    torch.manual_seed(0)
    teacher = Teacher(small_config(**settings))
    torch.nn.init.normal_(teacher.head.weight)  # a zero head would hide every difference
    return (with_statistics(teacher) if teacher.config.standardise else teacher).eval()


def make_batch(n_images=5):
    generator = torch.Generator().manual_seed(1)
    latents = {
        "shape": torch.randn(n_images, 6, 6, generator=generator),
        "audio": torch.randint(0, 5, (n_images, 2, 9), generator=generator),
    }
    return torch.randn(n_images, 3, 8, 8, generator=generator), latents


BOTH_BRANCHES = pytest.mark.parametrize(
    "fusion", [{}, {"standardise": True, "late_fusion": True}], ids=["one branch", "late fusion"]
)


def test_the_paper_teacher_has_399_tokens_in_the_published_order():
    with torch.device("meta"):
        teacher = Teacher(PAPER)
        latents = {"shape": torch.empty(2, 256, 64), "audio": torch.empty(2, 4, 250, dtype=torch.int16)}
        output = teacher(torch.empty(2, 3, 224, 224), latents)
    assert teacher.sequence_length == 399
    assert teacher.spans == {
        "cls": slice(0, 1),
        "image": slice(1, 197),
        "shape": slice(198, 298),
        "audio": slice(299, 399),
    }
    assert [tuple(block.shape) for block in output.block_outputs] == [(2, 399, 768)] * 12
    assert output.logits.shape == (2, 100)


def test_the_paper_teacher_has_the_published_settings():
    with torch.device("meta"):
        teacher = Teacher(PAPER)
    assert not teacher.config.standardise
    assert not list(teacher.buffers())[1:]  # only the offsets of the codebooks
    assert teacher.config.modality_dropout == 0.8
    assert teacher.norm.eps == 1e-6
    for block in teacher.blocks:
        assert block.norm_first
        assert block.norm1.eps == block.norm2.eps == 1e-6
        assert block.dropout.p == block.self_attn.dropout == 0.1
        assert block.activation is torch.nn.functional.gelu
    assert [encoder.resampler.attention.num_heads for encoder in teacher.encoders.values()] == [8, 8]


def test_the_paper_teacher_has_as_many_parameters_as_its_description_says():
    with torch.device("meta"):
        teacher = Teacher(PAPER)
    width = 768

    def linear(n_in, n_out):
        return n_in * n_out + n_out

    norm = 2 * width
    attention = 4 * linear(width, width)
    block = attention + linear(width, 4 * width) + linear(4 * width, width) + 2 * norm
    resampler = 100 * width + 2 * norm + attention + linear(width, 2 * width) + linear(2 * width, width)
    null_tokens = 100 * width
    shape = 2 * 64 + linear(64, width) + linear(width, width) + 256 * width + resampler + null_tokens
    audio = 4 * 2048 * width + norm + linear(width, width) + 250 * width + resampler + null_tokens
    image = linear(3 * 16 * 16, width)
    sequence = width + width + 399 * width  # CLS, one shared separator, positions
    expected = image + sequence + shape + audio + 12 * block + norm + linear(width, 100)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == expected


def test_a_teacher_without_modalities_is_an_image_classifier():
    teacher = make_teacher(formats={})
    output = teacher(make_batch()[0], {})
    assert teacher.spans == {"cls": slice(0, 1), "image": slice(1, 5)}
    assert output.block_outputs[0].shape == (5, 5, 16)


def test_a_new_transformer_branch_has_no_opinion():
    teacher = Teacher(small_config()).eval()
    assert torch.equal(teacher(*make_batch()).logits, torch.zeros(5, 4))


def test_blocks_start_different_from_each_other():
    first, second = Teacher(small_config()).blocks
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_block_outputs_are_what_each_block_returns_before_the_final_norm():
    teacher = make_teacher()
    returned = []
    for block in teacher.blocks:
        block.register_forward_hook(lambda module, inputs, output: returned.append(output))
    output = teacher(*make_batch())
    assert all(torch.equal(*pair) for pair in zip(output.block_outputs, returned, strict=True))
    torch.testing.assert_close(output.logits, teacher.head(teacher.norm(returned[-1][:, 0])))


@BOTH_BRANCHES
def test_padding_changes_nothing_whatever_it_holds(fusion):
    teacher = make_teacher(**fusion)
    pixels, latents = make_batch()
    short = {"shape": latents["shape"][:, :4], "audio": latents["audio"][:, :, :5]}
    masks = {"shape": (torch.arange(6) < 4).expand(5, 6), "audio": (torch.arange(9) < 5).expand(5, 9)}
    padded = {"shape": latents["shape"].clone(), "audio": latents["audio"].clone()}
    padded["audio"][:, :, 5:] = -1  # no code at all; a lookup of it would raise
    expected = teacher(pixels, short).logits
    torch.testing.assert_close(teacher(pixels, padded, masks).logits, expected, atol=1e-5, rtol=0)


@BOTH_BRANCHES
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


@BOTH_BRANCHES
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


@BOTH_BRANCHES
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


@pytest.mark.parametrize("shape", [(6, 5), (7, 6), (0, 6), (6,), (1, 6, 6)])
def test_a_latent_that_does_not_fit_its_format_is_refused(shape):
    with pytest.raises(LatentShapeError, match="format says"):
        tokens_of(torch.zeros(2, *shape), SHAPE)


@BOTH_BRANCHES
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
    assert not torch.equal(without.logits, teacher(pixels, latents, present={"audio": False}).logits)


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


def test_every_parameter_gets_a_gradient():
    teacher = make_teacher(standardise=True, late_fusion=True, modality_dropout=0.5).train()
    output = teacher(*make_batch(20))
    output.logits[:, 0].sum().backward()
    assert [name for name, parameter in teacher.named_parameters() if parameter.grad is None] == []


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


def test_standardising_without_statistics_is_an_error_not_a_raw_latent():
    with pytest.raises(TrainingError, match="no statistics are set"):
        Teacher(small_config(standardise=True))(*make_batch())


def test_statistics_for_a_teacher_that_does_not_standardise_are_refused():
    with pytest.raises(TrainingError, match="does not standardise"):
        make_teacher().set_statistics("shape", torch.zeros(6), torch.ones(6))


def test_a_checkpoint_brings_its_statistics():
    teacher = make_teacher(standardise=True, late_fusion=True)
    loaded = Teacher(teacher.config).eval()
    loaded.load_state_dict(teacher.state_dict())
    assert torch.equal(loaded(*make_batch()).logits, teacher(*make_batch()).logits)


def test_a_config_read_from_sorted_json_gives_the_same_sequence():
    config = small_config()
    values = config.model_dump(mode="json")
    values["formats"] = dict(sorted(values["formats"].items()))
    assert Teacher(TeacherConfig.model_validate(values)).spans == Teacher(config).spans
    assert list(values["formats"]) != list(config.modalities)


def test_late_fusion_gives_both_branches_and_the_normalised_product_of_their_probabilities():
    output = make_teacher(standardise=True, late_fusion=True)(*make_batch())
    assert set(output.branch_logits) == {"fused", "late"}
    expected = sum(logits.log_softmax(-1) for logits in output.branch_logits.values()) / 2
    torch.testing.assert_close(output.logits.log_softmax(-1), expected.log_softmax(-1))


def test_the_late_branch_does_not_see_the_image():
    teacher = make_teacher(standardise=True, late_fusion=True)
    pixels, latents = make_batch()
    first, second = (teacher(image, latents).branch_logits for image in (pixels, -pixels))
    assert torch.equal(first["late"], second["late"])
    assert not torch.equal(first["fused"], second["fused"])


def test_without_late_fusion_the_only_branch_is_the_output():
    output = make_teacher()(*make_batch())
    assert set(output.branch_logits) == {"fused"}
    assert torch.equal(output.branch_logits["fused"], output.logits)


def test_attention_weights_are_never_materialised(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or fused(*a, **k)
    )
    make_teacher().train()(*make_batch())
    assert len(calls) == 2 + 2  # two blocks, two resamplers


def test_position_to_content_counts_positions_against_tokens():
    pixels, latents = make_batch()
    teacher = make_teacher()
    before = teacher.position_to_content(pixels, latents)
    with torch.no_grad():
        teacher.positions.mul_(10)
    after = teacher.position_to_content(pixels, latents)
    assert set(before) == {"image", "shape", "audio"}
    assert all(math.isclose(after[name], 10 * before[name], rel_tol=1e-4) for name in before)


def test_the_embedded_teacher_learns_a_batch_by_heart():
    torch.manual_seed(0)
    teacher = Teacher(EMBEDDED.model_copy(update={"modality_dropout": 0.0}))
    pixels, latents = torch.randn(12, 3, 32, 32), {"depth": torch.randn(12, 8, 4, 4).half()}
    labels = torch.arange(12) % 3
    teacher.set_statistics("depth", torch.zeros(8), torch.ones(8))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(15):
        branches = teacher(pixels, latents).branch_logits.values()
        loss = sum(torch.nn.functional.cross_entropy(logits, labels) for logits in branches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for logits in teacher.eval()(pixels, latents).branch_logits.values():
        assert torch.equal(logits.argmax(-1), labels)


def test_the_embedded_preset_is_the_same_teacher_with_other_settings():
    assert EMBEDDED.late_fusion
    assert EMBEDDED.standardise
    teacher = Teacher(EMBEDDED)
    assert teacher.spans == {"cls": slice(0, 1), "image": slice(1, 17), "depth": slice(18, 34)}
    assert float(teacher.positions.detach().std()) == pytest.approx(0.88, rel=0.1)  # a normal of 1, cut at 2


@pytest.mark.parametrize(
    "fault",
    [
        {"patch_size": 3},
        {"n_heads": 3},
        {"resampler_heads": 5},
        {"modalities": ["shape"]},
        {"modalities": ["shape", "shape", "audio"]},
        {"late_fusion": True},
        {"formats": {}, "standardise": True, "late_fusion": True},
        {"modality_dropuot": 0.5},
    ],
)
def test_a_teacher_that_cannot_be_built_is_refused(fault):
    with pytest.raises(ValidationError):
        small_config(**fault)
