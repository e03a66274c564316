"""`dla sources`: what can fill a cache, and how the embedded sources are made."""

import json
import signal

import pytest

from dla_cache.data.relief_digits import SPLITS, Split
from dla_cache.errors import WorkInterrupted
from dla_cache.sources import SOURCES
from dla_cache.sources.fit import EmbeddedFit
from dla_cache.sources.fit_pairs import DepthPairs


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A fit of a few steps on few digits."""
    monkeypatch.setitem(SPLITS, "generator", Split(3, 8, labelled=False))
    stage = "{steps: 4, batch_size: 4, learning_rate: 1.0e-3}"
    (tmp_path / "fit.yaml").write_text(f"held_out_digits: 5\nautoencoder: {stage}\nflow: {stage}\n")
    return tmp_path / "fit.yaml"


def test_list_shows_every_source(dla):
    ended = dla("sources", "list")
    assert ended.exit_code == 0
    lines = ended.stdout.splitlines()
    assert lines[::2] == [f"{name} ({entry.modality.value})" for name, entry in SOURCES.items()]
    assert lines[1::2] == [f"    {entry.summary}" for entry in SOURCES.values()]
    assert max(map(len, lines)) <= 120
    told = json.loads(dla("sources", "list", "--json").stdout)
    assert {name: entry["modality"] for name, entry in told.items()} == {n: e.modality for n, e in SOURCES.items()}


def test_a_fit_that_is_interrupted_goes_on_when_it_is_run_again(dla, spec, tmp_path, monkeypatch):
    batch = DepthPairs.batch

    def interrupted(pairs, seed, step, size):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch(pairs, seed, step, size)

    with monkeypatch.context() as patch:
        patch.setattr(DepthPairs, "batch", interrupted)
        stopped = dla("sources", "fit", spec, "--out", tmp_path / "fit")
    assert (stopped.exit_code, stopped.stdout) == (1, "")
    assert "stopped at step 3 of 4" in stopped.stderr
    assert "hint: " in stopped.stderr
    ended = dla("sources", "fit", spec, "--out", tmp_path / "fit", "--json")
    assert ended.exit_code == 0, ended.stderr
    scores = json.loads(ended.stdout)
    assert set(scores) == {"embedded-depth", "embedded-depth-ridge", "the autoencoder alone"}
    assert {tuple(of_one) for of_one in scores.values()} == {("depth_correlation", "latent_r2")}  # in one order always
    stages = [line.partition(",")[0] for line in ended.stderr.splitlines()]
    assert stages == ["autoencoder: 4/4 steps", "flow: 4/4 steps", "ridge: 200/200 images"]
    assert {path.name for path in (tmp_path / "fit").iterdir() if path.is_file()} == {
        "embedded-depth.md",
        "fit.json",
        "embedded-depth.safetensors",
        "embedded-depth-ridge.safetensors",
    }
    for stage in ("autoencoder", "flow"):
        lines = (tmp_path / "fit" / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [4]


def test_a_fit_does_not_go_on_with_other_settings(dla, spec, tmp_path, monkeypatch):
    folder = tmp_path / "fit"

    def stop(_):
        raise WorkInterrupted("stopped")

    monkeypatch.setattr(EmbeddedFit, "autoencoder_stage", stop)
    for _ in range(2):
        assert "stopped" in dla("sources", "fit", spec, "--out", folder).stderr
    ended = dla("sources", "fit", spec, "--out", folder, "--set", "seed=1", "--set", "flow.steps=5")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "`flow.steps` `4` → `5`; `seed` `0` → `1`" in ended.stderr
    assert f"hint: choose another --out, or remove `{folder}`" in ended.stderr
    assert [path.name for path in folder.rglob("*")] == ["fit.json"]


def test_a_fit_whose_settings_are_unknown_does_not_go_on(dla, spec, tmp_path):
    (tmp_path / "fit" / "stages" / "flow").mkdir(parents=True)
    ended = dla("sources", "fit", spec, "--out", tmp_path / "fit")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "no `fit.json`" in ended.stderr
    (tmp_path / "fit" / "fit.json").write_text("{")
    assert "fit.json` cannot be read" in dla("sources", "fit", spec, "--out", tmp_path / "fit").stderr


@pytest.mark.parametrize("setting", ["seed=-1", "held_out_digits=30", "held_out_digits=500"])
def test_a_setting_out_of_bounds_is_one_message(dla, spec, tmp_path, setting):
    ended = dla("sources", "fit", spec, "--out", tmp_path / "fit", "--set", setting)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert f"`{setting.partition('=')[0]}`" in ended.stderr
    assert not (tmp_path / "fit").exists()


def test_an_unknown_field_is_one_message(dla, spec, tmp_path):
    ended = dla("sources", "fit", spec, "--out", tmp_path / "fit", "--set", "flow.stepz=3")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "`flow.stepz`" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "fit").exists()


def test_wrong_usage_ends_with_2(dla, spec):
    assert dla("sources", "fit", spec).exit_code == 2
    assert dla("sources", "list", "--long").exit_code == 2
