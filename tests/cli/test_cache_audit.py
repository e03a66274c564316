"""`dla cache audit`, and `dla cache build` with `--mask-class-names` and `--synonyms`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dla_cache.manifest import ManifestRow, write_manifest
from tests.dla_cache.conftest import sha256_of
from tests.dla_cache.sources import tiny_caption

OWN = '''
import numpy as np
from dla_cache.sources import Encoded
from dla_cache.spec import LatentFormat, Recipe

class Told:
    """Says of a bright image that there is a cat, and of a dark one a kitten."""

    def __init__(self, spec, device):
        latent = LatentFormat(kind="continuous", shape=(1,), axes=("channel",), dtype=spec.dtype)
        self.recipe = Recipe(modality=spec.modality, source=spec.source, weights_sha256="", parameters={},
                             seed=spec.seed, source_view_size=4, format=latent)

    def encode(self, pixels, seeds):
        means = pixels.mean((1, 2, 3))
        return Encoded(means[:, None].astype("float32"), ["a cat" if mean > 127 else "a kitten" for mean in means])

    def close(self):
        pass
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four images, two bright and two dark, of classes `cat` and `dog`; a source that tells captions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "told_captions.py").write_text(OWN)
    (tmp_path / "synonyms.yaml").write_text("cat: [kitten]\n")
    rows = []
    for number, brightness in enumerate((250, 200, 20, 10)):
        path = tmp_path / f"{number}.png"
        noise = np.random.default_rng(number).integers(0, 6, (32, 32, 3), np.uint8)
        Image.fromarray(noise + np.uint8(brightness)).save(path)
        rows.append(ManifestRow(f"image-{number}", path.name, number % 2, "train", sha256_of(path), 32, 32))
    write_manifest(tmp_path / "m.parquet", rows, ("cat", "dog"))
    return tmp_path


def build(dla, *options):
    source = ("--source", "told_captions:Told", "--modality", "audio")
    return dla("cache", "build", *source, "--manifest", "m.parquet", "--out", "s", "--device", "cpu", *options)


def test_a_build_says_how_many_captions_name_a_class_and_so_does_the_audit(dla, folder):
    told = "2 of 4 captions name a class; 1 of 4 with a label their own"
    assert f"captions      audio: {told}" in build(dla).stdout
    ended = dla("cache", "audit", "s")
    assert ended.exit_code == 0
    assert f"audio, by told_captions:Told: {told}" in ended.stdout
    assert "--mask-class-names" in ended.stdout
    assert f"captions: {told}" in (folder / "s" / "README.md").read_text()


def test_synonyms_are_counted_when_they_are_named_at_the_build(dla, folder):
    assert build(dla, "--synonyms", "synonyms.yaml").exit_code == 0
    (audit,) = json.loads(dla("cache", "audit", "s", "--json").stdout)["modalities"]
    assert audit["counts"] == {
        "captions": 4, "empty": 0, "named": 4, "labelled": 4, "own_class": 2, "synonym_only": 2
    }  # fmt: skip


def test_synonyms_cannot_be_looked_for_in_captions_that_are_gone(dla, folder):
    build(dla)
    ended = dla("cache", "audit", "s", "--synonyms", "synonyms.yaml")
    assert ended.exit_code == 1
    assert "holds no captions" in ended.stderr


def test_captions_that_are_stored_are_counted_again_with_synonyms(dla, folder):
    tiny_caption.save(folder / "blip")
    settings = ("--set", "latents.0.parameters.model=blip", "--set", "latents.0.parameters.caption_tokens=8")
    out = ("--manifest", "m.parquet", "--out", "s", "--device", "cpu")
    ended = dla("cache", "build", "--source", "blip-caption", *settings, *out)
    assert ended.exit_code == 0, ended.stderr
    assert "captions      caption: 0 of 4 captions name a class" in ended.stdout
    (folder / "of_all.yaml").write_text(f"cat: {json.dumps(list(tiny_caption.WORDS))}\n")
    (before,) = json.loads(dla("cache", "audit", "s", "--json").stdout)["modalities"]
    ended = dla("cache", "audit", "s", "--synonyms", "of_all.yaml", "--captioner", "blip", "--json")
    (audit,) = json.loads(ended.stdout)["modalities"]
    n_words = before["counts"]["captions"] - before["counts"]["empty"]
    assert before["counts"]["named"] == 0
    assert audit["counts"]["named"] == audit["counts"]["synonym_only"] == n_words > 0
    (folder / "blip" / "config.json").write_text((folder / "blip" / "config.json").read_text() + " ")
    ended = dla("cache", "audit", "s", "--synonyms", "of_all.yaml", "--captioner", "blip")
    assert ended.exit_code == 1
    assert "is not the captioner" in ended.stderr


def test_class_names_and_synonyms_to_mask_are_part_of_the_resolved_spec(dla, folder):
    build_caption = ("cache", "build", "--source", "blip-caption", "--manifest", "m.parquet", "--out", "s")
    ended = dla(*build_caption, "--mask-class-names", "--synonyms", "synonyms.yaml", "--dry-run")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["latents"][0]["parameters"] == {"masked_words": "cat|dog|kitten"}
    assert not Path("s").exists()


def test_masking_without_a_source_that_reads_captions_is_an_error(dla, folder):
    ended = build(dla, "--mask-class-names")
    assert ended.exit_code == 1
    assert "no source of the spec reads captions" in ended.stderr


def test_a_store_without_captions_says_so(dla, folder):
    (folder / "no_captions.py").write_text(OWN.replace("return Encoded(", "return _first("))
    with (folder / "no_captions.py").open("a") as file:
        file.write("def _first(latents, _captions):\n    return latents\n")
    source = ("--source", "no_captions:Told", "--modality", "audio")
    assert dla("cache", "build", *source, "--manifest", "m.parquet", "--out", "s", "--device", "cpu").exit_code == 0
    ended = dla("cache", "audit", "s")
    assert "no captions were read" in ended.stdout
    assert "--mask-class-names" not in ended.stdout
