"""What the trackers are told, and those that are not there."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dla_cache.errors import MissingDependencyError, WorkInterrupted
from tests.trainer.toy import CONFIG, STEPS, make_loop, run_loop, steps_told
from trainer.processes import open_processes
from trainer.run import train_run
from trainer.tracking import Trackers


def shown(folder):
    """Name → (step, value) of each point that TensorBoard shows."""
    events = EventAccumulator(str(folder / "logs" / "dla"))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def run_tracked(folder, *, stop_at=None, resume=False):
    """A run that a tracker is told of, until it dies at a step."""
    with open_processes(CONFIG, "cpu", folder / "logs") as processes:
        trackers = Trackers(processes.accelerator, folder / "logs", {}, images_per_step=16)
        loop = make_loop(folder, processes=processes, log=trackers.log)
        if resume:
            loop.resume()
        run_loop(loop, should_stop=lambda: loop.step == stop_at)


def test_tensorboard_shows_what_the_log_says(tmp_path):
    run_tracked(tmp_path)
    points = shown(tmp_path)
    assert points.keys() == {
        "losses/fit",
        "losses/total",
        "gradient_shares/fit",
        "metrics/selection",
        "learning_rate",
        "seconds",
        "data_wait",
        "images_per_s",
        "evaluation_seconds",
    }
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in points["losses/fit"]] == [6, 12, 18, STEPS]
    assert [value for _, value in points["losses/fit"]] == pytest.approx([line["losses"]["fit"] for line in lines])
    assert [value for _, value in points["images_per_s"]] == pytest.approx([16 * line["steps_per_s"] for line in lines])


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    """It had told of steps 6 and 12, and goes on from step 8."""
    with pytest.raises(WorkInterrupted):
        run_tracked(tmp_path, stop_at=8)
    kept = (tmp_path / "last.safetensors").read_bytes()
    with pytest.raises(WorkInterrupted):
        run_tracked(tmp_path, stop_at=14, resume=True)
    (tmp_path / "last.safetensors").write_bytes(kept)
    run_tracked(tmp_path, resume=True)
    assert [step for step, _ in shown(tmp_path)["losses/fit"]] == [6, 12, 18, STEPS] == steps_told(tmp_path)


def test_a_run_without_trackers_writes_no_logs(tiny, tmp_path):
    train_run(tiny.run("probe", tmp_path / "run", loop={"steps": 2, "trackers": []}))
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr("trainer.tracking.find_spec", lambda wanted: None if wanted == name else object())
    config = tiny.run("probe", tmp_path / "run", loop={"trackers": ["tensorboard", name]})
    with pytest.raises(MissingDependencyError, match=f"`{name}`, which is not installed") as refused:
        train_run(config)
    assert f"pip install {name}" in refused.value.hint
    assert not (tmp_path / "run").exists()
