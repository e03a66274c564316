"""Progress without a terminal: a line now and then and one at the end, on stderr alone."""

import pytest

import cli.render
from cli.render import ProgressReporter, counted, print_table


def test_without_a_terminal_a_line_comes_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(cli.render.time, "monotonic", lambda: next(clock))
    with ProgressReporter("build", "images") as reporter:
        for done in range(1, 11):
            reporter.update(done, 10, "depth")
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 2 <= len(lines) < 10
    assert "left, depth" in lines[0]
    assert lines[-1].startswith("build: 10/10 images")


def test_a_slow_rate_is_told_by_the_minute_and_time_left_only_when_it_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(cli.render.time, "monotonic", lambda: now)
    with ProgressReporter("study", "runs") as reporter:
        now = 600.0
        reporter.update(90, 120, found=90)
        now = 1200.0
        reporter.update(110, 120, found=90)
    found, moving, _ = capsys.readouterr().err.splitlines()
    assert found == "study: 90/120 runs, 0.0 runs/s, time left unknown"
    assert moving == "study: 110/120 runs, 1.0 runs/min, 600 s left"


def test_nothing_is_said_of_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("build", "images"):
        pass
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with ProgressReporter("build", "images") as reporter:
        reporter.update(3, 4, "depth, shard 1 of 2")
    err = capsys.readouterr().err
    assert "3/4" in err
    assert "depth, shard 1 of 2" in err


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 classes"), (1, "1 class"), (2, "2 classes"), (1200, "1,200 classes")]
)
def test_one_thing_is_counted_in_the_singular(number: int, text: str) -> None:
    assert counted(number, "class", "classes") == text
    assert counted(number, "image") == text.replace("classes", "images").replace("class", "image")


def test_a_table_is_aligned_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "n"], [["a" * 200, 1], ["b", 22]])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.index("n", 1) == first.index("1") - 0 or header.endswith("n")
    assert first == "a" * 200 + "  1"
    assert second.endswith("  22")
