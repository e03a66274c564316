"""The paper's three objectives: values against independent computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.parties import build, random_inputs
from trainer.features import LOGITS, Features, Target
from trainer.heads import MessyHeads, MessyTerm
from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.kd import kd_loss
from trainer.objectives.messy import MessyConfig, messy_loss, messy_targets, messy_terms
from trainer.presets import PRESETS

PAPER = PRESETS["paper"]["student"]["objective"]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())
TERMS = tuple(MessyTerm(block, Target("pooled", name, block)) for block in (9, 10, 11) for name in ("shape", "audio"))
BLOCKS = tuple(f"blocks.{number}" for number in range(12))
DEPTH_OF_3, DEPTH_OF_5 = (Target("pooled", "depth", block) for block in (3, 5))


def golden_logits():
    i, j = np.arange(1, 5)[:, None], np.arange(1, 8)[None]
    return torch.from_numpy(3 * np.sin(0.7 * i * j)), torch.from_numpy(3 * np.cos(0.5 * i + 1.1 * j))


def random_terms(n_images=5, width=8):
    generator = torch.Generator().manual_seed(0)
    predictions = {term: torch.randn(n_images, width, generator=generator) for term in TERMS}
    return predictions, {term.target: torch.randn(n_images, width, generator=generator) for term in TERMS}


def test_cross_entropy_has_the_golden_value():
    student, _ = golden_logits()
    loss = cross_entropy(student, torch.tensor(GOLDEN["inputs"]["y"]))
    assert float(loss) == pytest.approx(GOLDEN["values"]["CE"], abs=1e-6)


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_has_the_golden_value(temperature):
    expected = GOLDEN["values"][f"KD_T{temperature} (T^2 KL batchmean)"]
    assert float(kd_loss(*golden_logits(), temperature)) == pytest.approx(expected, abs=1e-6)


def test_the_paper_loss_equals_one_written_from_the_equations():
    objectives = build(PAPER)
    inputs = random_inputs(objectives)
    z_s, z_t = (logits.detach().double().numpy() for logits in (inputs.student.logits, inputs.targets[LOGITS]))
    n_images, n_classes = z_s.shape

    def softmax(row):
        return [math.exp(value) / sum(math.exp(other) for other in row) for value in row]

    labelled = [(i, int(y)) for i, y in enumerate(inputs.labels) if y >= 0]
    ce = -sum(math.log(softmax(z_s[i])[y]) for i, y in labelled) / len(labelled)
    kl = 0.0
    for i in range(n_images):
        p, q = softmax(z_t[i] / 2), softmax(z_s[i] / 2)
        kl += sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(n_classes)) / n_images
    predictions = objectives.terms["messy"].heads(inputs.student)
    mse = 0.0
    for term, prediction in predictions.items():
        mse += np.mean((prediction.detach().double().numpy() - inputs.targets[term.target].detach().numpy()) ** 2)

    terms = objectives(inputs)
    assert list(terms) == ["ce", "kd", "messy"]
    assert (
        len(predictions) == 2
    )  # both modalities, at the one block pair that a model of three blocks has for the three
    expected = [0.25 * ce, 0.75 * 4 * kl, 1.0 * mse]
    assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-5)


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


def test_targets_carry_no_gradient():
    block = torch.randn(2, 4, 3, requires_grad=True)
    features = Features(block[:, 0], (block,), {"depth": slice(1, 4)})
    wanted = [LOGITS, Target("pooled", "depth", 0), Target("tokens", "depth", 0)]
    assert not any(features.target(target).requires_grad for target in wanted)


def test_cross_entropy_leaves_unlabelled_images_out():
    logits, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, -1, 6, 2, -1])
    labelled = labels >= 0
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits[labelled], labels[labelled]))


def test_normalised_targets_do_not_depend_on_the_teacher_s_scale():
    predictions, targets = random_terms()
    scaled = {term: 100 * target + 3 for term, target in targets.items()}
    small = messy_loss(predictions, targets, normalise_targets=True)
    large = messy_loss(predictions, scaled, normalise_targets=True)
    assert large.item() == pytest.approx(small.item(), rel=1e-3)  # the layer norm's eps
    assert messy_loss(predictions, scaled).item() > 1000 * small.item()


def test_a_term_on_one_side_only_is_refused():
    predictions, targets = random_terms()
    renamed = {Target("pooled", "3d", target.block): value for target, value in targets.items()}
    with pytest.raises(ValueError, match="3d"):
        messy_loss(predictions, renamed)


def test_losses_refuse_shapes_that_would_broadcast():
    predictions, targets = random_terms()
    with pytest.raises(ValueError, match="shape"):
        kd_loss(torch.zeros(2, 3), torch.zeros(1, 3), 2.0)
    with pytest.raises(ValueError, match="shape"):
        messy_loss(predictions, {term: target[:1] for term, target in targets.items()})
