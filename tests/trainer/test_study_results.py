"""What a study is said to have found is what is in its runs: differences that are there, and none that are not."""

import csv

import numpy as np
import pytest

from dla_cache.errors import StudyError
from tests.trainer.made_study import SPEC, write_lines, write_study
from trainer.stats import crossed_mean, holm
from trainer.study_results import analyse
from trainer.study_table import read_study

TRUTH = {"image-only": 0.6, "teacher": 0.9, "kd": 0.8, "messy": 0.8}
CONTROLS = """\
stores: {within: {control: shuffled-within-class}}
arms:
  image-only: {run: {kind: student}}
  teacher: {run: {kind: teacher}, role: teacher}
  teacher-within: {like: teacher, store: within, role: teacher}
  sound: {run: {kind: teacher}, role: teacher, note: "label-informed: paired by class"}
  kd: {learns_from: teacher, run: {kind: student}}
  messy: {learns_from: teacher, run: {kind: student}, tune: {loop.steps: {values: [1, 2, 4]}}}
  messy-within: {like: messy, learns_from: teacher-within, seeds: 4}
  kd-sound: {learns_from: sound, run: {kind: student}, seeds: 4, exploratory: true}
seeds: 6
teacher_seeds: 3
tuning: {trials: 3, seeds: 2}
comparisons: [[messy, kd], [kd, image-only]]
"""
CONTROLS_SPEC = f"name: made\nquestion: what?\nstore: cache.zarr\n{CONTROLS}"
CONTROLS_TRUTH = {**TRUTH, "teacher-within": 0.7, "sound": 0.9, "messy-within": 0.7, "kd-sound": 0.9}


def results_of(folder, spec=SPEC, *, truth=TRUTH, partial=False, **fields):
    return analyse(read_study(write_study(folder, spec, truth=truth, **{"n_images": 400} | fields)), partial=partial)


def test_the_statistics_of_a_comparison_are_those_of_its_hits_image_by_image(tmp_path):
    results = results_of(tmp_path)
    pair, table = results.comparisons[0], results.table
    messy, kd = table.final("messy", None), table.final("kd", None)
    grid = 100 * np.array([[table.hits(messy[t, s]) - table.hits(kd[t, s]) for s in range(10)] for t in range(3)])
    assert (pair.first, pair.second, pair.teachers, pair.seeds) == ("messy", "kd", (0, 1, 2), tuple(range(10)))
    assert pair.estimate == crossed_mean(grid)
    assert pair.by_run == pytest.approx(grid.mean(axis=2))
    assert pair.on_these_images == crossed_mean(grid.mean(axis=2)).interval(0.95)
    ps = [one.p for one in results.comparisons]
    assert [one.evidence.p for one in results.comparisons] == holm(ps)


def test_an_arm_without_a_teacher_is_paired_by_its_seed_with_every_teacher_seed(tmp_path):
    results = results_of(tmp_path)
    pair, table = results.comparisons[1], results.table
    kd, plain = table.final("kd", None), table.final("image-only", None)
    assert pair.by_run[2, 7] == pytest.approx(100 * (kd[2, 7].test - plain[None, 7].test))
    assert len(results.arms[0].seeds) == 10
    assert results.arms[0].teachers == (None,)


def test_a_difference_of_twenty_points_is_found_and_one_of_none_is_not(tmp_path):
    said = [[pair.verdict for pair in results_of(tmp_path / str(seed), seed=seed).comparisons] for seed in range(5)]
    assert all(second.startswith("kd beats image-only by ") for _, second in said)
    assert sum("beats" in first for first, _ in said) <= 1


def test_runs_of_other_seeds_are_no_paired_comparison(tmp_path):
    with pytest.raises(StudyError, match="`messy` and `kd` are not a paired comparison: one alone has `teacher seed 1"):
        results_of(tmp_path, drop={("kd", 1, 3)})


