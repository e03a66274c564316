"""MST-Distill: its terms against loops over the equations, its stages, what learns when, and its refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dla_cache.errors import SpecError
from tests.trainer.parties import LABELS, LIVE, N_IMAGES, STUDENT, build, random_inputs
from trainer.objectives import ObjectiveConfig, Parties
from trainer.objectives.mask_net import MaskNet
from trainer.objectives.mst import (
    Candidate,
    MstConfig,
    candidates_of,
    chosen_by_chance,
    divergences_from,
    load_imbalance,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())
ROUTED = [0, 0.1]
"""Stages of which steps 5 and later of 20 lie in the third."""


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def divergence(target, prediction, temperature):
    p, q = (softmax([value / temperature for value in row]) for row in (target, prediction))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def routed(settings, **options):
    """The objective's module, its loss in the third stage, and what it was computed from, in plain lists."""
    objectives = build({"mst": {"stages": ROUTED, **settings}})
    inputs = random_inputs(objectives, **options)
    module = objectives.terms["mst"]
    with torch.no_grad():
        answers = [
            inputs.live.logits(one.teacher, place=one.place, mask=mask).tolist()
            for one, mask in zip(module.candidates, module.masks, strict=True)
        ]
        gates = [] if module.gate is None else [softmax(row) for row in module.gate(inputs.student.logits).tolist()]
    student = inputs.student.logits.tolist()
    d = [[divergence(answer[i], student[i], 4.0) for answer in answers] for i in range(N_IMAGES)]
    return objectives, inputs, float(objectives(inputs)["mst"].detach()), d, gates


def imbalance_of(gates):
    means = [sum(column) / len(gates) for column in zip(*gates, strict=True)]
    return sum(math.log(1 / (len(means) * mean)) / len(means) for mean in means)


def test_each_divergence_has_the_golden_value_of_kd():
    i, j = np.arange(1, 5)[:, None], np.arange(1, 8)[None]
    student, teacher = torch.from_numpy(3 * np.sin(0.7 * i * j)), torch.from_numpy(3 * np.cos(0.5 * i + 1.1 * j))
    found = divergences_from(student, torch.stack([teacher, student]), 4.0)
    assert found.shape == (4, 2)
    assert float(found[:, 0].mean()) == pytest.approx(GOLDEN["values"]["KD_T4 (T^2 KL batchmean)"], abs=1e-6)
    assert found[:, 1].abs().max() < 1e-9


def test_soft_routing_equals_loops_over_the_equation():
    _, _, loss, d, gates = routed({})
    soft = sum(sum(g * one for g, one in zip(*rows, strict=True)) for rows in zip(gates, d, strict=True)) / N_IMAGES
    assert loss == pytest.approx(soft + imbalance_of(gates), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_routing_is_the_plain_mean_over_the_best_as_published(k):
    _, _, loss, d, gates = routed({"routing": "top-k", "k": k, "balance": 0.5})
    total = 0.0
    for row, of_image in zip(gates, d, strict=True):
        best = sorted(range(len(row)), key=lambda m, row=row: -row[m])[:k]
        total += sum(of_image[m] for m in best) / k / N_IMAGES
    assert loss == pytest.approx(total + 0.5 * imbalance_of(gates), rel=1e-5)


def test_uniform_routing_is_the_mean_over_candidates_and_has_no_gate():
    objectives, _, loss, d, _ = routed({"routing": "uniform"})
    assert loss == pytest.approx(np.mean(d), rel=1e-5)
    assert not any("gate" in name for name, _ in objectives.named_parameters())


def test_random_routing_picks_one_anew_for_each_image_and_step_by_the_run_s_seed():
    losses = []
    for step in (5, 5, 6):
        _, _, loss, d, _ = routed({"routing": "random"}, step=step)
        losses.append(loss)
        assert min(map(min, d)) <= loss <= max(map(max, d))
    assert losses[0] == losses[1] != losses[2]
    counts = torch.bincount(chosen_by_chance(7, torch.arange(4000), 3, 4))
    assert all(900 < count < 1100 for count in counts)


def test_a_gate_that_is_the_same_to_all_is_balanced_and_one_that_sees_one_candidate_is_not():
    assert float(load_imbalance(torch.full((3, 4), 0.25))) == pytest.approx(0, abs=1e-6)
    lopsided = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3)
    assert float(load_imbalance(lopsided)) == pytest.approx(0.25 * math.log(0.25**4 / (0.7 * 0.001)), rel=1e-5)
    assert load_imbalance(torch.tensor([[1.0, 0.0]])).isfinite()


def test_a_soft_gate_learns_from_the_distillation_and_a_top_k_gate_from_the_balance_alone():
    for routing, learns in (("soft", True), ("top-k", False)):
        objectives, inputs, *_ = routed({"routing": routing, "balance": 0})
        objectives(inputs)["mst"].backward()
        gradients = [value.grad for name, value in objectives.named_parameters() if "gate" in name]
        assert any(one is not None and one.abs().sum() > 0 for one in gradients) == learns


def trained_at(step, fields=None):
    """Names of parts that learn at a step of 20, and whether the toy teachers do."""
    objectives = build({"mst": {**(fields or {})}})
    inputs = random_inputs(objectives, step=step)
    objectives(inputs)["mst"].backward()
    learning = {name.split(".")[2] for name, value in objectives.named_parameters() if value.grad is not None}
    return learning, any(head.grad is not None for head in inputs.live.heads.values())


