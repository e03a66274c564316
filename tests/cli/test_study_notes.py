"""What a study's page calls attention to before its numbers are believed."""

import csv

import pytest

from cli.study_notes import notes_of
from tests.trainer.made_study import write_lines, write_study
from trainer.study_results import analyse
from trainer.study_table import read_study


def heads(folder):
    return [head for head, _ in notes_of(analyse(read_study(folder)), None)]


@pytest.mark.parametrize(
    ("score", "told"),
    [(0.03, "Worse than guessing."), (0.1, "No better than guessing."), (0.6, None)],
)
def test_arms_of_which_none_learned_are_not_called_equal_without_a_word(tmp_path, score, told):
    write_study(tmp_path, truth=dict.fromkeys(("image-only", "teacher", "kd", "messy"), score))
    found = [head for head in heads(tmp_path) if "guessing" in head]
    assert found == ([told] if told else [])


@pytest.mark.parametrize(("validation", "is_noticed"), [(0.62, False), (0.8, True)])
def test_a_test_split_far_below_validation_in_every_arm_is_noticed(tmp_path, validation, is_noticed):
    write_study(tmp_path, truth=dict.fromkeys(("image-only", "teacher", "kd", "messy"), 0.6))
    with (tmp_path / "runs.csv").open() as file:
        lines = [{**line, "validation": validation} for line in csv.DictReader(file)]
    write_lines(tmp_path / "runs.csv", lines)
    assert ("Test lies far below validation." in heads(tmp_path)) == is_noticed


def test_no_arm_has_an_interval_beyond_what_a_score_can_be(tmp_path):
    write_study(tmp_path, truth=dict.fromkeys(("image-only", "teacher", "kd", "messy"), 0.97), n_images=40)
    students = [arm for arm in analyse(read_study(tmp_path)).arms if not arm.is_teacher]
    assert any(arm.score.interval(0.95)[1] > 100 for arm in students)
    assert all(arm.high <= 100 for arm in students)
