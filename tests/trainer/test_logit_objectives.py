"""Objectives on logits: golden values, the papers' equations written once more with loops, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dla_cache.errors import SpecError
from tests.trainer.parties import LABELS, PARTIES, build, random_inputs
from trainer.config import resolve_run
from trainer.features import LOGITS
from trainer.objectives import ModelOutline, Parties
from trainer.objectives.decoupled import dkd_loss, nkd_loss
from trainer.objectives.dist import dist_loss
from trainer.objectives.kd import generalized_distillation_loss, kd_loss, standardised_kd_loss
from trainer.objectives.ofa import ofa_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())
CLASSES = torch.tensor(GOLDEN["inputs"]["y"])


def golden_logits():
    i, j = np.arange(1, 5)[:, None], np.arange(1, 8)[None]
    return torch.from_numpy(3 * np.sin(0.7 * i * j)), torch.from_numpy(3 * np.cos(0.5 * i + 1.1 * j))


STUDENT, TEACHER = golden_logits()


def softmax(row, temperature=1.0):
    exponents = [math.exp(value / temperature) for value in row]
    return [value / sum(exponents) for value in exponents]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean_over_images(loss):
    """Of a function of the rows z_s and z_t and the class y."""
    return np.mean([loss(s.tolist(), t.tolist(), int(y)) for s, t, y in zip(STUDENT, TEACHER, CLASSES, strict=True)])


def without(row, y):
    return [value for k, value in enumerate(row) if k != y]


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("DKD a1 b0 T4 (TCKD)", lambda: dkd_loss(STUDENT, TEACHER, CLASSES, alpha=1, beta=0, temperature=4)),
        ("DKD a0 b1 T4 (NCKD)", lambda: dkd_loss(STUDENT, TEACHER, CLASSES, alpha=0, beta=1, temperature=4)),
        ("DIST b1 g1 tau1", lambda: dist_loss(STUDENT, TEACHER)),  # the 1 x value; the term's weight is 2
        ("OFA eps1 T1", lambda: ofa_loss(STUDENT, TEACHER, CLASSES)),
    ],
)
def test_a_loss_has_its_golden_value(name, loss):
    assert float(loss()) == pytest.approx(GOLDEN["values"][name], abs=1e-6)


def test_dkd_is_the_divergence_of_own_against_others_and_that_among_the_others():
    def loss(z_s, z_t, y):
        p_s, p_t = softmax(z_s, 3), softmax(z_t, 3)
        own = divergence((p_t[y], 1 - p_t[y]), (p_s[y], 1 - p_s[y]))
        others = divergence(softmax(without(z_t, y), 3), softmax(without(z_s, y), 3))
        return 9 * (1.5 * own + 6 * others)

    found = dkd_loss(STUDENT, TEACHER, CLASSES, alpha=1.5, beta=6, temperature=3)
    assert float(found) == pytest.approx(mean_over_images(loss), rel=1e-9)


def test_dkd_with_the_weight_of_the_others_by_image_is_kd():
    """What the paper starts from: KD = TCKD + (1 - p_t(y))·NCKD; here for one image at a time."""
    for row in range(4):
        one = slice(row, row + 1)
        beta = 1 - float((TEACHER[one] / 4).softmax(1)[0, CLASSES[row]])
        decoupled = dkd_loss(STUDENT[one], TEACHER[one], CLASSES[one], alpha=1, beta=beta, temperature=4)
        assert float(decoupled) == pytest.approx(float(kd_loss(STUDENT[one], TEACHER[one], 4.0)), rel=1e-9)


def test_nkd_weighs_the_own_class_by_the_teacher_and_normalises_the_others():
    def loss(z_s, z_t, y):
        own = -softmax(z_t)[y] * math.log(softmax(z_s)[y])
        q_s, q_t = softmax(without(z_s, y), 2), softmax(without(z_t, y), 2)
        return own - 1.5 * 4 * sum(t * math.log(s) for s, t in zip(q_s, q_t, strict=True))

    assert float(nkd_loss(STUDENT, TEACHER, CLASSES, temperature=2)) == pytest.approx(mean_over_images(loss), rel=1e-9)


def test_dist_is_one_minus_the_mean_correlation_of_rows_and_of_columns():
    s, t = (np.array([softmax(row, 4) for row in logits.tolist()]) for logits in (STUDENT, TEACHER))
    rows = np.mean([np.corrcoef(s[i], t[i])[0, 1] for i in range(4)])
    columns = np.mean([np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(7)])
    found = dist_loss(STUDENT, TEACHER, classes=2, images=3, temperature=4)
    assert float(found) == pytest.approx(16 * (2 * (1 - rows) + 3 * (1 - columns)), rel=1e-4)  # the published eps


def test_standardised_kd_is_kd_of_z_scores():
    def z(row):
        return [(value - np.mean(row)) / np.std(row, ddof=1) for value in row]

    def loss(z_s, z_t, _):
        return 4 * divergence(softmax(z(z_t), 2), softmax(z(z_s), 2))

    assert float(standardised_kd_loss(STUDENT, TEACHER, 2.0)) == pytest.approx(mean_over_images(loss), rel=1e-9)


def test_standardised_kd_does_not_see_scale_and_offset_of_either_side():
    expected = float(standardised_kd_loss(STUDENT, TEACHER, 2.0))
    assert float(standardised_kd_loss(7 * STUDENT + 3, 0.2 * TEACHER - 1, 2.0)) == pytest.approx(expected, rel=1e-9)
    assert float(kd_loss(7 * STUDENT + 3, 0.2 * TEACHER - 1, 2.0)) > 2 * float(kd_loss(STUDENT, TEACHER, 2.0))


def test_generalized_distillation_softens_the_reference_alone():
    def loss(z_s, z_t, _):
        return -sum(t * math.log(s) for s, t in zip(softmax(z_s), softmax(z_t, 4), strict=True))

    found = generalized_distillation_loss(STUDENT, TEACHER, 4.0)
    assert float(found) == pytest.approx(mean_over_images(loss), rel=1e-9)


def test_generalized_distillation_has_the_gradient_of_kd_at_temperature_1_and_at_no_other():
    def gradient(loss, temperature):
        logits = STUDENT.clone().requires_grad_()
        loss(logits, TEACHER, temperature).backward()
        return logits.grad

    for temperature, is_equal in ((1.0, True), (2.0, False)):
        both = [gradient(loss, temperature) for loss in (generalized_distillation_loss, kd_loss)]
        assert torch.allclose(*both) == is_equal


@pytest.mark.parametrize("epsilon", [1.0, 1.4])
def test_ofa_raises_the_own_class_alone(epsilon):
    def loss(z_s, z_t, y):
        p_s, p_t = softmax(z_s, 2), softmax(z_t, 2)
        raised = [(p + (k == y)) ** epsilon - (k == y) for k, p in enumerate(p_t)]
        return -sum(weight * math.log(p) for weight, p in zip(raised, p_s, strict=True))

    found = ofa_loss(STUDENT, TEACHER, CLASSES, epsilon=epsilon, temperature=2.0)
    assert float(found) == pytest.approx(mean_over_images(loss), rel=1e-9)


def test_ofa_asks_each_stage_of_the_student_and_its_logits():
    objectives = build({"ofa": {"layers": [0, 2, 1.0]}})
    inputs = random_inputs(objectives)
    heads = objectives.terms["ofa"].heads
    labelled = LABELS >= 0
    target = inputs.targets[LOGITS][labelled]
    answers = [inputs.student.logits, *(head(inputs.student) for head in heads)]
    expected = sum(ofa_loss(one[labelled], target, LABELS[labelled]) for one in answers)
    assert [head.block for head in heads] == [0, 2]
    assert objectives(inputs)["ofa"].item() == pytest.approx(expected.item())
    expected.backward()
    assert [block.grad is not None for block in inputs.student.blocks] == [True, False, True]


@pytest.mark.parametrize("name", ["dkd", "nkd", "ofa"])
def test_of_an_image_without_a_label_the_reference_names_the_class_if_it_is_asked(name):
    objectives = build({name: {"unlabelled": "teacher"}})
    inputs = random_inputs(objectives)
    named = torch.where(LABELS >= 0, LABELS, inputs.targets[LOGITS].argmax(dim=1))
    assert not torch.equal(named, LABELS)
    asked = objectives(inputs)[name].item()
    told = objectives(random_inputs(objectives, labels=named))[name].item()
    skipped = build({name: {}})(inputs)[name].item()
    assert asked == pytest.approx(told)
    assert asked != pytest.approx(skipped)


def test_dkd_grows_to_its_weight_over_its_warm_up():
    whole, growing = build({"dkd": {}}), build({"dkd": {"warmup_steps": 12}})
    inputs = random_inputs(whole)  # step 5: the sixth
    assert growing(inputs)["dkd"].item() == pytest.approx(whole(inputs)["dkd"].item() / 2)


@pytest.mark.parametrize("name", ["standardised_kd", "dist", "dkd", "nkd", "ofa", "generalized_distillation", "dho"])
def test_a_student_that_says_nothing_yet_gets_a_gradient_of_ordinary_size(name):
    """A student begins with logits of 0, and Adam remembers a first gradient of 1e8 for thousands of steps."""
    objectives = build({name: {}})
    inputs = random_inputs(objectives)
    with torch.no_grad():
        inputs.student.logits.zero_()
    torch.stack(list(objectives(inputs).values())).sum().backward()
    norm = inputs.student.logits.grad.norm().item()
    assert 0 < norm < 100


@pytest.mark.parametrize("name", ["standardised_kd", "dist", "dkd", "nkd", "ofa"])
def test_what_needs_classes_that_exclude_one_another_is_refused_where_an_image_has_several(name):
    several = Parties(PARTIES.student, PARTIES.reference, is_multi_label=True)
    with pytest.raises(SpecError, match=f"`{name}` .* may have several") as refusal:
        build({name: {}}, several)
    assert "kd" in refusal.value.hint


def test_of_two_classes_standardised_kd_is_refused_since_every_answer_would_be_one_of_two():
    two = Parties(ModelOutline({}, (), 2), ModelOutline({}, (), 2))
    with pytest.raises(SpecError, match="2 classes"):
        build({"standardised_kd": {}}, two)


def test_of_several_labels_generalized_distillation_asks_class_by_class():
    found = generalized_distillation_loss(STUDENT, TEACHER, 2.0, is_multi_label=True)
    p, q = (TEACHER / 2).sigmoid(), STUDENT.sigmoid()
    expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("loss", [dist_loss, lambda s, t: dkd_loss(s, t, CLASSES), lambda s, t: kd_loss(s, t, 1.0)])
def test_logits_of_another_number_of_classes_are_refused(loss):
    with pytest.raises(ValueError, match="shape"):
        loss(STUDENT, TEACHER[:, :1])


def test_a_stage_that_the_student_has_not_is_refused():
    with pytest.raises(SpecError, match="student has no block `9`"):
        build({"ofa": {"layers": [9]}}, Parties(PARTIES.student, ModelOutline({}, (), 7)))


def test_transfer_images_from_which_nothing_is_learned_are_refused(tmp_path):
    run = {"kind": "student", "preset": "embedded", "store": "s", "images": "i", "output": "o", "teacher": "t"}
    for settings, is_refused in (({}, True), ({"unlabelled": "teacher"}, False)):
        fields = {**run, "objective": {"ce": {}, "dkd": settings}}
        if is_refused:
            with pytest.raises(SpecError, match="unlabelled: teacher"):
                resolve_run(fields, base=tmp_path, where="run.yaml")
        else:
            assert resolve_run(fields, base=tmp_path, where="run.yaml").roles.transfer == ("transfer",)
