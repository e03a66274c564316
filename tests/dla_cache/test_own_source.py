"""A user's own source, `module:Class`: the documented one works, what is no source is refused."""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dla_cache.errors import SourceError, SpecError
from dla_cache.sources import SOURCES, Encoded, open_source
from dla_cache.spec import CacheSpec, LatentSpec, load_yaml, parse_spec

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own-source.md"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The guide's files, and a name to put others under."""
    text = GUIDE.read_text(encoding="utf-8")
    for name, content in re.findall(r"<!-- file: ([\w.-]+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_sources", None)
    sys.modules.pop("others", None)


def test_the_source_of_the_guide_encodes_what_its_recipe_declares(module):
    spec = parse_spec(load_yaml(module / "own-cache.yaml"), CacheSpec, where="own-cache.yaml").latents[0]
    source = open_source(spec, "cpu")
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8), (3, 3, 64, 64))
    latents = source.encode(ramp, [0, 1, 2])
    assert latents.shape == (3, *source.recipe.format.shape)
    assert np.allclose(latents[:, 0], 4)
    assert np.allclose(latents[:, 1], 0)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("nowhere:Source", "needs the module `nowhere`"),
        ("my_sources:Missing", "no `Missing` in module"),
        ("others:empty", "no source"),
        ("others:renamed", "says source `other`"),
        (":Source", "cannot be imported"),
    ],
)
def test_what_is_no_source_of_this_spec_is_one_message(module, source, fault):
    (module / "others.py").write_text(
        "import my_sources\n"
        "def empty(spec, device):\n    return object()\n"
        "def renamed(spec, device):\n"
        "    return my_sources.Gradients(spec.model_copy(update={'source': 'other'}), device)\n"
    )
    with pytest.raises(SourceError, match=fault) as refused:
        open_source(LatentSpec(modality="normals", source=source), "cpu")
    assert refused.value.hint


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("self.close = None", "no method `close`"),
        ("self.made_with = {'loss': float('nan')}", "`loss` is no text"),
        ("self.made_with = {'config': {}}", "`config` is no text"),
        ("self.made_with = ['torch']", "no mapping"),
        ("self.tolerance = 'small'", "the tolerance `small`"),
        ("self.recipe = changed(self.recipe, axes=('token', 'height', 'width'))", "no axis `channel`"),
        ("self.recipe = self.recipe.model_copy(update={'format': self.recipe.format.with_draws(2)})", "axis `draw`"),
        ("self.recipe = self.recipe.model_copy(update={'parameters': {'a': float('inf')}})", "parameter `a` of inf"),
    ],
)
def test_what_would_fail_only_after_a_shard_was_computed_is_told_when_a_source_is_opened(module, change, fault):
    (module / "others.py").write_text(
        "import my_sources\n"
        "def changed(recipe, **fields):\n"
        "    return recipe.model_copy(update={'format': recipe.format.model_copy(update=fields)})\n"
        "class Other(my_sources.Gradients):\n"
        "    def __init__(self, spec, device):\n"
        "        super().__init__(spec, device)\n"
        f"        {change}\n"
    )
    with pytest.raises(SourceError, match=fault):
        open_source(LatentSpec(modality="normals", source="others:Other"), "cpu")


def test_more_draws_than_a_latent_can_have_are_refused(module):
    (module / "others.py").write_text(
        "import my_sources\n"
        "class Other(my_sources.Gradients):\n"
        "    def __init__(self, spec, device):\n"
        "        super().__init__(spec, device)\n"
        "        large = self.recipe.format.model_copy(update={'shape': (2, 1024, 1024)})\n"
        "        self.recipe = self.recipe.model_copy(update={'format': large})\n"
    )
    with pytest.raises(SpecError, match="cannot be stored in 1024 draws"):
        open_source(LatentSpec(modality="normals", source="others:Other", draws=1024), "cpu")


def test_a_name_that_two_packages_give_a_source_is_refused(module):
    for package, location in (("one", "my_sources:Gradients"), ("two", "others:Other")):
        told = module / f"{package}-1.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
        (told / "entry_points.txt").write_text(f"[dla.sources]\ngradients = {location}\n")
    with pytest.raises(SourceError, match=r"2 installed packages have a source `gradients`: `my_sources:Gradients`"):
        open_source(LatentSpec(modality="normals", source="gradients"), "cpu")


@pytest.mark.parametrize("source", ["dinov2", "sd-img2img"])
def test_a_source_fills_no_modality_of_another_kind(source):
    with pytest.raises(SourceError, match="not `audio-mine`") as refused:
        open_source(LatentSpec(modality="audio-mine", source=source), "cpu")
    assert f"modality: {SOURCES[source].modality}" in refused.value.hint


@pytest.mark.parametrize("place", [-1, 2, "image-0"])
def test_an_image_that_is_not_in_the_batch_cannot_be_rejected(place):
    with pytest.raises(SourceError, match=f"rejected image `{place}` of a batch of 2"):
        Encoded(np.zeros((2, 1)), rejected={place: "blank"})


@pytest.mark.parametrize("captions", [["one"], "ab", [1, 2], None])
def test_captions_are_one_text_an_image_or_none(captions):
    with pytest.raises(SourceError, match="captions"):
        Encoded(np.zeros((2, 1)), captions)


def test_a_library_that_cannot_be_imported_is_an_error_with_its_reason(module, monkeypatch):
    (module / "others.py").write_text("raise ValueError('bogus is no attention backend')\n")
    entry = SOURCES["embedded-depth"]
    monkeypatch.setitem(SOURCES, "embedded-depth", dataclasses.replace(entry, location="others:Source"))
    with pytest.raises(SourceError, match="bogus is no attention backend") as refused:
        open_source(LatentSpec(modality="depth", source="embedded-depth"), "cpu")
    assert "DIFFUSERS_ATTN_BACKEND" in refused.value.hint
