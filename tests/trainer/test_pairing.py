"""Runs of one seed are paired: the same first weights, the same images in the same order, the same views."""

import pytest
import torch

from trainer.run import train_run
from trainer.tasks import StudentTask

OBJECTIVES = {
    "ce": {"ce": {}},
    "kd": {"ce": {}, "kd": {}},
    "messy": {"ce": {}, "kd": {}, "messy": {"layers": [[0, 0], [1, 1]], "hidden": 8}},
    "messy alone": {"messy": {"layers": [[1, 1]], "hidden": 4}},
}
DROPOUT = {"patch_size": 4, "width": 16, "depth": 2, "n_heads": 2, "position_std": 0.5, "dropout": 0.3}


@pytest.fixture(scope="module")
def teachers(tiny, tmp_path_factory):
    """Run folders of a teacher and a probe."""
    folder = tmp_path_factory.mktemp("teachers")
    for kind in ("teacher", "probe"):
        train_run(tiny.run(kind, folder / kind))
    return folder


@pytest.fixture
def seen(tiny, tmp_path, monkeypatch):
    """`seen(**fields)`: the first weights of a student's run of seed 5, and the images and pixels of its steps."""

    def look(**fields):
        name = f"run-{len(list(tmp_path.iterdir()))}"
        batches, first = [], {}
        losses = StudentTask.losses

        def watched(task, batch):
            if not first:
                first.update({key: value.clone() for key, value in task.student.state_dict().items()})
            batches.append((batch.image_ids, batch.pixels.clone()))
            return losses(task, batch)

        with monkeypatch.context() as patched:
            patched.setattr(StudentTask, "losses", watched)
            train_run(tiny.run("student", tmp_path / name, seed=5, model=DROPOUT, **fields))
        return first, batches

    return look


def assert_same(one, other):
    (weights, batches), (other_weights, other_batches) = one, other
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    for (ids, pixels), (other_ids, other_pixels) in zip(batches, other_batches, strict=True):
        assert ids == other_ids
        assert torch.equal(pixels, other_pixels)


@pytest.mark.parametrize("objective", ["messy", "messy alone"])
def test_students_of_one_seed_are_paired_whatever_they_learn(objective, teachers, seen):
    def taught(name):
        return seen(teacher=teachers / "teacher", objective=OBJECTIVES[name])

    assert_same(taught("kd"), taught(objective))


def test_students_of_one_seed_are_paired_whomever_they_learn_from(teachers, seen):
    by_teacher, by_probe = (seen(teacher=teachers / name, objective=OBJECTIVES["kd"]) for name in ("teacher", "probe"))
    assert_same(by_teacher, by_probe)


def test_a_student_of_labels_alone_begins_with_the_weights_and_sees_the_labelled_images_of_one_that_distils(
    teachers, seen
):
    (weights, batches), (taught_weights, taught) = (
        seen(objective=OBJECTIVES["ce"]),
        seen(teacher=teachers / "teacher", objective=OBJECTIVES["kd"]),
    )
    assert all(torch.equal(value, taught_weights[name]) for name, value in weights.items())
    for (ids, pixels), (taught_ids, taught_pixels) in zip(batches, taught, strict=True):
        assert ids == taught_ids[: len(ids)]
        assert torch.equal(pixels, taught_pixels[: len(ids)])


def test_the_dropout_of_a_student_does_not_depend_on_the_heads_beside_it(tiny, teachers, tmp_path):
    """The first step's loss of the labels is that of another objective to the bit."""
    told = {}
    losses = StudentTask.losses
    for name in ("ce", "messy"):
        fields = {"teacher": teachers / "teacher"} if name == "messy" else {}
        fields |= {"roles": {"transfer": []}, "transfer_per_batch": 0}

        def watched(task, batch, name=name):
            found = losses(task, batch)
            told.setdefault(name, float(found.terms["ce"].detach()))
            return found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StudentTask, "losses", watched)
            objective = OBJECTIVES[name] | {"ce": {"weight": 0.25}}
            train_run(tiny.run("student", tmp_path / name, seed=5, model=DROPOUT, objective=objective, **fields))
    assert told["ce"] == told["messy"]
