"""What `dla cache build` shows while it runs and when it is through, on one device and on several."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from cli.build_progress import BuildReporter
from dla_cache.progress import BuildProgress
from tests.device_source import SIDE

SOURCE = ("--source", "tests.device_source:Corners")


@pytest.fixture
def build(dla: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Builds `s` of ten listed images in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(f"{number}.png")
    assert dla("manifest", "make", ".", "--out", "m.parquet").exit_code == 0
    Path("spec.yaml").write_text(
        f"latents:\n- {{modality: depth, source: '{SOURCE[1]}'}}\n- {{modality: shape, source: '{SOURCE[1]}'}}\n"
        "shard_size: 4\n"
    )
    plain = ("cache", "build", "spec.yaml", "--manifest", "m.parquet", "--out", "s", "--batch-size", "4")
    return lambda *more: dla(*plain, *more)


def test_progress_is_written_for_machines_and_the_report_says_how_busy_the_device_was(
    build: Callable[..., Result],
) -> None:
    ended = build("--progress", "progress.jsonl", "--json")
    assert ended.exit_code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert 0 < report["device_busy"] <= 1
    assert report["bottleneck"] in ("device", "reading", "writing")
    assert report["batch_sizes"] == {"depth": 4, "shape": 4}
    lines = [json.loads(line) for line in Path("progress.jsonl").read_text().splitlines()]
    assert [line["images_done"] for line in (lines[0], lines[-1])] == [4, 20]
    assert lines[-1]["series"] == {"depth": {"done": 10, "total": 10}, "shape": {"done": 10, "total": 10}}
    assert lines[-1]["seconds_left"] == 0
    assert "build: 20/20 images" in ended.stderr


def test_two_devices_build_what_one_builds(build: Callable[..., Result]) -> None:
    text = build("--device", "cpu,cpu").stdout
    assert "encoded       20 images" in text
    assert "device        busy" in text
    assert json.loads(build("--json").stdout)["content_hash"] in text


def test_auto_takes_the_cpu_where_there_is_no_gpu(
    build: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert build("--device", "auto").exit_code == 0


def test_so_many_bad_images_are_left_out_with_their_reasons_as_are_allowed(build: Callable[..., Result]) -> None:
    Path("3.png").write_bytes(b"")
    refused = build()
    assert refused.exit_code == 1
    assert "`3-ppng` at `3.png` is not the file of the manifest" in refused.stderr
    assert "hint: " in refused.stderr
    built = build("--allow-bad", "10%")
    assert built.exit_code == 0, built.stderr
    assert "store         s, 9 images" in built.stdout
    assert "put aside     `3-ppng` at `3.png` is not the file of the manifest" in built.stdout


@pytest.mark.parametrize("allowed", ["-1", "half", "%"])
def test_an_allowance_that_is_none_is_wrong_usage(build: Callable[..., Result], allowed: str) -> None:
    assert build("--allow-bad", allowed).exit_code == 2


@pytest.mark.parametrize("missing", ["--manifest", "--out"])
def test_without_a_plan_a_manifest_and_a_store_are_named(dla: Callable[..., Result], missing: str) -> None:
    given = {"--manifest": "m.parquet", "--out": "s"}
    del given[missing]
    ended = dla("cache", "build", "spec.yaml", *next(iter(given.items())))
    assert ended.exit_code == 2
    assert missing in ended.stderr


PROGRESS = BuildProgress(
    "shape", 1, 3, 8, 20, done_of={"depth": 4, "shape": 4}, total_of={"depth": 10, "shape": 10}, device_busy=0.4
)


def test_on_a_terminal_each_modality_has_a_bar_and_all_is_told_that_keeps_the_device_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with BuildReporter() as reporter:
        reporter(replace(PROGRESS, bottleneck="reading", images_bad=2))
    err = capsys.readouterr().err
    for word in ("depth", "shape", "4/10", "device busy 40.0 %", "waits for reading and decoding", "2 images without"):
        assert word in err


def test_without_a_terminal_a_line_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with BuildReporter() as reporter:
        reporter(replace(PROGRESS, bottleneck="writing", is_waiting=True))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("build: 8/20 images, ")
    assert "depth 4/10, shape 4/10, it waits for writing, shape, shard 1 of 3, which another builder has" in line


def test_the_rate_is_that_of_the_pass_under_way_when_bad_images_made_a_second_one_necessary(tmp_path: Path) -> None:
    with BuildReporter(tmp_path / "p.jsonl") as report:
        for done, total in ((32, 80), (80, 80), (15, 15)):
            report(BuildProgress("depth", 0, 5, done, total, total_of={"depth": total}))
    told = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert told[-1]["images_done"] == 15
    assert told[-1]["images_per_s"] > 0
