"""The guide's worked plugin: a third-party package whose latents are the paper's 256 tokens of 64 channels."""

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import SourceError, SpecError
from dla_cache.pairs import PairStream
from dla_cache.recompute import recompute
from dla_cache.sources import ENTRY_POINTS, LatentSource, open_source
from dla_cache.sources.check import check_source, sample_images
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests.dla_cache.conftest import make_manifest
from tests.entry_points import write_entry_points

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own-source.md"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the guide's package is installed from, which is the folder we are in, with its weights."""
    text = GUIDE.read_text(encoding="utf-8")
    folder = tmp_path / "package"
    folder.mkdir()
    for name, content in re.findall(r"<!-- file: ([\w.-]+) -->\n```\w+\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(content)
    write_entry_points(folder / "pyproject.toml", folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["shape_tokens.py", "shape-weights"])
    runpy.run_path("shape_tokens.py", run_name="__main__")
    yield folder
    sys.modules.pop("shape_tokens", None)


def spec(**parameters: Any) -> LatentSpec:
    return LatentSpec(modality="shape", source="shape-tokens", parameters={"steps": 2, **parameters}, dtype="float32")


@pytest.fixture
def source(package: Path) -> Iterator[LatentSource]:
    with closing(open_source(spec(), "cpu")) as opened:
        yield opened


def test_the_package_names_its_source_to_dla(package: Path) -> None:
    (named,) = entry_points(group=ENTRY_POINTS, name="shape-tokens")
    assert named.value == "shape_tokens:ShapeTokens"


def test_every_claim_of_a_check_holds_and_its_decoder_is_watched(package: Path) -> None:
    found = check_source(spec(), "cpu", sample_images(), open_source=open_source)
    assert not found.failed
    assert any("ShapeDecoder.decode" in claim.measured for claim in found.claims)


def test_a_store_of_it_streams_tokens_that_a_recomputation_finds_again(package: Path, tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "data", 6)
    wanted = CacheSpec(latents=(spec(),), shard_size=4)
    build_cache(manifest, wanted, tmp_path / "store", open_source=open_source, batch_size=4)
    store = open_store(tmp_path / "store")
    assert not verify_store(store).problems
    batch = PairStream(store, None, None, 3, seed=0, decode=None, images=False).batch(0)
    assert np.asarray(batch.latents["shape"]).shape == (3, 256, 64)
    (found,) = recompute(store, manifest.root, 2, open_source=open_source)
    assert found.is_within


def test_a_generator_that_decodes_after_all_is_an_error(source: LatentSource, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    generator = source.generator  # type: ignore[attr-defined]
    generate = type(generator).generate

    def decoding(self: Any, images: Any, noise: Any, steps: int) -> Any:
        tokens = generate(self, images, noise, steps)
        self.decoder.decode(tokens, torch.zeros(1, 3))
        return tokens

    monkeypatch.setattr(type(generator), "generate", decoding)
    with pytest.raises(SourceError, match=r"called its decoder, `decoder\.decode`"):
        source.encode(np.zeros((1, 3, 64, 64), np.uint8), [0])


def test_its_recipe_has_the_weights_hash_and_no_path(source: LatentSource, package: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = package / "other"
    other.mkdir()
    weights = load_file("shape-weights/model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, other / "model.safetensors")
    with closing(open_source(spec(model=str(other)), "cpu")) as changed:
        assert changed.recipe.weights_sha256 != source.recipe.weights_sha256
        assert str(other) not in f"{changed.recipe.model_dump_json()}{changed.made_with}"  # type: ignore[attr-defined]
    assert source.recipe.parameters == {"steps": 2}


@pytest.mark.parametrize(
    ("parameters", "error", "fault"),
    [
        ({"model": "nowhere"}, SourceError, "are not on this machine"),
        ({"model": "owner/wrong"}, SourceError, "no weights of `shape-tokens`"),
        ({"stepps": 3}, SpecError, "did you mean `steps`"),
    ],
)
def test_weights_that_are_not_there_or_not_its_own_and_unknown_settings_are_one_message(
    package: Path, parameters: dict[str, Any], error: type[Exception], fault: str
) -> None:
    import torch
    from safetensors.torch import save_file

    (package / "owner" / "wrong").mkdir(parents=True)
    save_file({"other": torch.zeros(1)}, package / "owner" / "wrong" / "model.safetensors")
    with pytest.raises(error, match=fault):
        open_source(spec(**parameters), "cpu")
