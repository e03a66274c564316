"""`dla train targets`: what it takes, what it prints, and that a student learns from it."""

import json
import os

import pytest
import yaml

from trainer.run import train_run


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train_run(tiny.run("teacher", folder))
    return folder


def flags_of(tiny, teacher, out):
    places = ("--store", tiny.store, "--images", tiny.images, "--teacher", teacher, "--out", out)
    return (*places, "--set", "view={scale_min: 0.5, count: 2}", "--set", "shard_size=4", "--set", "batch_size=4")


def test_targets_are_made_by_flags_and_a_student_learns_from_them(dla, tiny, teacher, tmp_path):
    ended = dla("train", "targets", *flags_of(tiny, teacher, tmp_path / "targets"))
    assert ended.exit_code == 0, ended.stderr
    assert "each in 2 views" in ended.stdout
    assert "KL " in ended.stdout
    assert "targets: 6/6 images" in ended.stderr
    described = tiny.describe("student", "run", objective=tiny.objectives["kd"], targets="targets")
    del described["view"]  # it takes that of its targets
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(described))
    ended = dla("train", tmp_path / "run.yaml")
    assert ended.exit_code == 0, ended.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["targets"] == "../targets"


def test_a_file_of_targets_says_in_json_what_was_made_and_goes_on(dla, tiny, teacher, tmp_path):
    value = {
        "kind": "targets",
        "store": str(tiny.store),
        "images": str(tiny.images),
        "teacher": os.path.relpath(teacher, tmp_path),
        "output": "targets",
        "view": {"count": 2, "horizontal_flip": True},
    }
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump(value))
    first, again = (json.loads(dla("train", tmp_path / "targets.yaml", "--json").stdout) for _ in range(2))
    assert (first["images"], first["views"], first["targets"]) == (6, 2, ["logits"])
    assert (first["computed"], again["computed"]) == (1, 0)
    assert first["logits_error"] == again["logits_error"]


def test_ranks_of_a_launcher_share_the_work(dla, tiny, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    computed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        computed.append(json.loads(dla("train", "targets", *flags_of(tiny, teacher, tmp_path / "t"), "--json").stdout))
    assert [one["computed"] for one in computed] == [1, 1]


@pytest.mark.parametrize(
    ("extra", "code", "word"),
    [
        (("--resume",), 2, "targets go on by themselves"),
        (("--seed", "1"), 2, "view.seed="),
        (("--set", "views=3"), 1, "unknown field `views`"),
        (("--set", "view.count=0"), 1, "view.count"),
        (("--set", "device=cuda:7"), 1, "cuda:7"),
        (("--teacher", "nowhere"), 1, "is no run folder"),
    ],
)
def test_what_does_not_fit_is_one_message_and_nothing_is_written(dla, tiny, teacher, tmp_path, extra, code, word):
    ended = dla("train", "targets", *flags_of(tiny, teacher, tmp_path / "targets"), *extra)
    assert ended.exit_code == code
    assert word in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "targets").exists()
