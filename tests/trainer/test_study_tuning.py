"""Which settings are tried of an arm, and which are chosen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.study_entries import Axis
from trainer.study_spec import Tuning
from trainer.study_tuning import grid_trials, tune, values_beyond


def axes_of(**axes):
    return {name.replace("__", "."): Axis(**axis) for name, axis in axes.items()}


def tuned(axes, score, *, trials=6, extensions=2, default=()):
    """The final state where `score` says at once how good settings are."""
    return tune(axes, dict(default), Tuning(trials=trials, extensions=extensions), score)


def test_a_grid_that_is_small_enough_is_tried_whole_in_its_order():
    axes = axes_of(a={"values": [1, 2]}, b={"values": ["x", "y"]})
    assert grid_trials(axes, {}, 4) == [{"a": a, "b": b} for a in (1, 2) for b in "xy"]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3), n_trials=st.integers(1, 8), pick=st.integers(0, 4))
def test_of_a_larger_grid_as_many_as_trials_are_tried_each_once_with_the_default_among_them(sizes, n_trials, pick):
    axes = {f"axis-{place}": Axis(values=tuple(range(size))) for place, size in enumerate(sizes)}
    default = {name: min(pick, len(axis.values) - 1) for name, axis in axes.items()}
    trials = grid_trials(axes, default, n_trials)
    n_points = 1
    for size in sizes:
        n_points *= size
    assert len(trials) == min(n_trials, n_points) == len({tuple(trial.items()) for trial in trials})
    assert default in trials
    assert trials == grid_trials(axes, default, n_trials)


def test_nothing_is_chosen_before_every_trial_has_its_score():
    axes = axes_of(t={"values": [1, 2, 4]})
    state = tuned(axes, lambda settings: None if settings["t"] == 4 else 0.5)
    assert (state.chosen, state.scores) == (None, (0.5, 0.5, None))


def test_the_best_mean_wins_and_of_equal_ones_the_first():
    axes = axes_of(t={"values": [1, 2, 4]})
    scores = {1: 0.2, 2: 0.9, 4: 0.9}
    assert tuned(axes, lambda settings: scores[settings["t"]]).chosen == {"t": 2}


@pytest.mark.parametrize(
    ("axis", "optimum", "tried", "chosen", "at_edge"),
    [
        ({"values": [1, 2, 4], "extend": True}, 2, [1, 2, 4], 2, ()),
        ({"values": [1, 2, 4], "extend": True}, 8, [1, 2, 4, 8, 16], 8, ()),
        ({"values": [1, 2, 4], "extend": True}, 99, [1, 2, 4, 8, 16], 16, ("t",)),
        ({"values": [4, 2, 1], "extend": True}, 0.5, [4, 2, 1, 0.5, 0.25], 0.5, ()),
        ({"values": [1.0, 2.0, 4.0], "extend": True}, 0.5, [1, 2, 4, 0.5, 0.25], 0.5, ()),
        ({"values": [1.0, 2.0, 4.0], "extend": True, "low": 0.6}, 0.1, [1, 2, 4, 0.6], 0.6, ("t",)),
        ({"values": [0, 0.5, 1], "extend": True}, 1.5, [0, 0.5, 1, 1.5, 2], 1.5, ()),
        ({"values": [0, 0.5, 1], "extend": True, "low": 0}, 0, [0, 0.5, 1], 0, ("t",)),
        ({"values": [1, 2, 4]}, 99, [1, 2, 4], 4, ("t",)),
    ],
)
def test_a_best_value_at_the_edge_is_followed_beyond_it_as_far_as_allowed(axis, optimum, tried, chosen, at_edge):
    state = tuned(axes_of(t=axis), lambda settings: -abs(settings["t"] - optimum))
    assert [trial["t"] for trial in state.trials] == tried
    assert (state.chosen, state.at_edge) == ({"t": chosen}, at_edge)
    assert state.n_extensions == len(tried) - 3


def test_the_other_settings_stay_the_best_ones_while_an_axis_is_extended():
    axes = axes_of(a={"values": [1, 2], "extend": True}, b={"values": ["x", "y"]})
    state = tuned(axes, lambda settings: settings["a"] + (settings["b"] == "y"))
    assert state.trials[4:] == ({"a": 4, "b": "y"}, {"a": 8, "b": "y"})
    assert state.at_edge == ("a",)


def test_without_extensions_the_edge_is_only_told():
    state = tuned(axes_of(t={"values": [1, 2], "extend": True}), lambda settings: settings["t"], extensions=0)
    assert (state.chosen, state.at_edge) == ({"t": 2}, ("t",))


def test_all_that_extending_could_try_is_known_beforehand():
    assert values_beyond(Axis(values=[1, 2, 4], extend=True, low=0.4), 2) == [0.5, 0.4, 8, 16]
    assert values_beyond(Axis(values=[1, 2, 4]), 2) == []
