"""`dla cache adopt`, and what `verify` says of it and of a sample."""

import json
import shutil

import pytest

MODULE = """
import numpy as np
from dla_cache.spec import LatentFormat, Recipe

class Corners:
    def __init__(self, spec, device):
        axes = ("channel", "height", "width")
        latent = LatentFormat(kind="continuous", shape=(2, 2, 2), axes=axes, dtype=spec.dtype)
        self.recipe = Recipe(modality=spec.modality, source=spec.source, weights_sha256="", parameters={},
                             seed=spec.seed, source_view_size=8, format=latent)

    def encode(self, pixels, seeds):
        noise = [np.random.default_rng(seed).normal(scale=0.1, size=(2, 2, 2)) for seed in seeds]
        return (pixels[:, :2, 1::4, 1::4] / 255 + np.array(noise)).astype(np.float16)

    def close(self):
        pass
"""


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A copy of the tiny store, the source that made it as a module of another name, and a spec that names it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.store, tmp_path / "s")
    (tmp_path / "corners_renamed.py").write_text(MODULE)
    fields = {"modality": "depth", "source": "corners_renamed:Corners"}
    (tmp_path / "spec.yaml").write_text(json.dumps({"latents": [fields], "shard_size": 5}))
    return tmp_path


def test_what_was_refused_is_accepted_after_it_was_shown_to_be_harmless(dla, folder, tiny):
    listed = tiny.images / "manifest.parquet"
    build = ("cache", "build", "spec.yaml", "--manifest", listed, "--out", "s")
    assert "`dla cache adopt` takes a change" in dla(*build).stderr
    adopt = ("cache", "adopt", "s", "spec.yaml", "--why", "renamed", "--by", "Ada", "--images", tiny.images)
    refused = dla(*adopt)
    assert (refused.exit_code, "`--recompute 20` computes" in refused.stderr) == (1, True)
    adopted = dla(*adopt, "--recompute", 7)
    assert adopted.exit_code == 0, adopted.stderr
    assert adopted.stdout == (
        "adopted       depth: `source` `corners` → `corners_renamed:Corners`; 7 of 7 images equal\n"
    )
    assert dla(*build).exit_code == 0
    verified = dla("cache", "verify", "s", "--manifest", listed, "--recompute", 3)
    assert verified.exit_code == 0, verified.stderr
    assert "7 of 7 images equal; Ada, 20" in verified.stdout
    (told,) = json.loads(dla("cache", "verify", "s", "--json").stdout)["adopted"]
    assert (told["who"], told["why"], told["evidence"]["n_equal"]) == ("Ada", "renamed", 7)
    assert dla(*adopt).stdout.startswith("nothing to adopt: ")


def test_adopting_needs_a_reason_and_a_thing_to_adopt(dla, folder):
    assert dla("cache", "adopt", "s", "--why", "x").exit_code == 2
    assert dla("cache", "adopt", "s", "spec.yaml").exit_code == 2
    assert dla("cache", "adopt", "s", "spec.yaml", "--why", " ").exit_code == 2
    assert dla("cache", "adopt", "s", "spec.yaml", "--why", "x", "--recompute", 3).exit_code == 2
    assert not (folder / "s" / "adopted.json").exists()


def test_a_sample_says_what_was_not_read(dla, folder):
    ended = dla("cache", "verify", "s", "--sample", 2, "--seed", 1)
    assert ended.exit_code == 0, ended.stderr
    assert "checked       2 shards, " in ended.stdout
    assert "depth: 2 of 5 shards: " in ended.stdout
    assert "not read      3 shards: of these only presence and size were compared" in ended.stdout
    assert ended.stdout.rstrip().endswith(" by the records alone")
    told = json.loads(dla("cache", "verify", "s", "--sample", "0.5", "--jobs", 1, "--json").stdout)
    assert (told["shards_checked"], told["sample"]["unread"]) == (3, {"depth": 2})
    for wrong in ("0", "1.5", "-1"):
        assert dla("cache", "verify", "s", "--sample", wrong).exit_code == 2
