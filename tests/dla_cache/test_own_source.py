"""A user's own source, `module:Class`: the documented one works, what is no source is refused."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dla_cache.errors import SourceError
from dla_cache.sources import open_source
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
