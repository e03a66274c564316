"""Images with any number of classes: each class is a question of its own, from the store to the student."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import AutoModelForImageClassification

from dla_cache.errors import RecipeMismatchError, SpecError
from dla_cache.manifest import write_manifest
from dla_cache.pairs import PairStream
from dla_cache.store import open_store
from tests.several_labels import SEVERAL, build_several
from trainer.batch import Batch
from trainer.config import SelfTraining
from trainer.evaluate import Predictions
from trainer.measure import measure_run
from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.kd import kd_loss
from trainer.reference import FrozenClassifier
from trainer.run import build_task, load_run, train_run
from trainer.run_folder import read_result
from trainer.tasks import self_training_terms

LOGITS = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-4.0, 0.0]])


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A probe that trains itself, a teacher, and a student of it by all objectives, on images of several labels."""
    folder = tmp_path_factory.mktemp("several")
    store = str(build_several(tiny, folder))
    transfer = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4, "self_training": {"confidence": 0.6}}
    train_run(tiny.run("probe", folder / "probe", allow_empty_classes=True, store=store, **transfer))
    train_run(tiny.run("teacher", folder / "teacher", allow_empty_classes=True, store=store))
    fields = {"teacher": folder / "teacher", "objective": tiny.objectives["messy"], "store": store}
    train_run(tiny.run("student", folder / "student", allow_empty_classes=True, **fields))
    return folder


def test_cross_entropy_is_the_mean_over_labelled_images_and_classes():
    labels = torch.tensor([[1, 0], [-1, -1], [0, 1]])
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(-4)), math.log(2)]
    assert cross_entropy(LOGITS, labels).item() == pytest.approx(sum(expected) / 4)
    assert cross_entropy(LOGITS, torch.full((3, 2), -1)) is None


def test_one_of_two_classes_costs_what_a_yes_or_no_costs():
    difference = LOGITS[:, :1] - LOGITS[:, 1:]
    labels = torch.tensor([0, 1, 1])
    one, several = cross_entropy(LOGITS, labels), cross_entropy(difference, 1 - labels[:, None])
    torch.testing.assert_close(one, several)
    student, teacher = torch.randn(2, 5, 2).unbind()
    of_yes_or_no = [logits[:, :1] - logits[:, 1:] for logits in (student, teacher)]
    torch.testing.assert_close(kd_loss(*of_yes_or_no, 2.0, is_multi_label=True), kd_loss(student, teacher, 2.0))


def test_distillation_of_classes_is_their_mean_one_by_one():
    student, teacher = torch.randn(2, 4, 3).unbind()
    each = [kd_loss(student[:, k : k + 1], teacher[:, k : k + 1], 3.0, is_multi_label=True) for k in range(3)]
    torch.testing.assert_close(kd_loss(student, teacher, 3.0, is_multi_label=True), torch.stack(each).mean())
    assert kd_loss(teacher, teacher, 3.0, is_multi_label=True).item() == pytest.approx(0, abs=1e-6)


def test_self_training_takes_a_sure_no_for_an_answer_and_an_unsure_class_for_none():
    answers = torch.tensor([[3.0, 0.1], [-3.0, -0.2], [9.0, 9.0]])
    labels = torch.tensor([[-1, -1], [-1, -1], [0, 1]])
    batch = Batch(("a", "b", "c"), torch.zeros(3, 3, 2, 2), {}, labels)
    terms = self_training_terms({"probe": LOGITS}, answers, batch, SelfTraining(confidence=0.9, weight=2.0))
    # Class 0 of the first is taken for there, of the second for not there; four questions are unlabelled.
    expected = 2 / 4 * (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5)))
    assert {name: value.item() for name, value in terms.items()} == {"self_probe": pytest.approx(expected)}


def test_pairs_have_a_one_for_each_class_and_less_than_nothing_without_a_label(tiny, runs):
    store = open_store(runs / "several.zarr")
    (batch,) = PairStream(
        store, tiny.images, ["labelled", "transfer"], 99, seed=0, decode=lambda *_: torch.zeros(3, 1, 1).numpy()
    ).epoch_once()
    assert batch.labels.shape == (14, 3)
    of_tiny = {row.image_id: row.label for row in tiny.manifest.rows()}
    for image_id, row in zip(batch.image_ids, batch.labels.tolist(), strict=True):
        label = SEVERAL[of_tiny[image_id]]
        assert row == ([-1] * 3 if label is None else [int(k in label) for k in range(3)])


def test_every_kind_of_run_is_measured_by_mean_average_precision(tiny, runs):
    store = open_store(runs / "several.zarr")
    for kind in ("probe", "teacher", "student"):
        result, run = read_result(runs / kind), load_run(runs / kind)
        measured = measure_run(run, store, tiny.images, ["test"], where="here")
        assert (result.metric, measured.predictions.metric) == ("mAP", "mAP")
        assert measured.predictions.score().value == result.test_score
        assert result.test_low <= result.test_score <= result.test_high
        assert all(score.n == 4 for score in measured.subsets.values())


