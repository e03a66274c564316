"""Several objectives in one student: trained to its end, from a model at hand and from stored targets."""

import json
from pathlib import Path

import pytest
import torch

from dla_cache.errors import SpecError
from tests.trainer.students import FAMILIES, make_student, some_pixels
from trainer.batch import Batch
from trainer.features import LOGITS
from trainer.objectives import ModelOutline, ObjectiveConfig
from trainer.run import train_run
from trainer.stored_targets import open_targets
from trainer.target_store import make_targets
from trainer.targets import resolve_targets
from trainer.tasks import StudentTask

VIEW = {"scale_min": 0.5, "horizontal_flip": True, "count": 2, "seed": 7}
COMBINED = {"ce": {}, "kd": {}, "dist": {}, "rkd": {"pair": {"student": 0, "span": "depth"}}}
LOOP = {"steps": 6, "evaluate_steps": 1, "learning_rate": 0.01}
LABELLED_AND_NOT = {"loop": LOOP, "roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4, "view": VIEW}


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    train_run(tiny.run("teacher", folder))
    return folder


@pytest.fixture(scope="module")
def stored(tiny, teacher, tmp_path_factory):
    """What the combined objectives need of the teacher, in float32."""
    folder = tmp_path_factory.mktemp("targets") / "targets.zarr"
    places = {"store": tiny.store, "images": tiny.images, "teacher": teacher, "output": folder}
    value = {
        "kind": "targets",
        "splits": ["labelled", "transfer"],
        "view": VIEW,
        "objective": COMBINED,
        "shard_size": 6,
        "batch_size": 3,
        "dtype": "float32",
        **{name: str(place) for name, place in places.items()},
    }
    make_targets(resolve_targets(value, base=Path(), where="test"))
    return folder


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stored_targets_hold_what_the_objectives_need_and_nothing_else(stored):
    assert {str(target) for target in open_targets(stored).layout.shapes} == {"logits", "pooled/depth/1"}


def test_a_sum_of_four_objectives_trains_alike_from_the_teacher_and_from_stored_targets(
    tiny, teacher, stored, tmp_path
):
    train_run(tiny.run("student", tmp_path / "online", teacher=teacher, objective=COMBINED, **LABELLED_AND_NOT))
    train_run(tiny.run("student", tmp_path / "stored", targets=str(stored), objective=COMBINED, **LABELLED_AND_NOT))
    online, from_store = records_of(tmp_path / "online"), records_of(tmp_path / "stored")
    assert len(online) == len(from_store) == 6
    for record in online + from_store:
        assert set(record["losses"]) == {*COMBINED, "total"}
        assert all(share > 0 for share in record["gradient_shares"].values())
    # Later on Adam makes steps of the rounding of what no relation depends on, as a bias.
    assert online[0]["losses"] == pytest.approx(from_store[0]["losses"], rel=1e-5)


def test_an_objective_that_needs_more_than_is_stored_is_refused(tiny, stored, tmp_path):
    more = {**COMBINED, "sp": {}}
    with pytest.raises(SpecError, match="does not hold `pooled/cls/1`"):
        train_run(tiny.run("student", tmp_path / "run", targets=str(stored), objective=more, **LABELLED_AND_NOT))


def test_images_mixed_of_two_are_refused_by_an_objective_that_asks_for_one_class(tiny, teacher, tmp_path):
    run = tiny.run(
        "student",
        tmp_path / "run",
        teacher=teacher,
        objective={"ce": {}, "dkd": {}, "kd": {}},
        mixing={},
        **LABELLED_AND_NOT,
    )
    with pytest.raises(SpecError, match="`dkd` asks for the class of an image"):
        train_run(run)


class AnyReference:
    """Of two blocks without a class token, that says random numbers."""

    outline = ModelOutline({"a": 6, "b": 5}, ("image", "depth"), 3)

    def targets(self, batch, wanted):
        generator = torch.Generator().manual_seed(0)
        return {
            one: torch.randn(len(batch), 3 if one == LOGITS else self.outline.width(one.block), generator=generator)
            for one in wanted
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_students_learns_by_stages_and_relations(family):
    fields = {"ofa": {}, "dho": {}, "rkd": {"pair": {"span": "depth"}}, "sp": {"pair": {"student": 0}}, "pkt": {}}
    task = StudentTask(make_student(family), ObjectiveConfig.model_validate(fields), AnyReference())
    batch = Batch(tuple("abcd"), some_pixels(4), {}, torch.tensor([0, 1, 2, -1]))
    losses = task.losses(batch)
    losses.total.backward()
    assert set(losses.terms) == {"ofa", "dho.ce", "dho.kd", "rkd", "sp", "pkt"}
    assert all(parameter.grad is not None for parameter in task.objectives.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in task.student.parameters()) > 0
