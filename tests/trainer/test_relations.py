"""RKD, SP and PKT: golden values, their equations written once more with loops, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dla_cache.errors import SpecError
from tests.trainer.parties import PARTIES, STUDENT, build, random_inputs
from trainer.features import Features, Target
from trainer.objectives import ModelOutline, ObjectiveInputs, Parties
from trainer.objectives.relations import pkt_loss, rkd_loss, sp_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())
B = 4
LOSSES = {"rkd": rkd_loss, "sp": sp_loss, "pkt": pkt_loss}


def golden_features():
    i, d = np.arange(1, 5)[:, None], np.arange(1, 9)[None]
    return np.sin(0.3 * i * d), np.cos(0.2 * i * (d + 1))


F_S, F_T = golden_features()


def found(loss, **options):
    return float(loss(torch.from_numpy(F_S), torch.from_numpy(F_T[:, :6]), **options))


def huber(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_rkd_has_its_golden_value():
    """Distances over the mean of those that are not 0; the Huber mean runs over the diagonal, too: without it .762."""
    student, teacher = torch.from_numpy(F_S), torch.from_numpy(F_T)
    assert float(rkd_loss(student, teacher)) == pytest.approx(GOLDEN["values"]["RKD 25/50"], abs=1e-6)


def test_pkt_has_its_golden_value():
    student, teacher = torch.from_numpy(F_S), torch.from_numpy(F_T)
    assert float(pkt_loss(student, teacher)) == pytest.approx(GOLDEN["values"]["PKT (unweighted)"], abs=1e-6)


def test_rkd_compares_distances_over_their_mean_and_the_angle_at_each_image_between_two_others():
    def relations(f):
        distances = [[float(np.linalg.norm(f[i] - f[j])) for j in range(B)] for i in range(B)]
        mean = sum(map(sum, distances)) / (B * (B - 1))
        angles = {
            (i, j, k): 0.0 if i in (j, k) else cosine(f[j] - f[i], f[k] - f[i])
            for i in range(B)
            for j in range(B)
            for k in range(B)
        }
        return [[value / mean for value in row] for row in distances], angles

    (d_s, a_s), (d_t, a_t) = relations(F_S), relations(F_T[:, :6])
    of_distances = sum(huber(d_s[i][j] - d_t[i][j]) for i in range(B) for j in range(B)) / B**2
    of_angles = sum(huber(a_s[key] - a_t[key]) for key in a_s) / B**3
    assert found(rkd_loss, distance=2, angle=3) == pytest.approx(2 * of_distances + 3 * of_angles, rel=1e-9)


def test_sp_compares_rows_of_gram_matrices():
    def rows(f):
        return [[float(f[i] @ f[j]) / math.hypot(*(f[i] @ f[k] for k in range(B))) for j in range(B)] for i in range(B)]

    g_s, g_t = rows(F_S), rows(F_T[:, :6])
    expected = sum((g_s[i][j] - g_t[i][j]) ** 2 for i in range(B) for j in range(B)) / B**2
    assert found(sp_loss) == pytest.approx(expected, rel=1e-9)


def test_pkt_compares_cosines_as_probabilities():
    def rows(f):
        similar = [[(cosine(f[i], f[j]) + 1) / 2 for j in range(B)] for i in range(B)]
        return [[value / sum(row) for value in row] for row in similar]

    p_s, p_t = rows(F_S), rows(F_T[:, :6])
    expected = sum(p_t[i][j] * math.log(p_t[i][j] / p_s[i][j]) for i in range(B) for j in range(B)) / B**2
    assert found(pkt_loss) == pytest.approx(expected, rel=1e-4)  # the published eps in the logarithm


@pytest.mark.parametrize(("name", "blind_to_offset"), [("rkd", True), ("sp", False), ("pkt", False)])
def test_relations_do_not_see_scale_or_rotation_and_rkd_no_offset(name, blind_to_offset):
    student, teacher = torch.from_numpy(F_S), torch.from_numpy(F_T)
    expected = pytest.approx(float(LOSSES[name](student, teacher)), rel=1e-6)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert float(LOSSES[name](5 * student @ turned, 0.3 * teacher)) == expected
    assert (float(LOSSES[name](student + 1, teacher)) == expected) == blind_to_offset


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_student_with_the_relations_of_its_reference_has_no_loss(loss):
    teacher = torch.from_numpy(F_T)
    assert float(loss(teacher.clone(), teacher)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("features", [torch.ones(5, 3), torch.zeros(5, 3)], ids=["equal", "nothing"])
def test_features_that_are_all_equal_have_a_finite_gradient(loss, features):
    features = features.clone().requires_grad_()
    value = loss(features, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()


def test_two_equal_images_among_others_leave_relations_finite():
    features = torch.from_numpy(F_S)[[0, 1, 1, 2, 3]].clone().requires_grad_()
    for loss in LOSSES.values():
        loss(features, torch.from_numpy(F_T)[[0, 1, 2, 3, 3]]).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_pair_says_which_blocks_and_what_of_them(name):
    objectives = build({name: {"pair": {"student": 1, "teacher": 0, "span": "audio", "read": "pooled"}}})
    inputs = random_inputs(objectives)
    (target,) = objectives.targets
    assert target == Target("pooled", "audio", 0)
    expected = LOSSES[name](inputs.student.blocks[1][:, 1:].mean(dim=1), inputs.targets[target])
    weight = getattr(objectives.config, name).weight
    assert objectives(inputs)[name].item() == pytest.approx(weight * expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_one_image_alone_has_no_relations(name):
    objectives = build({name: {}})
    inputs = random_inputs(objectives)
    student = Features(inputs.student.logits[:1], tuple(one[:1] for one in inputs.student.blocks), inputs.student.spans)
    alone = ObjectiveInputs(student, targets={key: value[:1] for key, value in inputs.targets.items()})
    with pytest.raises(SpecError, match=f"`{name}` compares images") as refusal:
        objectives(alone)
    assert "2 or more" in refusal.value.hint


@pytest.mark.parametrize("name", LOSSES)
def test_a_probe_has_no_features_to_relate(name):
    with pytest.raises(SpecError, match=f"`{name}` compares blocks"):
        build({name: {}}, Parties(STUDENT, ModelOutline({}, (), 7)))


def test_several_labels_an_image_are_nothing_to_relations():
    several = Parties(PARTIES.student, PARTIES.reference, is_multi_label=True)
    objectives = build({name: {} for name in LOSSES}, several)
    assert set(objectives(random_inputs(objectives))) == set(LOSSES)
