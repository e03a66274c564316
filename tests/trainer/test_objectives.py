"""Objectives: values against independent computations, gradients, precision, missing labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trainer.features import LOGITS, Features, Target
from trainer.heads import MessyHeads, MessyTerm
from trainer.objectives import (
    OBJECTIVES,
    CeConfig,
    KdConfig,
    MessyConfig,
    Need,
    ObjectiveConfig,
    ObjectiveInputs,
    weighted_terms,
)
from trainer.objectives.ce import cross_entropy
from trainer.objectives.kd import kd_loss
from trainer.objectives.messy import messy_loss, messy_targets, messy_terms
from trainer.presets import PRESETS

PAPER = ObjectiveConfig.model_validate(PRESETS["paper"]["student"]["objective"])
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())
TERMS = tuple(MessyTerm(block, Target("pooled", name, block)) for block in (9, 10, 11) for name in ("shape", "audio"))

BLOCKS = tuple(f"blocks.{number}" for number in range(12))
DEPTH_OF_3, DEPTH_OF_5 = (Target("pooled", "depth", block) for block in (3, 5))


def golden_logits():
    i, j = np.arange(1, 5)[:, None], np.arange(1, 8)[None]
    return torch.from_numpy(3 * np.sin(0.7 * i * j)), torch.from_numpy(3 * np.cos(0.5 * i + 1.1 * j))


def random_inputs(dtype=torch.float64, n_images=5, n_classes=7, width=8):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    return ObjectiveInputs(
        student_logits=draw(n_images, n_classes, scale=3),
        labels=torch.tensor([0, -1, 6, 2, -1])[:n_images],
        targets={LOGITS: draw(n_images, n_classes, scale=3)} | {term.target: draw(n_images, width) for term in TERMS},
        predictions={term: draw(n_images, width) for term in TERMS},
    )


def test_cross_entropy_has_the_golden_value():
    student, _ = golden_logits()
    loss = cross_entropy(student, torch.tensor(GOLDEN["inputs"]["y"]))
    assert float(loss) == pytest.approx(GOLDEN["values"]["CE"], abs=1e-6)


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_has_the_golden_value(temperature):
    expected = GOLDEN["values"][f"KD_T{temperature} (T^2 KL batchmean)"]
    assert float(kd_loss(*golden_logits(), temperature)) == pytest.approx(expected, abs=1e-6)


def test_the_paper_loss_equals_one_written_from_the_equations():
    inputs = random_inputs()
    z_s, z_t = (logits.detach().numpy() for logits in (inputs.student_logits, inputs.targets[LOGITS]))
    n_images, n_classes = z_s.shape

    def softmax(row):
        return [math.exp(value) / sum(math.exp(other) for other in row) for value in row]

    labelled = [(i, int(y)) for i, y in enumerate(inputs.labels) if y >= 0]
    ce = -sum(math.log(softmax(z_s[i])[y]) for i, y in labelled) / len(labelled)
    kl = 0.0
    for i in range(n_images):
        p, q = softmax(z_t[i] / 2), softmax(z_s[i] / 2)
        kl += sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(n_classes)) / n_images
    mse = 0.0
    for term in TERMS:
        mse += np.mean((inputs.predictions[term].detach().numpy() - inputs.targets[term.target].detach().numpy()) ** 2)
    expected = 0.25 * ce + 0.75 * 4 * kl + 1.0 * mse

    terms = weighted_terms(PAPER, inputs)
    assert list(terms) == ["ce", "kd", "messy"]
    assert sum(terms.values()).item() == pytest.approx(expected, abs=1e-6)


def test_a_target_is_the_mean_over_the_modality_s_own_span_and_no_other_token():
    blocks = [torch.randn(2, 7, 3, dtype=torch.float64) for _ in range(12)]
    spans = {"image": slice(1, 3), "shape": slice(4, 5), "audio": slice(5, 7)}
    features = Features(torch.zeros(2, 3), tuple(blocks), spans)
    for target in (term.target for term in TERMS):
        tokens = [4] if target.span == "shape" else [5, 6]
        expected = sum(blocks[target.block][:, token].numpy() for token in tokens) / len(tokens)
        np.testing.assert_allclose(features.target(target).numpy(), expected, atol=1e-12)


def test_heads_of_the_paper_preset_have_4726272_parameters():
    config = MessyConfig()
    with torch.device("meta"):
        terms = messy_terms(config, BLOCKS, messy_targets(config, BLOCKS, ("cls", "image", "shape", "audio")))
        heads = MessyHeads(terms, [768] * 12, {term.target: 768 for term in terms}, hidden=config.hidden)
    assert set(heads.terms) == set(TERMS)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 4_726_272


def test_heads_read_the_class_token_of_their_own_block_and_nothing_else():
    first, second = (MessyTerm(*blocks) for blocks in ((0, DEPTH_OF_3), (1, DEPTH_OF_5)))
    heads = MessyHeads([first, second], [8, 8], {DEPTH_OF_3: 6, DEPTH_OF_5: 6}, hidden=4)
    blocks = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    predictions = heads(Features(torch.zeros(2, 3), tuple(blocks), {"cls": slice(0, 1)}))
    predictions[second].sum().backward()
    assert predictions[first].shape == (2, 6)
    assert blocks[0].grad is None
    assert blocks[1].grad[:, 0].abs().sum() > 0
    assert blocks[1].grad[:, 1:].abs().sum() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_reaches_the_student_and_not_the_teacher(name):
    inputs = random_inputs()
    config = ObjectiveConfig.model_validate({name: {}})
    weighted_terms(config, inputs)[name].backward()
    students = [inputs.student_logits, *inputs.predictions.values()]
    assert any(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in students)
    assert all(tensor.grad is None for tensor in inputs.targets.values())


def test_targets_carry_no_gradient():
    block = torch.randn(2, 4, 3, requires_grad=True)
    features = Features(block[:, 0], (block,), {"depth": slice(1, 4)})
    wanted = [LOGITS, Target("pooled", "depth", 0), Target("tokens", "depth", 0)]
    assert not any(features.target(target).requires_grad for target in wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_inputs_give_finite_losses_in_float32(name, dtype):
    inputs = random_inputs(dtype)
    big = {term: prediction.detach() * 300 for term, prediction in inputs.predictions.items()}
    logits = inputs.student_logits.detach() * 3000
    assert torch.isfinite(logits).all()
    inputs = ObjectiveInputs(logits, inputs.labels, inputs.targets, big)
    loss = weighted_terms(ObjectiveConfig.model_validate({name: {}}), inputs)[name]
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_cross_entropy_leaves_unlabelled_images_out():
    inputs = random_inputs()
    labelled = inputs.labels >= 0
    whole = cross_entropy(inputs.student_logits, inputs.labels)
    assert torch.equal(whole, cross_entropy(inputs.student_logits[labelled], inputs.labels[labelled]))


@pytest.mark.parametrize("name", ["kd", "messy"])
def test_unlabelled_images_take_part_in_distillation(name):
    inputs = random_inputs()
    weighted_terms(ObjectiveConfig.model_validate({name: {}}), inputs)[name].backward()
    student = inputs.student_logits if name == "kd" else inputs.predictions[TERMS[0]]
    assert (student.grad[inputs.labels < 0].abs().sum(dim=1) > 0).all()


def test_a_batch_without_labels_has_no_cross_entropy_term_and_keeps_the_others():
    inputs = random_inputs()
    unlabelled = ObjectiveInputs(inputs.student_logits, torch.full((5,), -1), inputs.targets, inputs.predictions)
    assert set(weighted_terms(PAPER, unlabelled)) == {"kd", "messy"}


def test_normalised_targets_do_not_depend_on_the_teacher_s_scale():
    inputs = random_inputs()
    scaled = {term: 100 * target + 3 for term, target in inputs.targets.items()}
    small = messy_loss(inputs.predictions, inputs.targets, normalise_targets=True)
    large = messy_loss(inputs.predictions, scaled, normalise_targets=True)
    assert large.item() == pytest.approx(small.item(), rel=1e-3)  # the layer norm's eps
    assert messy_loss(inputs.predictions, scaled).item() > 1000 * small.item()


def test_a_term_on_one_side_only_is_refused():
    inputs = random_inputs()
    renamed = {Target("pooled", "3d", target.block): value for target, value in inputs.targets.items()}
    with pytest.raises(ValueError, match="3d"):
        messy_loss(inputs.predictions, renamed)


def test_losses_refuse_shapes_that_would_broadcast():
    inputs = random_inputs()
    with pytest.raises(ValueError, match="shape"):
        kd_loss(inputs.student_logits, inputs.targets[LOGITS][:1], 2.0)
    with pytest.raises(ValueError, match="shape"):
        messy_loss(inputs.predictions, {term: target[:1] for term, target in inputs.targets.items()})


def test_an_active_objective_without_its_inputs_is_refused():
    with pytest.raises(ValueError, match="TEACHER_LOGITS"):
        weighted_terms(PAPER, ObjectiveInputs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))


def test_a_config_says_what_its_objectives_need():
    assert ObjectiveConfig(ce=CeConfig()).needs == {Need.LABELS}
    assert ObjectiveConfig(kd=KdConfig(), messy=MessyConfig()).needs == {Need.TEACHER_LOGITS, Need.BLOCK_TARGETS}


def test_every_registered_objective_can_be_configured():
    assert set(OBJECTIVES) == set(ObjectiveConfig.model_fields)


def test_a_config_without_objectives_is_refused():
    with pytest.raises(ValidationError, match="no objective is active"):
        ObjectiveConfig()
