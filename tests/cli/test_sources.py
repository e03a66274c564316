"""`dla sources`: what can fill a cache, whether it does so rightly, and how the embedded sources are made."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dla_cache.data.relief_digits import SPLITS, Split
from dla_cache.errors import WorkInterrupted
from dla_cache.sources import SOURCES
from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.fit import EmbeddedFit
from dla_cache.sources.fit_pairs import DepthPairs
from dla_cache.sources.loading import CommonParameters
from dla_cache.sources.table import OF_CAPTIONS, OF_WEIGHTS
from tests.fake_hub import COMMITS, serve_hub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A fit of a few steps on few digits."""
    monkeypatch.setitem(SPLITS, "generator", Split(3, 8, labelled=False))
    stage = "{steps: 4, batch_size: 4, learning_rate: 1.0e-3}"
    (tmp_path / "fit.yaml").write_text(f"held_out_digits: 5\nautoencoder: {stage}\nflow: {stage}\n")
    return tmp_path / "fit.yaml"


def test_list_shows_every_source_in_a_line(dla):
    ended = dla("sources", "list")
    assert ended.exit_code == 0
    header, *lines = ended.stdout.splitlines()
    assert header.split()[:3] == ["name", "modality", "bytes/image"]
    assert [line.split()[:2] for line in lines] == [[name, entry.modality.value] for name, entry in SOURCES.items()]
    for line, entry in zip(lines, SOURCES.values(), strict=True):
        assert entry.summary in line
        assert entry.licence.partition(";")[0] in line


def test_list_of_one_modality_leaves_out_the_others(dla):
    told = json.loads(dla("sources", "list", "--modality", "audio", "--json").stdout)
    assert list(told) == [name for name, entry in SOURCES.items() if entry.modality == "audio"]
    assert told["embedded-audio"]["bytes_per_image"] == 256
    ended = dla("sources", "list", "--modality", "smell")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "no source makes" in ended.stderr


@pytest.mark.parametrize("name", SOURCES)
def test_show_says_all_that_the_catalog_says_of_a_source(dla, name):
    ended = dla("sources", "show", name)
    assert ended.exit_code == 0
    entry = SOURCES[name]
    for text in (name, entry.summary, entry.model, entry.licence, entry.size, entry.location):
        assert text in ended.stdout
    if isinstance(entry.row, PipelineRow):
        told = json.loads(dla("sources", "show", name, "--json").stdout)["row"]
        for text in (entry.row.pipeline, entry.row.space, *entry.row.axes, *entry.row.schedulers, *entry.row.guard):
            assert text in ended.stdout
        assert told["settings"] == dict(entry.row.settings)
        assert told["tolerance"] == entry.row.tolerance


def test_show_of_an_unknown_source_names_those_of_like_names(dla):
    ended = dla("sources", "show", "embeded-depth")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "there is no source `embeded-depth`" in ended.stderr
    assert "`embedded-depth`" in ended.stderr


def test_neither_list_nor_show_imports_a_heavy_package():
    show = "import sys; from cli.main import app; app(['sources', 'show', 'embedded-depth'], standalone_mode=False);"
    show += "app(['sources', 'list'], standalone_mode=False); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy = {"torch", "diffusers", "transformers", "pyarrow", "zarr", "huggingface_hub"}
    assert heavy & set(ended.stdout.splitlines()[-1].split()) == set()


def test_show_names_every_setting_that_all_generators_have():
    assert {*OF_WEIGHTS, *OF_CAPTIONS, "scheduler"} == set(CommonParameters.model_fields)


