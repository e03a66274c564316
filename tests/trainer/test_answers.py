"""What a run answered to each test image is kept beside its result; a run without a test role reads none."""

import json

import pytest

from dla_cache.errors import CheckpointError
from dla_cache.store import open_store
from tests.several_labels import build_several
from trainer.answers import read_answers
from trainer.run import train_run
from trainer.run_folder import held_out, read_result


def test_the_answers_are_those_of_the_test_score_in_the_order_of_the_store(tiny, tmp_path):
    result = train_run(tiny.run("probe", tmp_path / "run"))
    answers, rows = read_answers(tmp_path / "run"), open_store(tiny.store).rows
    of_test = [row for row in rows if row.split == "test"]
    assert answers.image_ids == tuple(row.image_id for row in of_test)
    assert answers.labels == tuple(str(row.label) for row in of_test)
    assert sum(answers.hits()) / len(of_test) == result.test_score


def test_a_run_without_a_test_role_reads_no_test_image_and_says_so(tiny, tmp_path):
    tested = train_run(tiny.run("probe", tmp_path / "tested"))
    result = train_run(tiny.run("probe", tmp_path / "run", roles={"test": []}))
    assert (result.test_score, result.test_low, result.test_high, result.test_images) == (None, None, None, 0)
    assert (result.branches, result.branch_intervals) == ({}, {})
    assert result.validation_score == tested.validation_score
    assert not (tmp_path / "run" / "test.csv").exists()
    with pytest.raises(CheckpointError, match="has no test score") as refused:
        held_out(read_result(tmp_path / "run"), "run")
    assert "dla evaluate" in refused.value.hint


def test_of_several_classes_the_answer_is_a_logit_each_and_the_label_a_list(tiny, tmp_path):
    store = build_several(tiny, tmp_path)
    train_run(tiny.run("probe", tmp_path / "run", store=str(store), allow_empty_classes=True))
    answers = read_answers(tmp_path / "run")
    classes = [list(row.label) for row in open_store(store).rows if row.split == "test"]
    assert [json.loads(label) for label in answers.labels] == classes
    assert [len(json.loads(answer)) for answer in answers.predictions] == [3] * len(classes)


@pytest.mark.parametrize("damage", ["", "image_id,label\na,1\n", "image_id,label,prediction\na,1\n"])
def test_a_damaged_table_of_answers_is_named(tmp_path, damage):
    (tmp_path / "test.csv").write_text(damage)
    with pytest.raises(CheckpointError, match=r"test\.csv"):
        read_answers(tmp_path)
