"""`dla manifest make` where images may have several classes: what it prints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.manifest import app
from dla_cache.manifest import read_manifest
from tests.hostile import encoded, picture

Run = Callable[..., Result]

CSV = 'path,tags\n1.png,"cat, dog,"\n2.png,cat\n3.png,\n'
LINES = '{"path": "1.png", "tags": ["cat", "dog"]}\n{"path": "2.png", "tags": "cat"}\n{"path": "3.png", "tags": []}\n'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `make` in a folder with three images and two tables of them, the first two of equal bytes."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("1", 0), ("2", 0), ("3", 1)):
        Path(f"{name}.png").write_bytes(encoded("PNG", picture((8, 8), seed)))
    Path("list.csv").write_text(CSV)
    Path("list.jsonl").write_text(LINES)
    return lambda *arguments: CliRunner().invoke(
        app, ["make", *arguments, "--label-column", "tags", "--out", "o.parquet"]
    )


def test_lists_are_said_to_be_lists_and_counted(run: Run) -> None:
    result = run("list.jsonl")
    assert result.exit_code == 0, result.output
    assert "any number of classes from `tags`" in result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["classes"] == "2: cat 2, dog 1"
    assert lines["multi-label"] == "classes per labelled image: 1 on average; labelled with none of them: 1 image"
    assert lines["CONFLICT"] == "1 content with several labels: row 1, 1.png = row 2, 2.png"
    assert [row.label for row in read_manifest(Path("o.parquet")).rows()] == [(0, 1), (0,), ()]


def test_a_separator_splits_the_cells_of_a_csv(run: Run) -> None:
    result = run("list.csv", "--label-separator", ",")
    assert (
        "multi-label classes per labelled image: 1.5 on average; labelled with none of them: 0 images" in result.stdout
    )
    assert "unlabelled  train 1" in result.stdout
    assert [row.label for row in read_manifest(Path("o.parquet")).rows()] == [(0, 1), (0,), None]


def test_json_says_the_same(run: Run) -> None:
    facts = json.loads(run("list.jsonl", "--json").stdout)
    assert (facts["is_multi_label"], facts["classes_per_image"], facts["n_without_class"]) == (True, 1, 1)
    assert facts["images_per_class"] == {"cat": 2, "dog": 1}
    [conflict] = facts["conflicts"]
    assert conflict["labels"] == [["cat"], ["cat", "dog"]]


def test_one_class_an_image_is_not_called_multi_label(run: Run) -> None:
    result = run("list.csv")
    assert "multi-label" not in result.stdout
    assert "classes     2: cat 1, cat, dog, 1" in result.stdout
    assert json.loads(run("list.csv", "--json").stdout)["is_multi_label"] is False


def test_an_empty_separator_is_wrong_usage(run: Run) -> None:
    result = run("list.csv", "--label-separator", "")
    assert result.exit_code == 2
    assert "--label-separator" in result.stderr
