"""One suite for every row of the catalog, on a tiny checkpoint that is saved and loaded as users do it."""

import importlib
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dla_cache.build import build_cache
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.pairs import PairStream
from dla_cache.sources import SOURCES, Encoded, LatentSource, open_source
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests.dla_cache.conftest import sha256_of
from tests.dla_cache.sources.conftest import places, some_pixels, spec_of, tiny_rows
from tests.dla_cache.sources.tiny import pictures

ROWS = sorted(tiny_rows())
SEEDS = (11, 12, 13)


def latents_of(put_out: Any) -> np.ndarray[Any, Any]:
    return put_out.latents if isinstance(put_out, Encoded) else put_out


def test_every_source_that_is_not_shipped_with_its_weights_is_tried() -> None:
    assert set(ROWS) == {name for name in SOURCES if not name.startswith("embedded-")}


@pytest.fixture
def manifest(tmp_path: Path, row: str) -> Manifest:
    """Three images of the size of the row's view."""
    rows, side = [], tiny_rows()[row].view_size
    for number, picture in enumerate(pictures(some_pixels(side))):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        rows.append(ManifestRow(f"image-{number}", path.name, None, "train", sha256_of(path), side, side))
    return write_manifest(tmp_path / "manifest.parquet", rows, ())


@pytest.mark.parametrize("row", ROWS)
def test_the_stored_latents_are_those_of_the_library_itself_and_nothing_was_decoded(
    row: str, manifest: Manifest, tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, folder = tiny_rows()[row], checkpoint(row)
    spec = spec_of(row, folder)
    seeds = [sample_seed(spec.seed, spec.modality.value, f"image-{number}") for number in range(3)]
    expected = tiny.stock(folder, some_pixels(tiny.view_size), seeds)

    def refuse(*_arguments: Any, **_settings: Any) -> Any:
        raise AssertionError("the decoder was called")

    for decoder in tiny.decoders:
        package, owner, method = decoder.split(".")
        monkeypatch.setattr(getattr(importlib.import_module(package), owner), method, refuse)
    build_cache(
        manifest, CacheSpec(latents=(spec,), shard_size=2), tmp_path / "store", open_source=open_source, batch_size=3
    )
    monkeypatch.undo()
    assert not verify_store(open_store(tmp_path / "store")).problems
    stream = PairStream(open_store(tmp_path / "store"), None, None, 3, seed=0, decode=None, images=False)
    batch = stream.batch(0)
    stored = batch.latents[spec.modality.value]
    order = [list(batch.image_ids).index(f"image-{number}") for number in range(3)]
    np.testing.assert_allclose(np.asarray(stored)[order], expected, rtol=0, atol=SOURCES[row].row.tolerance)
    assert np.abs(np.asarray(stored, np.float64)).max() > 0


@pytest.mark.parametrize("row", ROWS)
def test_a_latent_depends_on_its_image_and_its_seed_alone(row: str, opened: Callable[[str], LatentSource]) -> None:
    source, entry = opened(row), SOURCES[row]
    pixels = some_pixels(source.recipe.source_view_size)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    together = latents_of(source.encode(pixels, SEEDS))
    again = latents_of(source.encode(pixels, SEEDS))
    np.testing.assert_array_equal(together, again)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert together.shape == (3, *source.recipe.format.shape)
    close = {"rtol": 0, "atol": entry.row.tolerance}
    for place in range(3):
        alone = latents_of(source.encode(pixels[place : place + 1], SEEDS[place : place + 1]))
        np.testing.assert_allclose(alone[0], together[place], **close)
    turned = latents_of(source.encode(pixels[::-1].copy(), SEEDS[::-1]))
    np.testing.assert_allclose(turned[::-1], together, **close)
    same_image = latents_of(source.encode(pixels[[0, 0]], SEEDS[:2]))
    assert np.array_equal(same_image[0], same_image[1]) == entry.ignores_seed
    same_seed = latents_of(source.encode(pixels[:2], [5, 5]))
    assert not np.allclose(same_seed[0], same_seed[1], **close)


@pytest.mark.parametrize("row", ROWS)
def test_the_recipe_says_all_that_decides_and_no_place(
    row: str, opened: Callable[[str], LatentSource], checkpoint: Callable[[str], Path]
) -> None:
    source = opened(row)
    recipe = source.recipe
    assert len(recipe.weights_sha256) == 64
    assert set(getattr(source, "made_with")) >= {"torch", "transformers", "device", "attention", "model"}  # noqa: B009
    said = f"{recipe.model_dump_json()}{getattr(source, 'made_with')}"  # noqa: B009
    assert str(checkpoint(row).parent) not in said
    reopened = LatentSpecOf(recipe, places(row, checkpoint(row)))
    with closing(open_source(reopened, "cpu")) as other:
        assert other.recipe == recipe


def LatentSpecOf(recipe: Any, places: dict[str, str]) -> Any:
    """A spec made of a recipe and the place of the weights, as recomputing needs it."""
    from dla_cache.spec import LatentSpec

    fields = recipe.model_dump(include={"modality", "source", "seed"})
    parameters = {**recipe.parameters, **places}
    return LatentSpec.model_validate({**fields, "parameters": parameters, "dtype": "float32"})
