"""The loop on a toy task: kills and resumes, the schedule, the guard against dead losses, the best weights."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dla_cache import durable
from dla_cache.errors import WorkInterrupted
from tests.trainer.toy import (
    CONFIG,
    EVALUATE_STEPS,
    STEPS,
    Death,
    assert_same_run,
    make_loop,
    run_loop,
    state_of,
    steps_told,
    toy_batches,
)
from trainer.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run_loop(make_loop(folder))
    return folder


@pytest.mark.parametrize("last_step", [1, 6, 7, 12, 13, STEPS - 1])
def test_a_run_killed_after_any_step_and_resumed_is_bitwise_the_unbroken_one(tmp_path, unbroken, last_step):
    def die(at):
        if at.step == last_step:
            raise Death

    with pytest.raises(Death):
        run_loop(make_loop(tmp_path), on_progress=die)
    torch.manual_seed(last_step)  # another process has another generator
    loop = make_loop(tmp_path)
    if last_step > EVALUATE_STEPS:
        loop.resume()
    result = run_loop(loop)
    assert result.resumed_from == (last_step - 1) // EVALUATE_STEPS * EVALUATE_STEPS
    assert_same_run(tmp_path, unbroken)
    assert steps_told(tmp_path) == steps_told(unbroken) == [6, 12, 18, 20]


@pytest.mark.parametrize("asked_at", [0, 1, 8, 12, STEPS - 1])
def test_a_stop_keeps_a_checkpoint_of_that_very_step(tmp_path, unbroken, asked_at):
    loop = make_loop(tmp_path)
    with pytest.raises(WorkInterrupted, match=f"step {asked_at} of {STEPS}") as stopped:
        run_loop(loop, should_stop=lambda: loop.step == asked_at)
    assert stopped.value.hint == "run the same command again; it goes on from there"
    resumed = make_loop(tmp_path)
    resumed.resume()
    assert run_loop(resumed).resumed_from == asked_at
    assert_same_run(tmp_path, unbroken)
    assert steps_told(tmp_path) == [6, 12, 18, 20]


def test_what_to_do_after_a_stop_is_the_callers_to_say(tmp_path):
    with pytest.raises(WorkInterrupted) as stopped:
        run_loop(make_loop(tmp_path), should_stop=lambda: True, hint_to_resume="press the green button")
    assert stopped.value.hint == "press the green button"


def test_death_before_any_step_to_disk_loses_nothing_but_steps(tmp_path, monkeypatch):
    """The death may fall between weights, metrics and checkpoint of one evaluation."""
    config = CONFIG.model_copy(update={"steps": 4, "evaluate_steps": 2})
    run_loop(make_loop(tmp_path / "unbroken", config))
    deaths = 0
    while True:
        folder = tmp_path / f"killed-at-{deaths}"
        steps_left = deaths

        def mortal(step):
            def run(*arguments, **options):
                nonlocal steps_left
                if steps_left == 0:
                    raise Death
                steps_left -= 1
                return step(*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (os, "link"), (Path, "rename"), (os, "open"), (durable, "no_link")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                run_loop(make_loop(folder, config))
                break
            except Death:
                deaths += 1
        loop = make_loop(folder, config)
        if (folder / "last.safetensors").exists():
            loop.resume()
        run_loop(loop)
        assert_same_run(folder, tmp_path / "unbroken")
        assert steps_told(folder) == [2, 4]
    assert deaths > 20


def test_training_time_is_summed_over_a_stop(tmp_path, monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    whole = run_loop(make_loop(tmp_path / "whole")).train_seconds
    loop = make_loop(tmp_path / "stopped")
    with pytest.raises(WorkInterrupted):
        run_loop(loop, should_stop=lambda: loop.step == 9)
    loop = make_loop(tmp_path / "stopped")
    loop.resume()
    assert run_loop(loop).train_seconds == whole


def test_a_gradient_is_clipped_to_the_norm_and_0_leaves_it(tmp_path):
    def gradient_norm(clip_norm):
        config = CONFIG.model_copy(update={"steps": 1, "clip_norm": clip_norm})
        loop = make_loop(tmp_path / str(clip_norm), config)
        run_loop(loop)
        return float(nn.utils.get_total_norm(p.grad for p in loop.task.module.parameters()))

    whole = gradient_norm(0.0)
    assert whole > 0.5
    assert gradient_norm(0.5) == pytest.approx(0.5, rel=1e-5)  # torch adds 1e-6 to the norm it divides by


def test_the_first_of_the_best_evaluations_is_kept(tmp_path):
    config = CONFIG.model_copy(update={"ema_decay": 0.0})
    loop = make_loop(tmp_path, config)
    selections, seen = iter([0.1, 0.7, 0.7, 0.4]), []

    def evaluate():
        seen.append(state_of(loop))
        return {"selection": next(selections), "student": 0.5}

    result = run_loop(loop, evaluate)
    assert result.best_step == 12
    assert result.best_metrics == {"selection": 0.7, "student": 0.5}
    kept, facts = load_checkpoint(tmp_path / "best.safetensors")
    assert facts["step"] == 12
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert not torch.equal(kept["0.weight"], seen[2]["0.weight"])


def test_averaged_weights_are_what_is_evaluated_and_kept(tmp_path):
    loop = make_loop(tmp_path)
    averaged, seen = state_of(loop), []

    def follow(at):
        decay = min(CONFIG.ema_decay, at.step / (at.step + 10))
        for name, value in state_of(loop).items():
            averaged[name] = decay * averaged[name] + (1 - decay) * value if value.is_floating_point() else value

    def evaluate():
        seen.append((state_of(loop), dict(averaged)))
        return {"selection": float(len(seen))}

    trained = []
    run_loop(loop, evaluate, on_progress=lambda at: (follow(at), trained.append(state_of(loop))))
    assert len(seen) == 4
    for evaluated, expected in seen:
        # Two orders of the same float32 sums.
        torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(load_checkpoint(tmp_path / "best.safetensors")[0], seen[-1][0], rtol=0, atol=0)
    torch.testing.assert_close(state_of(loop), trained[-1], rtol=0, atol=0)
    assert not torch.allclose(trained[-1]["0.weight"], seen[-1][0]["0.weight"], atol=1e-3)


def test_what_makes_batches_is_ended_with_the_loop_however_it_ends(tmp_path):
    ended = []

    def batches(step):
        try:
            yield from toy_batches(step)
        finally:
            ended.append(step)

    loop = make_loop(tmp_path)
    with pytest.raises(WorkInterrupted):
        loop.run(batches, lambda: {"selection": 0.0}, should_stop=lambda: loop.step == 3)
    assert ended == [0]
    loop.run(batches, lambda: {"selection": 0.0})
    assert ended == [0, 3]


def test_every_module_trains_at_every_step_though_it_came_for_evaluation(tmp_path):
    """As pretrained weights come."""
    loop, seen = make_loop(tmp_path), []
    loop.task.module[2].eval()
    loop.task.module[2].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    run_loop(loop)
    assert seen == [True] * STEPS
