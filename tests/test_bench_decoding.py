"""The bench of what decoding costs: it builds with all three sources and tells their times."""

import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench" / "decoding.py"


def test_the_bench_tells_the_rate_of_the_plain_source_and_of_both_that_decode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCH), "--rounds", "1", "--images", "5"])
    runpy.run_path(str(BENCH), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["embedded-depth", "embedded-depth-decoded", "embedded-depth-reencoded"]
    assert rows[0][5] == "1.00"
    assert all(float(row[1]) > 0 for row in rows)
