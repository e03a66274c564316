"""Several real processes train one run: over gloo, on the CPU, as torchrun would start them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trainer
from dla_cache.errors import SpecError
from tests.trainer.processes_toy import CONFIG, run_wide
from tests.trainer.toy import assert_same_run
from trainer.checkpoint import load_checkpoint
from trainer.processes import alone, launched_rank, open_processes

ROOT = Path(trainer.__file__).parents[1]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder, names, *, world_size=2, **environment):
    """So many processes as somebody would start them by hand."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("processes_toy.py"), folder, *names],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(processes, *, timeout=60):
    try:
        return [(*process.communicate(timeout=timeout), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Runs of two processes, the second of which is killed in the last one, and what each process said."""
    folder = tmp_path_factory.mktemp("by-two")
    said = finish(start(folder, ["refused", "dropout", "dropout and accumulation", "no dropout", "stopped", "killed"]))
    return folder, said


def assert_close_run(folder, expected):
    """Weights and losses up to float32 sums in another order."""
    for name in ("best", "last"):
        ours, facts = load_checkpoint(folder / f"{name}.safetensors")
        theirs, expected_facts = load_checkpoint(expected / f"{name}.safetensors")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert facts["step"] == expected_facts["step"]
    lines, expected_lines = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (folder, expected)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines] == [5, 10, 12]
    for line, other in zip(lines, expected_lines, strict=True):
        for field in ("losses", "gradient_shares", "metrics"):
            assert line[field] == pytest.approx(other[field], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "in_one"),
    [
        ("dropout", {"n_micro": 2}),
        ("dropout and accumulation", {"n_micro": 4}),
        ("no dropout", {"n_micro": 1, "dropout": 0.0, "odd": False}),
    ],
)
def test_two_processes_train_as_one_that_has_the_same_batches_in_as_many_parts(by_two, tmp_path, name, in_one):
    """Without dropout it does not matter into how many parts: here the one process takes each batch whole."""
    run_wide(tmp_path, alone(CONFIG), **in_one)
    assert_close_run(by_two[0] / name, tmp_path)


def test_a_stop_asked_of_one_process_stops_all_at_one_step_and_the_resumed_run_is_the_unbroken_one(by_two):
    folder, said = by_two
    assert [output.splitlines()[1:] for output, *_ in said] == [[f"training stopped at step 7 of {CONFIG.steps}"]] * 2
    assert_same_run(folder / "stopped", folder / "dropout")


def test_what_the_first_process_refuses_is_said_by_all(by_two):
    _, said = by_two
    assert [output.splitlines()[0] for output, *_ in said] == ["the folder is taken, take another"] * 2


def test_when_a_process_is_killed_the_others_end_with_a_message_and_what_is_saved_stays(by_two):
    folder, ((_, survivor, code), (*_, killed)) = by_two
    assert (code, killed) == (1, -signal.SIGKILL)
    assert survivor.splitlines()[-2].startswith("LostProcessError: another process of this run has ended")
    assert "--resume" in survivor.splitlines()[-1]
    assert load_checkpoint(folder / "killed" / "last.safetensors")[1]["step"] == 5


def test_a_process_that_is_stuck_is_not_waited_for_beyond_the_timeout(tmp_path):
    first, second = start(tmp_path, ["stuck"], TIMEOUT_S="2")
    try:
        _, said, code = finish([first], timeout=60)[0]
    finally:
        second.kill()
        second.communicate()
    assert code == 1
    assert "LostProcessError: another process of this run has ended or does not answer" in said
    assert load_checkpoint(tmp_path / "stuck" / "last.safetensors")[1]["step"] == 5


@pytest.mark.parametrize(
    ("device", "precision", "what"),
    [("cpu", "fp16", "`loop.mixed_precision: fp16` needs a CUDA device"), ("cuda", "no", "the run asks for `cuda`")],
)
def test_what_the_device_cannot_do_is_refused(device, precision, what):
    config = CONFIG.model_copy(update={"mixed_precision": precision})
    with pytest.raises(SpecError, match=what) as refused, open_processes(config, device):
        pass
    assert refused.value.hint


def test_the_rank_is_known_before_the_processes_meet(monkeypatch):
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3