def test_a_student_distils_class_by_class(tiny, runs):
    run, target = load_run(runs / "student"), load_run(runs / "teacher")
    task = build_task(run.config, run.facts, FrozenClassifier(target.task))
    batch = Batch(
        ("a", "b"), torch.randn(2, 3, 8, 8), {"depth": torch.randn(2, 2, 2, 2)}, torch.tensor([[0, 1, 1]] * 2)
    )
    torch.nn.init.normal_(task.student.classifier.weight)
    task.module.eval()
    terms = task.losses(batch).terms
    teacher = target.task.module(batch.pixels, batch.latents).logits
    student = task.student(batch.pixels).logits
    torch.testing.assert_close(terms["kd"], 0.75 * kd_loss(student, teacher, 2.0, is_multi_label=True))
    torch.testing.assert_close(terms["ce"], 0.25 * cross_entropy(student, batch.labels))


def test_the_teachers_answer_is_what_both_branches_say_of_a_class(tiny, runs):
    run = load_run(runs / "teacher")
    pixels, latents = torch.randn(2, 3, 8, 8), {"depth": torch.randn(2, 2, 2, 2)}
    output = run.task.module(pixels, latents)
    yes, no = (
        torch.stack([(sign * logits).sigmoid().log() for logits in output.branch_logits.values()]).mean(dim=0).exp()
        for sign in (1, -1)
    )
    torch.testing.assert_close(output.logits.sigmoid(), yes / (yes + no))


def test_the_student_tells_transformers_that_its_classes_do_not_exclude_each_other(runs):
    model = AutoModelForImageClassification.from_pretrained(runs / "student" / "student")
    assert model.config.problem_type == "multi_label_classification"
    labels, pixels = torch.tensor([[1.0, 0.0, 1.0]]), torch.randn(1, 3, 8, 8)
    output = model(pixel_values=pixels, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels.long()))


def test_labels_of_one_kind_and_runs_of_the_other_do_not_mix(tiny, runs, tmp_path):
    fields = {"teacher": runs / "teacher", "objective": tiny.objectives["kd"]}
    with pytest.raises(RecipeMismatchError, match="one has one class an image, the other several"):
        train_run(tiny.run("student", tmp_path / "student", allow_empty_classes=True, **fields))
    with pytest.raises(RecipeMismatchError, match=r"has one class an image, .* on several labels"):
        measure_run(load_run(runs / "probe"), open_store(tiny.store), tiny.images, ["test"], where="there")


def test_a_split_in_which_no_image_has_a_class_cannot_be_measured(tiny, tmp_path):
    def without_classes(label, split):
        return label if label is None or split != "validation" else ()

    store = build_several(tiny, tmp_path, without_classes)
    with pytest.raises(SpecError, match=r"no image of `roles.validation` has any of the classes"):
        train_run(tiny.run("probe", tmp_path / "run", allow_empty_classes=True, store=str(store)))


def test_one_class_is_a_question_where_images_may_have_several_and_none_where_they_have_one(tiny, tmp_path):
    rows = [replace(row, label=None if row.label is None else (0,) * (row.label == 0)) for row in tiny.manifest.rows()]
    manifest = write_manifest(tiny.manifest.root / "red.parquet", rows, ["red"])
    result = train_run(
        tiny.run(
            "teacher",
            tmp_path / "red",
            allow_empty_classes=True,
            store=str(tiny.build(manifest, tmp_path / "red.zarr")),
        )
    )
    assert result.metric == "mAP"
    rows = [replace(row, label=row.label if row.label is None else 0) for row in tiny.manifest.rows()]
    manifest = write_manifest(tiny.manifest.root / "all-red.parquet", rows, ["red"])
    store = str(tiny.build(manifest, tmp_path / "all-red.zarr"))
    with pytest.raises(SpecError, match="the store has 1 classes"):
        train_run(tiny.run("probe", tmp_path / "all-red", allow_empty_classes=True, store=store))


def test_what_cannot_be_ranked_cannot_be_measured(tiny, runs, tmp_path):
    store = build_several(tiny, tmp_path, lambda label, split: label if split != "test" or label is None else ())
    with pytest.raises(SpecError, match="no image of `test` has any of the classes"):
        measure_run(load_run(runs / "student"), open_store(store), tiny.images, ["test"], where="there")


def test_log_loss_and_probabilities_are_of_each_class():
    predictions = Predictions(("a", "b"), torch.tensor([[1, 0], [0, 0]]), LOGITS[:2])
    expected = LOGITS[:2].double().sigmoid()
    torch.testing.assert_close(predictions.probabilities, expected)
    chosen = [expected[i, k] if (i, k) == (0, 0) else 1 - expected[i, k] for i, k in product(range(2), repeat=2)]
    assert predictions.log_loss() == pytest.approx(-torch.stack(chosen).log().mean().item())
