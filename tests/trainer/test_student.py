"""The student is a stock transformers classifier."""

import inspect

import pytest
import torch
from pydantic import ValidationError
from transformers import ViTForImageClassification

from trainer.outline import find_blocks
from trainer.presets import PRESETS
from trainer.student import (
    StudentConfig,
    build_student,
    student_features,
    student_position_to_content,
)

PAPER = StudentConfig.model_validate({"n_classes": 100, **PRESETS["paper"]["student"].get("model", {})})
EMBEDDED = StudentConfig.model_validate({"n_classes": 10, "image_size": 32, **PRESETS["embedded"]["student"]["model"]})


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = build_student(EMBEDDED).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_stock_transformers_loads_the_student_with_equal_logits(student, pixels, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        features = student_features(student, find_blocks(student), pixels)
        assert torch.equal(loaded(pixel_values=pixels).logits, features.logits)


def test_block_outputs_are_what_each_block_returns_before_the_final_norm(student, pixels):
    returned = []
    for block in student.vit.layers:
        block.register_forward_hook(lambda module, inputs, output: returned.append(output))
    features = student_features(student, find_blocks(student), pixels)
    assert len(features.blocks) == len(returned) == 3
    for block_output, expected in zip(features.blocks, returned, strict=True):
        assert torch.equal(block_output, expected)
    logits = student.classifier(student.vit.layernorm(features.blocks[-1])[:, 0])
    torch.testing.assert_close(features.logits, logits)


def test_gradients_pass_through_every_block_output(student, pixels):
    features = student_features(student, find_blocks(student), pixels)
    for number, block_output in enumerate(features.blocks):
        student.zero_grad()
        block_output[:, 0].square().sum().backward(retain_graph=True)
        reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in student.vit.layers]
        assert reached == [index <= number for index in range(3)]


def test_the_student_looks_at_pixels_and_nothing_else():
    assert list(inspect.signature(student_features).parameters) == ["student", "blocks", "pixels"]


def test_a_new_student_has_no_opinion(pixels):
    logits = build_student(EMBEDDED).eval()(pixel_values=pixels).logits
    assert torch.equal(logits, torch.zeros(3, 10))


def test_settings_reach_the_model():
    model = build_student(EMBEDDED.model_copy(update={"dropout": 0.3}))
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.3
    assert model.config._attn_implementation == "sdpa"
    assert model.config.layer_norm_eps == 1e-6
    positions = model.vit.embeddings.position_embeddings.detach()
    assert float(positions.std()) == pytest.approx(0.88, rel=0.1)  # a normal of 1, cut at 2
    assert float(model.vit.layers[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.07, rel=0.1)


def test_the_paper_student_is_a_vit_b_16_with_197_tokens():
    with torch.device("meta"):
        model = build_student(PAPER)
        features = student_features(model, find_blocks(model), torch.empty(2, 3, 224, 224))
    width = 768
    block = 4 * (width**2 + width) + 2 * 4 * width**2 + 5 * width + 4 * width
    expected = 3 * 16**2 * width + width + width + 197 * width + 12 * block + 2 * width + 100 * width + 100
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert [tuple(block_output.shape) for block_output in features.blocks] == [(2, 197, 768)] * 12


def test_positions_ten_times_as_large_count_ten_times_as_much(student, pixels):
    before = student_position_to_content(student, pixels)
    with torch.no_grad():
        student.vit.embeddings.position_embeddings.mul_(10)
    assert student_position_to_content(student, pixels) == pytest.approx(10 * before, rel=1e-5)


@pytest.mark.parametrize("fault", [{"patch_size": 5}, {"n_heads": 7}, {"learning_rate": 1.0}])
def test_a_student_that_cannot_be_built_is_refused(fault):
    with pytest.raises(ValidationError):
        StudentConfig.model_validate({**EMBEDDED.model_dump(), **fault})
