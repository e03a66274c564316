"""`dla cache plan`: what a build will do and cost, on the terminal and as a file."""

import json

import pytest

from dla_cache.errors import SourceError
from dla_cache.plan import read_plan
from dla_cache.store import open_store

SOURCE = """
import numpy as np
from dla_cache.spec import LatentFormat, Recipe

class Means:
    def __init__(self, spec, device):
        latent = LatentFormat(kind="continuous", shape=(3, 1, 1), axes=("channel", "height", "width"), dtype=spec.dtype)
        self.recipe = Recipe(modality=spec.modality, source=spec.source, weights_sha256="", parameters=spec.parameters,
                             seed=spec.seed, source_view_size=4, format=latent)
    def encode(self, pixels, seeds):
        return pixels.mean(axis=(2, 3), keepdims=True).astype(np.float32)
    def close(self):
        pass
"""


@pytest.fixture
def plan(dla, tiny, tmp_path, monkeypatch):
    """Runs `dla cache plan` on the tiny data set in an empty folder, with a source of one's own."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = ("--source", f"{name}:Means", "--modality", "normals", "--set", "shard_size=10")
    manifest = tiny.images / "manifest.parquet"
    return lambda *options: dla("cache", "plan", "--manifest", manifest, "--out", "s.zarr", *source, *options)


def test_plan_says_what_a_build_will_do_and_makes_no_store(plan, tmp_path):
    ended = plan("--price-per-hour", "2.5", "--devices", "4", "--students", "3", "--batches", "1", "--plan", "p.yaml")
    assert ended.exit_code == 0, ended.stderr
    lines = {line[:14].rstrip(): line[14:] for line in ended.stdout.splitlines()}
    assert lines["normals"] == "24 images: the store is not there yet"
    assert lines["store"] == "s.zarr, not there yet"
    assert lines["time"].endswith("with 4 devices: cpu")
    assert "at 2.5 an hour and device" in lines["cost"]
    assert "3 student runs of 100 epochs" in lines["no cache"]
    assert "not known to dla" in lines["licence"]
    assert lines["plan"] == "p.yaml; `dla cache build --plan p.yaml` applies it"
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".py", ".yaml"}
    assert read_plan(tmp_path / "p.yaml").latents["normals"].images == 24
    assert "# store         s.zarr, not there yet" in (tmp_path / "p.yaml").read_text()


def test_the_json_holds_the_plan_and_what_follows_from_it(plan):
    ended = plan("--json", "--batches", "2", "--epochs", "7")
    told = json.loads(ended.stdout)
    assert len(told["latents"]["normals"]["batch_seconds"]) == 2
    assert told["size_bytes"] == told["latents"]["normals"]["size_bytes"] > 0
    least, expected, most = told["device_hours"]
    assert 0 < least <= expected <= most
    assert told["online_hours"] == pytest.approx(7 * expected)
    assert told["break_even_students"] == 1


def test_names_can_be_masked_where_captions_are_read_alone(plan):
    ended = plan("--mask-class-names")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "no source of the spec reads captions" in ended.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--price-per-hour", "-1"),
        ("--price-per-hour", "nan"),
        ("--price-per-hour", "inf"),
        ("--batches", "0"),
        ("--devices", "0"),
        ("--epochs", "0"),
    ],
)
def test_what_no_plan_can_be_made_of_is_wrong_usage(plan, option):
    ended = plan(*option)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert option[0] in ended.stderr


def test_a_store_of_something_else_is_refused(dla, plan, tiny):
    ended = dla(
        *("cache", "plan", "--source", "embedded-depth-ridge", "--out", tiny.store, "--batches", "1"),
        *("--manifest", tiny.images / "manifest.parquet"),
    )
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "was built from another spec, source or manifest" in ended.stderr


def test_a_source_that_cannot_be_opened_is_one_message(dla, plan, tiny, monkeypatch):
    monkeypatch.setattr("dla_cache.sources.open_source", lambda *_: (_ for _ in ()).throw(SourceError("no weights")))
    ended = plan()
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "error: no weights" in ended.stderr


def test_build_does_what_the_plan_says_and_it_may_be_run_again(dla, plan, tmp_path):
    assert plan("--plan", "p.yaml", "--batch-size", "5").exit_code == 0
    planned = read_plan(tmp_path / "p.yaml")
    ended = dla("cache", "build", "--plan", "p.yaml", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["images_encoded"] == planned.latents["normals"].images == 24
    store = open_store("s.zarr")
    assert sum(record.size_bytes for record in store.committed("normals").values()) == planned.size_bytes
    assert {record.made_with["batch_size"] for record in store.committed("normals").values()} == {5}
    assert json.loads(dla("cache", "build", "--plan", "p.yaml", "--json").stdout)["images_encoded"] == 0


@pytest.mark.parametrize(
    "option",
    [
        ("--manifest", "m.parquet"),
        ("--out", "other.zarr"),
        ("--source", "embedded-depth"),
        ("--set", "shard_size=3"),
        ("--device", "cpu"),
        ("--batch-size", "64"),
        ("--images", "photos"),
        ("--image-encoding", "none"),
        ("--repair",),
        ("--append",),
        ("--mask-class-names",),
    ],
)
def test_what_the_plan_has_decided_is_refused_beside_it(dla, plan, option):
    assert plan("--plan", "p.yaml").exit_code == 0
    ended = dla("cache", "build", "--plan", "p.yaml", *option)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert f"the plan has decided {option[0]}" in " ".join(ended.stderr.replace("│", " ").split())


def test_build_refuses_a_plan_whose_manifest_is_another_one_by_now(dla, plan, tiny, tmp_path):
    assert plan("--plan", "p.yaml").exit_code == 0
    text = (tmp_path / "p.yaml").read_text()
    digest = read_plan(tmp_path / "p.yaml").manifest_sha256
    (tmp_path / "p.yaml").write_text(text.replace(digest, digest[::-1]))
    ended = dla("cache", "build", "--plan", "p.yaml")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "is not the manifest of the plan" in ended.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_build_refuses_a_plan_whose_source_makes_other_latents_by_now(dla, plan, tmp_path):
    assert plan("--plan", "p.yaml").exit_code == 0
    text = (tmp_path / "p.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text.replace("source_view_size: 4", "source_view_size: 8"))
    ended = dla("cache", "build", "--plan", "p.yaml")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "is another source than the one that was planned with: `source_view_size` `8` → `4`" in ended.stderr
