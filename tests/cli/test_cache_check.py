"""`dla cache verify --recompute`, `explain`, `diff`: what they print, and when they fail."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def stores(tiny, tmp_path_factory):
    """Two stores of the same images by a source of another seed, and the source as a module of the user's."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "corners.py").write_text(
        "import numpy as np\n"
        "from dla_cache.spec import LatentFormat, Recipe\n"
        "class Corners:\n"
        "    def __init__(self, spec, device):\n"
        "        axes = ('channel', 'height', 'width')\n"
        "        latent = LatentFormat(kind='continuous', shape=(2, 2, 2), axes=axes, dtype=spec.dtype)\n"
        "        self.recipe = Recipe(modality=spec.modality, source=spec.source, weights_sha256='', parameters={},\n"
        "                             seed=spec.seed, source_view_size=8, format=latent)\n"
        "    def encode(self, pixels, seeds):\n"
        "        noise = [np.random.default_rng(seed).normal(scale=0.1, size=(2, 2, 2)) for seed in seeds]\n"
        "        return (pixels[:, :2, 1::4, 1::4] / 255 + np.array(noise)).astype(np.float16)\n"
        "    def close(self):\n"
        "        pass\n"
    )
    return folder


@pytest.fixture
def built(stores, tiny, dla, monkeypatch):
    monkeypatch.chdir(stores)
    for name, seed in (("a", 0), ("b", 1)):
        if not (stores / name).exists():
            fields = {"modality": "depth", "source": "corners:Corners", "seed": seed}
            (stores / "spec.yaml").write_text(json.dumps({"latents": [fields], "shard_size": 5}))
            ended = dla("cache", "build", "spec.yaml", "--manifest", tiny.images / "manifest.parquet", "--out", name)
            assert ended.exit_code == 0, ended.stderr
    return stores


def test_recomputing_finds_the_same_bytes_and_says_how_many(dla, built, tiny):
    manifest = tiny.images / "manifest.parquet"
    ended = dla("cache", "verify", "a", "--manifest", manifest, "--recompute", 7)
    assert ended.exit_code == 0, ended.stderr
    assert "recomputed    depth: 7 of 7 images equal, byte for byte" in ended.stdout
    told = json.loads(dla("cache", "verify", "a", "--images", tiny.images, "--recompute", 99, "--json").stdout)
    assert (told["recomputed"][0]["n_equal"], told["problems"]) == (24, [])


def test_a_source_that_changed_fails_unless_the_difference_is_allowed(dla, built, tiny):
    module = built / "corners.py"
    content = module.read_text()
    module.write_text(content.replace("/ 255 +", "/ 254.9 +"))
    sys.modules.pop("corners", None)
    try:
        command = ("cache", "verify", "a", "--images", tiny.images, "--recompute", 24)
        failed = dla(*command)
        assert failed.exit_code == 1
        assert "what the sources make now differs from `a` beyond what they say of themselves: `depth`" in failed.stderr
        assert "largest difference" in failed.stdout
        assert dla(*command, "--tolerance", "0.1").exit_code == 0
    finally:
        module.write_text(content)
        sys.modules.pop("corners", None)


def test_recomputing_needs_images_and_images_need_recomputing(dla, built, tiny):
    assert "this store holds no images" in dla("cache", "verify", "a", "--recompute", 3).stderr
    assert dla("cache", "verify", "a", "--images", tiny.images).exit_code == 2


def test_explain_says_the_worst_and_lists_what_each_place_says(dla, built, tiny):
    ended = dla("cache", "explain", "a", "test-2", "--manifest", tiny.images / "manifest.parquet")
    assert ended.stdout.splitlines()[0] == "test-2 is whole"
    assert [line.split()[:2] for line in ended.stdout.splitlines()[-3:]] == [
        ["depth", "whole"],
        ["manifest", "whole"],
        ["file", "whole"],
    ]
    assert json.loads(dla("cache", "explain", "a", "nobody", "--json").stdout)["state"] == "unknown"


def test_diff_exits_with_one_where_something_differs_and_names_it(dla, built):
    same = dla("cache", "diff", "a", "a")
    assert (same.exit_code, same.stdout) == (0, "compared 24 images of both: the same\n")
    other = dla("cache", "diff", "a", "b")
    assert other.exit_code == 1
    assert "`depth.seed` `0` → `1`" in other.stdout
    assert "another `depth`: 24 images, `labelled-0`" in other.stdout
    told = json.loads(dla("cache", "diff", "a", "b", "--json").stdout)
    assert (told["is_empty"], len(told["latents"]["depth"])) == (False, 24)
