"""What stops a run: a loss term that teaches nothing, a number that is not finite."""

import json
import math

import pytest
import torch

from dla_cache.errors import DeadLossError, TrainingError, WorkInterrupted
from tests.trainer.toy import CONFIG, STEPS, make_loop, run_loop, state_of, steps_told
from trainer.loop import MAX_SKIPPED
from trainer.processes import alone
from trainer.watch import FiniteWatch, mean_shares, nearly_inert


def cut_off(error):
    """What a wrong `detach` leaves: a term that is counted and that the head alone, or nobody, hears."""
    return error.detach().square().mean()


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["detached", "weighted with 0"])
def test_a_loss_that_teaches_nothing_stops_the_run_at_its_first_step(tmp_path, weight):
    def terms(error, step):
        term = cut_off(error) if weight else weight * error.square().mean()
        return {"fit": error.abs().mean(), "distil": term}

    loop = make_loop(tmp_path, terms=terms)
    before = state_of(loop)
    with pytest.raises(DeadLossError, match="`distil`") as dead:
        run_loop(loop)
    assert dead.value.hint
    assert loop.step == 0
    trained = [name for name, _ in loop.task.module.named_parameters()]
    assert all(torch.equal(before[name], state_of(loop)[name]) for name in trained)


def test_a_loss_that_reaches_only_what_is_thrown_away_is_dead(tmp_path):
    loop = make_loop(tmp_path)
    loop.task.terms = lambda error, step: {
        "fit": error.square().mean(),
        "head": loop.task.module[3].weight.square().sum(),
    }
    with pytest.raises(DeadLossError, match="`head`"):
        run_loop(loop)


def test_a_loss_that_dies_later_stops_the_run_at_the_next_evaluation(tmp_path):
    def terms(error, step):
        return {"fit": error.abs().mean(), "distil": error.square().mean() if step < 7 else cut_off(error)}

    loop = make_loop(tmp_path, terms=terms)
    with pytest.raises(DeadLossError, match="`distil`"):
        run_loop(loop)
    assert loop.step == 11
    assert steps_told(tmp_path) == [6]


def test_a_loss_that_is_dead_when_a_run_is_resumed_stops_it_at_once(tmp_path):
    loop = make_loop(tmp_path)
    with pytest.raises(WorkInterrupted):
        run_loop(loop, should_stop=lambda: loop.step == 8)
    loop = make_loop(tmp_path, terms=lambda error, step: {"fit": error.abs().mean(), "distil": cut_off(error)})
    loop.resume()
    with pytest.raises(DeadLossError, match="`distil`"):
        run_loop(loop)
    assert loop.step == 8


@pytest.mark.parametrize("absent", [0, 5, 11])
def test_a_term_that_has_nothing_to_say_on_a_batch_is_no_fault(tmp_path, absent):
    def terms(error, step):
        spoken = {"fit": error.square().mean()}
        return spoken if step == absent else spoken | {"distil": error.abs().mean()}

    assert run_loop(make_loop(tmp_path, terms=terms)).best_step > 0


def test_the_log_tells_losses_metrics_and_whose_gradient_is_larger(tmp_path):
    def terms(error, step):
        return {"small": 0.1 * error.square().mean(), "large": 0.3 * error.square().mean()}

    run_loop(make_loop(tmp_path, terms=terms), lambda: {"selection": 0.5, "student": 0.25})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["gradient_shares"] == pytest.approx({"small": 0.25, "large": 0.75}, rel=1e-5)
        assert record["losses"]["total"] == pytest.approx(record["losses"]["small"] + record["losses"]["large"])
        assert record["metrics"] == {"selection": 0.5, "student": 0.25}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, value):
    def terms(error, step):
        return {"fit": error.square().mean(), "distil": error.abs().mean() * (value if step == 8 else 1)}

    loop = make_loop(tmp_path, terms=terms)
    with pytest.raises(TrainingError, match=f"`distil` is {value} at step 8") as failed:
        run_loop(loop)
    assert "learning_rate" in failed.value.hint
    assert all(bool(value.isfinite().all()) for value in state_of(loop).values())


def broken_gradient(loop, at):
    """Terms whose values are finite, and from some steps on not the gradient of the last layer's weight."""

    def terms(error, step):
        spoken = {"fit": error.square().mean()}
        return spoken | {"odd": (0 * loop.task.module[3].weight).square().sum().sqrt()} if step in at else spoken

    return terms


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named_with_its_step_and_changes_no_weight(tmp_path, clip_norm):
    loop = make_loop(tmp_path, CONFIG.model_copy(update={"clip_norm": clip_norm}))
    loop.task.terms = broken_gradient(loop, {8})
    with pytest.raises(TrainingError, match=r"the gradient of `3\.weight` is not finite at step 8") as failed:
        run_loop(loop)
    assert failed.value.hint
    assert all(bool(value.isfinite().all()) for value in state_of(loop).values())


def test_a_gradient_whose_norm_alone_overflows_is_said_to_do_so():
    module = torch.nn.Linear(2, 2)
    module.weight.grad = torch.full((2, 2), 3e38)
    with pytest.raises(TrainingError, match="the gradient's norm is not finite at step 4"):
        FiniteWatch(module, late=False).take(4, {"gradient": torch.tensor(math.inf)})


def with_scaler(folder, **settings):
    """A loop that scales its loss as on a GPU in float16."""
    processes = alone(CONFIG)
    processes.accelerator.scaler = torch.amp.GradScaler("cpu", **settings)
    return make_loop(folder, processes=processes)


def test_steps_that_float16_skips_are_counted_logged_and_no_fault(tmp_path):
    loop = with_scaler(tmp_path)
    loop.task.terms = broken_gradient(loop, {3, 4, 9})
    run_loop(loop)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [2, 3, 3, 3]
    assert all(bool(value.isfinite().all()) for value in state_of(loop).values())


def test_the_scale_is_in_the_checkpoint(tmp_path):
    loop = with_scaler(tmp_path, growth_interval=3)
    with pytest.raises(WorkInterrupted):
        run_loop(loop, should_stop=lambda: loop.step == 8)
    resumed = with_scaler(tmp_path, growth_interval=3)
    resumed.resume()
    scalers = [one.processes.accelerator.scaler.state_dict() for one in (resumed, loop)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] == 2.0**18
    assert scalers[0]["_growth_tracker"] == 2


def test_a_run_that_float16_never_steps_ends(tmp_path, monkeypatch):
    assert MAX_SKIPPED == 100
    monkeypatch.setattr("trainer.loop.MAX_SKIPPED", 5)
    loop = with_scaler(tmp_path)
    loop.task.terms = broken_gradient(loop, range(12, STEPS))
    with pytest.raises(TrainingError, match="not finite in float16 for 5 steps, up to step 16") as failed:
        run_loop(loop)
    assert "bf16" in failed.value.hint


def test_a_term_below_one_percent_of_the_gradient_is_called_nearly_inert():
    shares = mean_shares([{"ce": 0.97, "small": 0.01, "late": 0.02}, {"ce": 0.995, "small": 0.005}])
    assert shares == pytest.approx({"ce": 0.9825, "small": 0.0075, "late": 0.02})
    assert nearly_inert(shares) == ("small",)
