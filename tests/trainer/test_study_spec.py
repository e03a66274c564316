"""What a study's spec says by itself, and what is refused before anything is trained."""

import math

import pytest

from dla_cache.errors import SpecError
from dla_cache.spec import parse_spec
from trainer.study_spec import StudySpec, fields_of_arm

STUDY = {
    "name": "toy",
    "question": "Which?",
    "store": "cache.zarr",
    "arms": {
        "alone": {"run": {"kind": "student"}},
        "teacher": {"run": {"kind": "teacher"}, "role": "teacher"},
        "kd": {
            "run": {"kind": "student", "label": 1},
            "learns_from": "teacher",
            "tune": {"objective.kd.temperature": {"values": [1, 2, 4], "extend": True}},
        },
    },
    "tuning": {"trials": 3},
    "seeds": 4,
    "comparisons": [["kd", "alone"]],
}


def make(**fields):
    return parse_spec({**STUDY, **fields}, StudySpec, where="study.yaml")


def with_arm(name, *, comparisons=(), **arm):
    return make(arms={**STUDY["arms"], name: arm}, comparisons=[*STUDY["comparisons"], *comparisons])


def test_an_arm_like_another_takes_its_fields_below_its_own_its_settings_and_whom_it_learns_from():
    spec = with_arm("kd-long", like="kd", run={"loop": {"steps": 9}})
    assert spec.tuned_as("kd-long") == "kd"
    assert spec.learns_from("kd-long") == "teacher"
    assert fields_of_arm(spec, "kd-long") == [{}, {"kind": "student", "label": 1}, {"loop": {"steps": 9}}]


def test_an_arm_is_trained_on_the_store_of_what_it_learns_from_unless_it_names_one():
    arms = {
        **STUDY["arms"],
        "teacher-noise": {"like": "teacher", "role": "teacher", "store": "noise"},
        "kd-noise": {"like": "kd", "learns_from": "teacher-noise"},
    }
    spec = make(arms=arms, stores={"noise": {"control": "gaussian"}})
    assert [spec.store_of(name) for name in ("kd", "teacher-noise", "kd-noise")] == [None, "noise", "noise"]


def test_the_teacher_of_an_arm_is_found_at_any_depth_and_arms_come_after_what_they_need():
    spec = make(arms={"grandchild": {"run": {"kind": "student"}, "learns_from": "kd"}, **STUDY["arms"]})
    assert [spec.teacher_of(name) for name in ("grandchild", "kd", "alone")] == ["teacher", "teacher", None]
    order = spec.in_order()
    assert order.index("teacher") < order.index("kd") < order.index("grandchild")
    assert sorted(order) == sorted(spec.arms)


def test_more_final_seeds_leave_those_of_tuning_as_they_are():
    assert make(seeds=4).tuning.all_seeds == make(seeds=900).tuning.all_seeds == (1000, 1001)


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"learns_from": "nobody"}, "`arms.new.learns_from` names `nobody`, and the arms are `alone`"),
        ({"like": "nobody"}, "`arms.new.like` names `nobody`"),
        ({"store": "other"}, "`arms.new.store` names `other`, and the `stores` are none"),
        ({"like": "new"}, "arm `new` comes back to itself"),
        ({"run": {"seed": 3}}, "`arms.new.run.seed` is the study's to set"),
        ({"run": {"teacher": "runs/a"}}, "`arms.new.run.teacher` is the study's to set"),
        ({"seeds": [1, 1]}, "a seed stands twice in `arms.new.seeds`"),
        ({"seeds": [1000]}, "seed 1000 is one of tuning and one of `new`'s final runs"),
        ({"role": "teacher", "seeds": 2}, "the seeds of `arms.new` are the `teacher_seeds`"),
        ({"role": "teacher", "learns_from": "kd"}, "learns from `kd`, which has not"),
        ({"learns_from": "kd", "seeds": 5}, "`arms.new` has seed 4, and `kd`, which it learns from, has not"),
        ({"targets": {"views": 2}}, "has `targets` and learns from no arm"),
        ({"like": "kd", "tune": {"loop.steps": {"values": [1, 2, 3]}}}, "takes its settings"),
        ({"tune": {"loop.steps": {"values": [1, 2]}}}, "has 2 settings to try and `tuning.trials` is 3"),
        ({"tune": {"roles.test": {"values": ["a", "b", "c"]}}}, "`roles.test` in `arms.new` is nothing to tune"),
        ({"tune": {"loop.steps": {"values": [1, 1, 2]}}}, "a value stands twice"),
        ({"tune": {"loop.steps": {"values": [1, 2, math.nan]}}}, "no finite number"),
        ({"tune": {"model.kind": {"values": ["a", "b"], "extend": True}}}, "`extend` needs two numbers"),
        ({"tune": {"loop.steps": {"values": [1, 2, 3], "extend": True, "low": 2}}}, "outside `low` and `high`"),
        ({"lerns_from": "teacher"}, "did you mean `learns_from`"),
    ],
)
def test_an_arm_that_makes_no_sense_is_refused_with_its_name(arm, told):
    with pytest.raises(SpecError) as refused:
        with_arm("new", **arm)
    assert told in refused.value.message
    assert "study.yaml" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"comparisons": [["kd", "nobody"]]}, "`comparisons` names `nobody`"),
        ({"comparisons": [["kd", "teacher"]]}, "`teacher`, a teacher, which has other seeds"),
        ({"comparisons": [["kd", "kd"]]}, "compares `kd` with itself"),
        ({"comparisons": [["kd", "alone"], ["alone", "kd"]]}, "twice"),
        ({"arms": {"../x": {}}}, "`../x` is no safe name"),
        ({"store": None}, "name either `store`"),
        ({"data": "relief-digits"}, "name either `store`"),
        ({"seeds": [3, 3]}, "a seed stands twice"),
        ({"tuning": {"trials": 3, "seeds": [7, 7]}}, "a seed stands twice"),
        ({"tuning": {"trials": 3, "seeds": [3]}}, "seed 3 is one of tuning"),
        ({"label_fractions": [0.1, 0.1]}, "a fraction stands twice"),
        ({"label_fractions": [0.1], "base": {"label_fraction": 0.5}}, "both say how many labels"),
        ({"stores": {"a": {"path": "a.zarr", "control": "gaussian"}}}, "either a `path` or a `control`"),
        ({"stores": {"a": {"source": "embedded-depth"}}}, "belongs to a study with `data`"),
        ({"stores": {"a": {"source": "embedded-depth", "noise": 0.5}}}, "all but `source` and `seed`"),
        ({"stores": {"a": {"path": "a.zarr", "seed": 1}}}, "all but `path` belongs to a `control`"),
        ({"confidence": 0.05}, "greater than or equal to 0.8"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(fields, told):
    with pytest.raises(SpecError) as refused:
        make(**fields)
    assert told in refused.value.message


def test_arms_of_unequal_seeds_are_not_compared_and_exploratory_ones_not_planned():
    with pytest.raises(SpecError, match=r"of seeds \[0, 1, 2, 3\] and `few` of seeds \[0, 1\]"):
        with_arm("few", run={"kind": "student"}, seeds=2, comparisons=[["kd", "few"]])
    with pytest.raises(SpecError, match="which is exploratory"):
        with_arm("late", run={"kind": "student"}, exploratory=True, comparisons=[["kd", "late"]])


def test_an_unequal_budget_is_taken_with_its_reason():
    assert make(tuning={"trials": 5}, unequal_budget="kd has one setting").tuning.trials == 5
