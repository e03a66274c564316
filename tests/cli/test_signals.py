"""Signals as a shell sends them: one message and exit code 1, and no way to hang for good."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NOBODY_POLLS = """
try:
    print("ready", flush=True)
    time.sleep(60)
except Exception:  # as a library has it somewhere on the way
    pass
"""
THE_WAY_OUT_HANGS = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("leaving", flush=True)
    time.sleep(60)
"""
A_POLITE_STOP_HANGS = """
with stop_on_signals() as should_stop:
    print("ready", flush=True)
    while not should_stop():
        time.sleep(0.01)
    print("leaving", flush=True)
    time.sleep(60)
"""


def start(work: str, *wrapper: str) -> subprocess.Popen[str]:
    """`dla work`, a command that does `work`."""
    body = work.replace("\n", "\n    ")
    code = f"import time, cli.main\nfrom cli.signals import stop_on_signals\ndef work():{body}\n"
    if not wrapper:  # whoever runs the tests may have started them with `nohup`
        code = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n{code}"
    code += "cli.main.app.command()(work)\ncli.main.main()"
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", code, "work"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def send(process: subprocess.Popen[str], number: int, *, when: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{when}\n"
    process.send_signal(number)


def assert_one_message(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert err.startswith("error: interrupted by SIG")
    assert err.count("hint: ") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_where_nobody_polls_is_one_message(number: int) -> None:
    process = start(NOBODY_POLLS)
    send(process, number, when="ready")
    assert_one_message(process)


def test_a_second_signal_ends_a_polite_stop_that_hangs() -> None:
    process = start(A_POLITE_STOP_HANGS)
    send(process, signal.SIGINT, when="ready")
    send(process, signal.SIGINT, when="leaving")
    assert_one_message(process)


def test_a_second_signal_kills_on_a_way_out_that_hangs() -> None:
    process = start(THE_WAY_OUT_HANGS)
    send(process, signal.SIGTERM, when="ready")
    send(process, signal.SIGTERM, when="leaving")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_under_nohup_a_closed_terminal_does_not_matter() -> None:
    process = start(NOBODY_POLLS, "nohup")
    send(process, signal.SIGHUP, when="ready")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.kill()
    process.communicate()