OWN = """
import numpy as np
from dla_cache.spec import LatentFormat, Recipe

class Faulty:
    def __init__(self, spec, device):
        latent = LatentFormat(kind="continuous", shape=(1, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype)
        self.recipe = Recipe(modality=spec.modality, source=spec.source, weights_sha256="", parameters=spec.parameters,
                             seed=spec.seed, source_view_size=4, format=latent)
    def encode(self, pixels, seeds):
        return pixels[:, :1, ::2, ::2].astype(np.float32)
    def close(self):
        pass

class Good(Faulty):
    ignores_seed = True
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of one's own in the current folder, under a name that no other test imports."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return name


def test_check_prints_a_line_for_each_claim(dla, own):
    ended = dla("sources", "check", f"{own}:Good", "--modality", "normals", "--set", "seed=3", "--set", "strength=0.5")
    assert ended.exit_code == 0, ended.stderr
    claims = ended.stdout.partition("\n\n")[2].splitlines()
    assert len(claims) == 12
    assert all(line.startswith("ok ") for line in claims)


def test_a_claim_that_does_not_hold_ends_check_with_1_and_is_named(dla, own):
    ended = dla("sources", "check", f"{own}:Faulty", "--modality", "normals", "--json")
    assert ended.exit_code == 1
    assert "fails 1 of 12 claims: `another seed gives another latent`" in ended.stderr
    told = json.loads(ended.stdout)
    assert not told["passes"]
    assert [claim["name"] for claim in told["claims"] if not claim["holds"]] == ["another seed gives another latent"]


def test_check_takes_images_of_a_folder(dla, own, tmp_path):
    ended = dla("sources", "check", f"{own}:Good", "--modality", "normals", "--images", tmp_path)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "holds 0 images" in ended.stderr
    assert dla("sources", "check", f"{own}:Good", "--modality", "normals", "--images", tmp_path / "no").exit_code == 2


def test_check_asks_for_the_modality_of_a_source_that_dla_does_not_know(dla, own):
    ended = dla("sources", "check", f"{own}:Good")
    assert ended.exit_code == 2
    assert "--modality" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a source"),
        (["embedded-depth", "embedded-audio", "--model", "a/b"], "one source"),
        (["marigold-depth", "marigold-normals", "--revision", "v1"], "one source"),
    ],
)
def test_wrong_usage_of_fetch_ends_with_2(dla, arguments, message):
    ended = dla("sources", "fetch", *arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert message in ended.stderr


def test_fetch_of_what_is_shipped_has_nothing_to_do(dla):
    ended = dla("sources", "fetch", "embedded-depth", "embedded-audio")
    assert (ended.exit_code, ended.stdout) == (
        0,
        "embedded-depth, embedded-audio: shipped with dla, nothing to fetch\n",
    )
    ended = dla("sources", "fetch", "embeded-depth")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "there is no source `embeded-depth`" in ended.stderr


@pytest.fixture
def hub(monkeypatch):
    """A hub that `dla sources fetch` finds by its environment."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def test_fetch_says_what_it_brings_and_a_dry_run_brings_nothing(dla, hub, tmp_path):
    arguments = ("sources", "fetch", "--model", "we/pipeline", "--variant", "fp16", "--out", tmp_path / "weights")
    dry = dla(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert COMMITS["main"] in dry.stdout
    assert "licence openrail++" in dry.stdout
    assert not (tmp_path / "weights").exists()
    (told,) = json.loads(dla(*arguments, "--json").stdout)
    assert (told["commit"], told["files"], told["fetched"]) == (COMMITS["main"], 4, True)
    folder = tmp_path / "weights" / "we" / "pipeline"
    assert told["place"] == str(folder)
    assert (
        sum(path.stat().st_size for path in folder.rglob("*") if ".cache" not in path.parts and path.is_file())
        == (told["bytes"])
    )
    again = dla(*arguments)
    assert "to fetch  0 bytes" in again.stdout
    assert f"parameters: {{model: {folder}}}" in again.stdout


def test_fetch_of_a_gated_repository_says_so_and_how_to_get_it(dla, hub, tmp_path):
    ended = dla("sources", "fetch", "--model", "we/gated", "--out", tmp_path / "weights")
    assert ended.exit_code == 1
    assert f"gated   yes: accept its licence at {hub.url}/we/gated" in ended.stdout
    assert "`we/gated` is gated" in ended.stderr
    assert "HF_TOKEN" in ended.stderr


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
