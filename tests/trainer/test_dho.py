"""DHO: two heads that learn apart, and one classifier that is their mixture."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification

from dla_cache.errors import SpecError
from tests.trainer.parties import LABELS, PARTIES, STUDENT, build, random_inputs
from trainer.checkpoint import load_checkpoint
from trainer.features import LOGITS, Features
from trainer.objectives import ObjectiveInputs, Parties
from trainer.run import train_run

ALPHA, LABELLED = 0.3, LABELS >= 0
FIELDS = {"dho": {"alpha": ALPHA, "labels": 2.0, "temperature": 3.0}}


def test_each_head_has_its_own_loss_and_the_student_s_logits_are_their_mixture():
    objectives = build(FIELDS)
    inputs = random_inputs(objectives)
    of_labels = objectives.terms["dho"].label_head(inputs.student)
    of_reference = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    mixture = ALPHA * of_labels + (1 - ALPHA) * of_reference
    terms = objectives(
        ObjectiveInputs(Features(mixture, inputs.student.blocks, inputs.student.spans), LABELS, inputs.targets)
    )
    ce = -functional.log_softmax(of_labels, dim=1)[LABELLED].gather(1, LABELS[LABELLED, None]).mean()
    p_t = (inputs.targets[LOGITS] / 3).softmax(dim=1)
    kd = 9 * (p_t * (p_t.log() - functional.log_softmax(of_reference / 3, dim=1))).sum(dim=1).mean()
    assert list(terms) == ["dho.ce", "dho.kd"]
    assert terms["dho.ce"].item() == pytest.approx(2 * ce.item(), rel=1e-5)
    assert terms["dho.kd"].item() == pytest.approx(kd.item(), rel=1e-4)


def test_labels_teach_the_trunk_and_not_the_student_s_classifier():
    objectives = build(FIELDS)
    inputs = random_inputs(objectives)
    objectives(inputs)["dho.ce"].backward()
    assert inputs.student.logits.grad is None
    assert inputs.student.blocks[-1].grad.abs().sum() > 0


def test_two_heads_learn_labels_and_a_reference_that_contradicts_them_where_one_head_cannot():
    blocks = tuple(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    labels = torch.arange(6)
    contradicting = 4 * functional.one_hot(labels.roll(1), 7).float()
    losses = {}
    for name, fields in {"two": {"dho": {}}, "one": {"ce": {"weight": 1}, "kd": {"weight": 1}}}.items():
        objectives = build(fields)
        classifier = torch.nn.Linear(8, 7)
        optimizer = torch.optim.Adam([*objectives.parameters(), *classifier.parameters()], lr=0.1)
        for _ in range(120):
            student = Features(classifier(blocks[-1][:, 0]), blocks, {"cls": slice(0, 1), "image": slice(1, None)})
            terms = objectives(ObjectiveInputs(student, labels, {LOGITS: contradicting}))
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["two"] < 0.1
    assert losses["one"] > 1


def test_a_batch_without_labels_has_the_reference_s_part_alone():
    objectives = build(FIELDS)
    assert list(objectives(random_inputs(objectives, labels=torch.full((6,), -1)))) == ["dho.kd"]


def test_several_labels_an_image_are_refused():
    with pytest.raises(SpecError, match="`dho` mixes two answers"):
        build({"dho": {}}, Parties(STUDENT, PARTIES.reference, is_multi_label=True))


def test_the_student_ships_with_one_classifier(tiny, tmp_path):
    train_run(tiny.run("probe", tmp_path / "probe"))
    result = train_run(tiny.run("student", tmp_path / "run", teacher=tmp_path / "probe", objective={"dho": {}}))
    trained = load_checkpoint(tmp_path / "run" / "best.safetensors")[0]
    shipped = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student").state_dict()
    assert set(result.gradient_shares) == {"dho.ce", "dho.kd"}
    assert any(name.startswith("objectives.terms.dho.label_head.") for name in trained)
    assert {name for name in shipped if "classifier" in name} == {"classifier.weight", "classifier.bias"}
