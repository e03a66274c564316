"""Workers that live on from job to job, and what happens when one dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dla_cache.errors import LostProcessError, TrainingError, WorkInterrupted
from tests.trainer import pool_toy
from trainer.pool import WorkerPool

ROOT = Path(__file__).parents[2]


def run_all(pool, jobs):
    """Gives each job to a worker as soon as one is idle, and waits for all."""
    waiting, done = dict(jobs), []
    until = time.monotonic() + 60
    while waiting or pool.under_way:
        while waiting and pool.n_idle:
            pool.start(*waiting.popitem())
        done += pool.wait()
        assert time.monotonic() < until
    return done


def test_two_workers_of_one_thread_do_all_jobs_and_live_on_between_them(tmp_path):
    jobs = {f"job-{number}": str(tmp_path / f"{number}") for number in range(5)}
    with WorkerPool(pool_toy.note, 2, tmp_path / "logs") as pool:
        assert sorted(run_all(pool, jobs)) == sorted(jobs)
    said = [(tmp_path / f"{number}").read_text().split() for number in range(5)]
    assert len({process for process, _ in said}) <= 2
    assert {threads for _, threads in said} == {"1"}
    assert str(os.getpid()) not in {process for process, _ in said}


def test_the_job_of_a_worker_that_dies_is_done_by_another_once(tmp_path):
    with WorkerPool(pool_toy.die_once, 1, tmp_path / "logs") as pool:
        assert run_all(pool, {"a": str(tmp_path / "a")}) == ["a"]
    assert (tmp_path / "a").read_text() == "lived"


def test_a_job_that_kills_two_workers_is_named_with_the_signal(tmp_path):
    with (
        pytest.raises(LostProcessError, match=r"had run `a` was killed by SIGKILL, for the second time") as lost,
        WorkerPool(pool_toy.die, 1, tmp_path / "logs") as pool,
    ):
        run_all(pool, {"a": ""})
    assert pool.failed == "a"
    assert "worker-0.log" in lost.value.hint


def test_an_error_of_a_job_comes_with_its_name_and_hint_and_a_bug_with_its_log(tmp_path):
    with (
        pytest.raises(TrainingError, match="run `a`: no work") as refused,
        WorkerPool(pool_toy.refuse, 1, tmp_path / "logs") as pool,
    ):
        run_all(pool, {"a": "work"})
    assert refused.value.hint == "try another"
    with (
        pytest.raises(TrainingError, match="run `b`: ZeroDivisionError: one over none") as broken,
        WorkerPool(pool_toy.have_a_bug, 1, tmp_path / "logs") as pool,
    ):
        run_all(pool, {"b": ""})
    assert str(tmp_path / "logs" / "worker-0.log") in broken.value.hint
    assert "pool_toy.py" in (tmp_path / "logs" / "worker-0.log").read_text()


def test_at_the_end_of_the_pool_jobs_under_way_are_asked_to_stop_and_do(tmp_path):
    with WorkerPool(pool_toy.wait_to_stop, 1, tmp_path / "logs") as pool:
        pool.start("a", str(tmp_path / "a"))
        until = time.monotonic() + 30
        while pool.under_way["a"] != (1, 3):
            assert pool.wait() == []
            assert time.monotonic() < until
    assert (tmp_path / "a").read_text() == "checkpoint"


def test_a_worker_that_somebody_else_stops_ends_the_work_as_a_stop_and_not_as_a_failure(tmp_path):
    with WorkerPool(pool_toy.wait_to_stop, 1, tmp_path / "logs") as pool:
        pool.start("a", str(tmp_path / "a"))
        while not (tmp_path / "a").exists() or not (tmp_path / "a").read_text():
            pool.wait()
        os.kill(int((tmp_path / "a").read_text()), signal.SIGTERM)
        with pytest.raises(WorkInterrupted, match="`a` was stopped"):
            run_all(pool, {})
    assert pool.failed is None


def test_ctrl_c_reaches_all_processes_at_once_and_each_job_is_asked_by_us_alone(tmp_path):
    code = """
from pathlib import Path
import cli.main
from cli.arms import stop_if
from cli.signals import stop_on_signals
from tests.trainer import pool_toy
from trainer.pool import WorkerPool
def work():
    with stop_on_signals() as should_stop, WorkerPool(pool_toy.wait_to_stop, 2, Path("logs")) as pool:
        for name in ("a", "b"):
            pool.start(name, name)
        while True:
            pool.wait()
            stop_if(should_stop)
cli.main.app.command()(work)
cli.main.main()
"""
    command, environment = [sys.executable, "-c", code, "work"], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    jobs = [tmp_path / name for name in ("a", "b")]
    until = time.monotonic() + 60
    while not all(job.exists() and job.read_text() for job in jobs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the command has started
    _, told = process.communicate(timeout=60)
    assert [job.read_text() for job in jobs] == ["checkpoint", "checkpoint"]
    assert (process.returncode, told.count("error: interrupted"), told.count("hint: ")) == (1, 1, 1)
    assert "Traceback" not in told