def test_arms_with_other_shares_of_the_labels_are_no_paired_comparison(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    with (folder / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        line["label_fraction"] = 0.1 if line["arm"] == "kd" else 1.0
    write_lines(folder / "runs.csv", lines)
    with pytest.raises(StudyError, match=r"not a paired comparison: shares of the labels are 1 and 0\.1"):
        analyse(read_study(folder))
    assert analyse(read_study(folder), partial=True).comparisons == ()


def test_a_partial_report_compares_the_runs_that_both_have(tmp_path):
    results = results_of(tmp_path, drop={("kd", 1, 3), ("image-only", None, 9)}, partial=True)
    assert results.comparisons[0].seeds == (0, 1, 2, 4, 5, 6, 7, 8, 9)
    assert results.comparisons[1].seeds == (0, 1, 2, 4, 5, 6, 7, 8)
    assert results.missing == ("image-only, seed 9", "kd, teacher seed 1, seed 3")


def test_an_arm_that_is_not_there_at_all_is_left_out_of_a_partial_report(tmp_path):
    results = results_of(tmp_path, truth={name: TRUTH[name] for name in ("image-only", "teacher", "kd")}, partial=True)
    assert [(pair.first, pair.second) for pair in results.comparisons] == [("kd", "image-only")]
    assert len(results.missing) == 30


def test_what_was_not_planned_is_never_called_better(tmp_path):
    results = results_of(tmp_path, CONTROLS_SPEC, truth=CONTROLS_TRUTH)
    others = {(pair.first, pair.second): pair for pair in results.comparisons if not pair.is_planned}
    assert set(others) == {("messy", "messy-within"), ("messy-within", "kd"), ("kd-sound", "kd")}
    assert results.reference == "kd"
    assert all(pair.verdict.startswith("Exploratory: ") and "beats" not in pair.verdict for pair in others.values())
    assert others["messy", "messy-within"].seeds == (0, 1, 2, 3)
    assert others["messy", "messy-within"].estimate.mean == pytest.approx(10, abs=3)


def test_an_arm_whose_latents_saw_labels_is_marked_wherever_it_is_named(tmp_path):
    results = results_of(tmp_path, CONTROLS_SPEC, truth=CONTROLS_TRUTH)
    marked = {arm.name for arm in results.arms if "label-informed" in arm.label}
    assert marked == {"teacher-within", "messy-within", "sound", "kd-sound"}
    said = next(pair.verdict for pair in results.comparisons if pair.first == "kd-sound")
    assert "kd-sound (label-informed) minus kd" in said


def test_every_share_of_the_labels_is_compared_and_belongs_to_the_family(tmp_path):
    spec = SPEC.replace("seeds: 10", "seeds: 4\nlabel_fractions: [0.1, 1.0]")
    results = results_of(tmp_path, spec)
    assert [(pair.first, pair.fraction) for pair in results.comparisons] == [
        ("messy", 0.1), ("kd", 0.1), ("messy", 1.0), ("kd", 1.0)
    ]  # fmt: skip
    assert "with 10 % of the labels" in results.comparisons[1].verdict
    assert [one.evidence.p for one in results.comparisons] == holm([one.p for one in results.comparisons])


def test_one_seed_has_no_interval_and_settles_nothing(tmp_path):
    results = results_of(tmp_path, SPEC.replace("seeds: 10", "seeds: 1"))
    assert all("one seed" in pair.verdict for pair in results.comparisons)
    assert not results.arms[0].score.is_known


def test_tuning_says_what_was_tried_and_whether_the_best_is_inside(tmp_path):
    results = results_of(tmp_path)
    tuned = results.tuning[0]
    assert (tuned.name, tuned.n_trials, tuned.n_runs) == ("kd", 3, 6)
    assert tuned.tried == {"objective.kd.temperature": (1, 2, 4)}
    assert (tuned.chosen, tuned.at_edge, tuned.is_best) == ({"objective.kd.temperature": 2}, (), True)


def test_a_teacher_that_was_trained_for_tuning_alone_was_not_tuned(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    with (folder / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    taught = {"arm": "teacher", "stage": "tuning", "trial": 0, "seed": 1000, "settings": "{}"}
    write_lines(folder / "runs.csv", [lines[0] | taught, *lines])
    assert [tuned.name for tuned in analyse(read_study(folder)).tuning] == ["kd", "messy"]


def test_final_runs_with_other_settings_than_the_best_trial_are_noticed(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    with (folder / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    altered = [
        line | {"settings": '{"objective.kd.temperature":4}'}
        if (line["arm"], line["stage"]) == ("kd", "final")
        else line
        for line in lines
    ]
    write_lines(folder / "runs.csv", altered)
    tuned = analyse(read_study(folder)).tuning[0]
    assert (tuned.is_best, tuned.at_edge) == (False, ("objective.kd.temperature",))


def test_scores_that_are_known_by_run_alone_are_compared_all_the_same(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    with (folder / "runs.csv").open(newline="") as file:
        lines = [line | {"metric": "mAP", "test_hits": ""} for line in csv.DictReader(file)]
    write_lines(folder / "runs.csv", lines)
    results = analyse(read_study(folder))
    assert results.comparisons[1].verdict.startswith("kd beats image-only")
    assert results.comparisons[1].on_these_images == results.comparisons[1].estimate.interval(0.95)


def test_runs_that_agree_to_the_last_digit_show_nothing_where_nothing_is_known_by_image(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    scores = {"kd": "0.5", "messy": "0.5", "image-only": "0.25"}
    with (folder / "runs.csv").open(newline="") as file:
        lines = [line | {"metric": "mAP", "test_hits": ""} for line in csv.DictReader(file)]
    lines = [line | {"test": scores.get(line["arm"], line["test"]) if line["test"] else ""} for line in lines]
    write_lines(folder / "runs.csv", lines)
    said = [pair.verdict for pair in analyse(read_study(folder)).comparisons]
    assert said == [
        "Not settled: messy minus kd is +0.0 points in every run, which says nothing of training again.",
        "Not settled: kd minus image-only is +25.0 points in every run, which says nothing of training again.",
    ]


def test_who_looks_early_is_corrected_for_all_that_is_planned(tmp_path):
    truth = {name: TRUTH[name] for name in ("image-only", "teacher", "kd")}
    (pair,) = results_of(tmp_path, truth=truth, partial=True).comparisons
    assert pair.evidence.p / pair.p == pytest.approx(2)
