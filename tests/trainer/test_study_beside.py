"""Arms of a study that learn from several others at once."""

import pytest

from dla_cache.errors import SpecError
from tests.trainer.test_study_plan import all_runs
from tests.trainer.toy_study import ARMS, KD, make_plan, make_spec
from trainer.run import train_run
from trainer.study import StudyFolder, jobs_of
from trainer.study_pairs import is_label_informed
from trainer.study_records import upstream_seconds

PROBE = {"run": {"kind": "probe", "model": {"hidden": 8}}, "role": "teacher"}
BOTH = {"run": {"kind": "student", "objective": KD, **{k: v for k, v in ARMS["kd"]["run"].items() if k != "objective"}}}
BOTH |= {"learns_from": "teacher", "beside": ["probe"]}
MORE = {"probe": PROBE, "both": BOTH}


def runs_of(tiny, arm, **fields):
    runs = all_runs(make_plan(tiny, None, **{"more": MORE, **fields}))
    return [run for run in runs if (run.arm, run.stage) == (arm, "final")]


def test_a_run_of_several_arms_learns_from_the_same_seed_of_each(tiny):
    runs = runs_of(tiny, "both")
    assert [(run.teacher_seed, run.seed) for run in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for run in runs:
        assert [(one.arm, one.seed) for one in run.all_upstream] == [
            (n, run.teacher_seed) for n in ("teacher", "probe")
        ]
        assert run.config.teachers == {one.arm: one.config.output for one in run.all_upstream}
        assert list(run.config.teachers) == ["probe", "teacher"]
        assert run.config.teacher is None


def test_an_arm_is_label_informed_by_whichever_of_its_teachers_saw_labels(tiny):
    told = {"probe": {**PROBE, "note": "label-informed"}}
    ways = [("teacher", ["probe"]), ("probe", ["teacher"])]
    for above, beside in ways:
        both = {**BOTH, "learns_from": above, "beside": beside}
        assert is_label_informed(make_spec(tiny, more={**told, "both": both}), "both")
        assert not is_label_informed(make_spec(tiny, more={"probe": PROBE, "both": both}), "both")


def test_each_of_the_arms_beside_is_part_of_a_run_s_address_and_other_runs_keep_theirs(tiny):
    other = {"probe": {**PROBE, "run": {"kind": "probe", "model": {"hidden": 4}}}, "both": BOTH}
    assert {run.key for run in runs_of(tiny, "both")}.isdisjoint(run.key for run in runs_of(tiny, "both", more=other))
    assert [run.key for run in runs_of(tiny, "kd")] == [run.key for run in runs_of(tiny, "kd", more={})]


def test_such_a_run_trains_and_costs_the_latents_once_and_every_teacher(tiny, tmp_path):
    plan = make_plan(tiny, tmp_path, more=MORE)
    run = next(run for run in all_runs(plan) if (run.arm, run.stage) == ("both", "final"))
    seconds = [train_run(one.config).train_seconds for one in (*run.all_upstream, run)][:2]
    cost = upstream_seconds(StudyFolder(plan), run, {None: {"depth": 100.0}})
    assert cost == pytest.approx(100 + sum(seconds), abs=0.002)
    job = jobs_of(plan.state(lambda key: 0.5))[run.key]
    assert set(job.needs) == {one.key for one in run.all_upstream}


def test_an_arm_that_is_like_one_of_several_teachers_has_them_too(tiny):
    (first, *_) = runs_of(tiny, "again", more={**MORE, "again": {"like": "both"}})
    assert set(first.config.teachers) == {"teacher", "probe"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"beside": ["nobody"]}, "`nobody`, which is no arm with `role: teacher`"),
        ({"beside": ["alone"]}, "`alone`, which is no arm with `role: teacher`"),
        ({"learns_from": None}, "let it learn from one more arm"),
        ({"beside": ["teacher"]}, "let it learn from one more arm"),
        ({"targets": {"views": 2}}, "no targets"),
    ],
)
def test_arms_beside_that_cannot_be_are_refused(tiny, changes, what):
    with pytest.raises(SpecError, match=what):
        make_spec(tiny, more={**MORE, "both": {**BOTH, **changes}})
