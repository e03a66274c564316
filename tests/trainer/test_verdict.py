"""A verdict uses a word where its test allows it, and nowhere else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.stats import MeanEstimate, equivalence_p, minimum_detectable_effect
from trainer.verdict import Evidence, verdict

ESTIMATES = st.builds(MeanEstimate, st.floats(-8, 8), st.floats(0, 4), st.floats(1, 200))


def evidence_of(estimate, *, planned=True, adjusted=None, margin=1.0, n_teachers=3, names=("messy", "kd")):
    low, high = estimate.interval(0.95)
    detectable = minimum_detectable_effect(estimate.standard_error, estimate.freedom, level=0.05)
    p = estimate.p if adjusted is None else adjusted
    equivalence = equivalence_p(estimate, margin)
    return Evidence(*names, estimate.mean, low, high, p, equivalence, detectable, margin, 0.95, planned, n_teachers)


@given(ESTIMATES, st.booleans(), st.integers(1, 6), st.floats(0.1, 3))
def test_a_word_stands_there_where_its_condition_holds_and_nowhere_else(estimate, planned, n_family, margin):
    adjusted = min(1.0, estimate.p * n_family)
    evidence = evidence_of(estimate, planned=planned, adjusted=adjusted, margin=margin)
    said = verdict(evidence)
    differs, same = adjusted < 0.05, equivalence_p(estimate, margin) < 0.05
    assert ("beats" in said) == (planned and differs)
    assert ("less than the margin" in said) == (planned and differs and same)
    assert ("equivalent within" in said) == (planned and same and not differs)
    assert ("Not settled" in said) == (planned and not same and not differs)
    assert said.startswith("Exploratory") == (not planned)
    assert ("could have detected" in said) == ("Not settled" in said)


@pytest.mark.parametrize(("mean", "start"), [(3.0, "messy beats kd by 3.0 points"), (-3.0, "kd beats messy by 3.0")])
def test_the_better_arm_is_named_first(mean, start):
    said = verdict(evidence_of(MeanEstimate(mean, 0.5, 9)))
    assert said.startswith(start)
    assert "interval 1.9 to 4.1" in said


def test_what_is_not_settled_says_which_differences_are_left_and_what_could_have_been_found():
    said = verdict(evidence_of(MeanEstimate(0.4, 0.8, 9)))
    assert "differences from -1.4 to +2.2 are compatible with the data" in said
    assert "this study could have detected 2.5 points" in said


def test_one_seed_settles_nothing():
    said = verdict(evidence_of(MeanEstimate(30.0, math.inf, 1.0)))
    assert said == ("Not settled: messy minus kd is +30.0 points with one seed, which says nothing of training again.")


def test_students_of_one_teacher_say_so():
    assert "one teacher" in verdict(evidence_of(MeanEstimate(3.0, 0.5, 9), n_teachers=1))
    assert "one teacher" not in verdict(evidence_of(MeanEstimate(3.0, 0.5, 9), n_teachers=None))
