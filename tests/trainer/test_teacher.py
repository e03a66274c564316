"""The teacher: its sequence, its size, its branches and its statistics."""

import math

import pytest
import torch
from pydantic import ValidationError

from dla_cache.errors import TrainingError
from tests.trainer.teachers import DEPTH, make_batch, make_teacher, small_config
from trainer.presets import PRESETS
from trainer.teacher import Teacher, TeacherConfig

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