def test_masks_learn_in_the_second_stage_the_gate_in_the_third_and_teachers_in_the_first_if_asked():
    assert [trained_at(step)[0] for step in (0, 4, 5, 9, 10, 19)] == [set(), set(), *[{"masks"}] * 2, *[{"gate"}] * 2]
    assert not any(trained_at(step)[1] for step in (0, 5, 10))
    assert [trained_at(step, {"mutual": True})[1] for step in (0, 4, 5, 10)] == [True, True, False, False]


def test_before_it_is_routed_the_student_follows_the_mean_over_teachers_and_masks_imitate_it():
    objectives = build({"mst": {}})
    module = objectives.terms["mst"]
    for step in (0, 5):
        inputs = random_inputs(objectives, step=step)
        student = inputs.student.logits.tolist()
        plain = [inputs.live.logits(name).tolist() for name in LIVE]
        expected = np.mean([[divergence(t[i], student[i], 4.0) for i in range(N_IMAGES)] for t in plain])
        gradient = torch.autograd.grad(objectives(inputs)["mst"], inputs.student.logits, retain_graph=True)[0]
        if step == 5:
            masked = [
                inputs.live.logits(one.teacher, place=one.place, mask=mask).tolist()
                for one, mask in zip(module.candidates, module.masks, strict=True)
            ]
            expected += np.mean([[divergence(student[i], t[i], 4.0) for i in range(N_IMAGES)] for t in masked])
        assert float(objectives(inputs)["mst"].detach()) == pytest.approx(expected, rel=1e-5)
        if step == 0:
            first = gradient
    torch.testing.assert_close(gradient, first)  # imitation gives the student none


def test_teachers_that_learn_follow_labels_the_student_and_one_another():
    objectives = build({"mst": {"mutual": True}})
    inputs = random_inputs(objectives, step=0)
    everyone = {"student": inputs.student.logits.tolist()}
    everyone |= {name: inputs.live.logits(name).tolist() for name in LIVE}
    pairs = {
        (a, b): np.mean([divergence(x, y, 4.0) for x, y in zip(everyone[a], everyone[b], strict=True)])
        for a in everyone
        for b in everyone
        if a != b
    }
    expected = np.mean([pairs["one", "student"], pairs["two", "student"]])
    labelled = [(i, int(y)) for i, y in enumerate(LABELS) if y >= 0]
    for name in LIVE:
        expected += sum(value for (_, learner), value in pairs.items() if learner == name)
        expected -= sum(math.log(softmax(everyone[name][i])[y]) for i, y in labelled) / len(labelled)
    assert float(objectives(inputs)["mst"].detach()) == pytest.approx(expected, rel=1e-5)


def test_a_mask_weighs_each_feature_of_an_image_between_0_and_1_and_reads_their_values():
    torch.manual_seed(0)
    mask, tokens = MaskNet(6), torch.randn(3, 4, 6)
    weights = mask(tokens)
    assert weights.shape == (3, 6)
    assert ((weights > 0) & (weights < 1)).all()
    torch.testing.assert_close(mask(tokens * 7), weights)
    assert not torch.allclose(mask(tokens.flip(2)), weights)


def test_several_labels_an_image_are_questions_of_their_own():
    objectives = build({"mst": {"stages": ROUTED, "routing": "uniform"}})
    inputs = replace(random_inputs(objectives), is_multi_label=True)
    student = inputs.student.logits.flatten().tolist()
    module = objectives.terms["mst"]
    expected = []
    for one, mask in zip(module.candidates, module.masks, strict=True):
        answers = inputs.live.logits(one.teacher, place=one.place, mask=mask).flatten().tolist()
        expected += [divergence([a, 0], [b, 0], 4.0) for a, b in zip(answers, student, strict=True)]
    assert float(objectives(inputs)["mst"].detach()) == pytest.approx(np.mean(expected), rel=1e-5)


def test_candidates_are_each_teacher_at_each_place_once():
    found = candidates_of(MstConfig(layers=(0.5, 1.0)), {"deep": LIVE["one"], "probe": {"hidden": 4}})
    assert found == (Candidate("deep", "blocks.1"), Candidate("deep", "late"), Candidate("probe", "hidden"))


@pytest.mark.parametrize(
    ("settings", "places", "what"),
    [
        ({"layers": [7]}, LIVE, "no block `7`"),
        ({"layers": ["nowhere"]}, LIVE, "model `one` has no block `nowhere`"),
        ({"layers": [1.0]}, {"alone": {"blocks.0": 4}}, "there is 1"),
        ({"layers": [], "stages": [0, 0]}, {"alone": {"blocks.0": 4}}, "there is 1"),
        ({"routing": "top-k", "k": 5}, LIVE, "`mst.k` is 5, and there are 4"),
    ],
)
def test_what_leaves_nothing_to_choose_between_is_refused(settings, places, what):
    config = ObjectiveConfig.model_validate({"mst": settings})
    with pytest.raises(SpecError, match=what) as caught:
        config.mst.build(Parties(STUDENT, None, live=places, n_steps=20))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"k": 2}, "`k` belongs to"),
        ({"stages": [0.5, 0.5]}, "leave no step to be routed in"),
        ({"stages": [0.5, 0]}, "masks learn in the second"),
        ({"routing": "hard"}, "Input should be"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, what):
    with pytest.raises(ValidationError, match=what):
        MstConfig.model_validate(settings)
