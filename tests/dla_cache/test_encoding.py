"""What a source does to its pixels stays with it, and what cannot be kept is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dla_cache.build import build_cache
from dla_cache.errors import LatentShapeError, SourceError
from dla_cache.manifest import Manifest
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import open_store
from tests.dla_cache.conftest import PixelSource

TWO = (LatentSpec(modality="depth", source="made"), LatentSpec(modality="normals", source="made"))
DRAWS = (LatentSpec(modality="depth", source="made", draws=3),)


class Blackening(PixelSource):
    """Blackens what it has seen, as only torch can."""

    def encode(self, pixels: Any, seeds: Any) -> Any:
        latents = super().encode(pixels, seeds)
        torch.from_numpy(pixels).zero_()
        return latents


def with_draws(made: Any, spec: LatentSpec) -> Any:
    made.recipe = made.recipe.model_copy(update={"format": made.recipe.format.with_draws(spec.draws)})
    return made


def build(
    manifest: Manifest, path: Path, latents: tuple[LatentSpec, ...], source: Callable[..., Any]
) -> dict[str, Any]:
    def open_source(spec: LatentSpec, device: str) -> Any:
        return with_draws(source(spec, device), spec)

    build_cache(manifest, CacheSpec(latents=latents, shard_size=4), path, open_source=open_source, batch_size=4)
    store = open_store(path)
    return {name: store.read(name, np.arange(len(store.rows))) for name in store.modalities}


@pytest.mark.parametrize("latents", [TWO, DRAWS])
def test_what_a_source_does_to_its_pixels_the_next_source_and_the_next_draw_do_not_see(
    latents: tuple[LatentSpec, ...], manifest: Manifest, tmp_path: Path
) -> None:
    expected = build(manifest, tmp_path / "sound", latents, PixelSource)
    found = build(manifest, tmp_path / "blackened", latents, Blackening)
    for name, values in expected.items():
        assert np.array_equal(found[name], values)


def test_a_source_that_writes_into_its_pixels_by_numpy_is_told(manifest: Manifest, tmp_path: Path) -> None:
    class Writing(PixelSource):
        def encode(self, pixels: Any, seeds: Any) -> Any:
            pixels[:] = 0
            return super().encode(pixels, seeds)

    with pytest.raises(SourceError, match="read-only"):
        build(manifest, tmp_path / "s", TWO[:1], Writing)


def test_an_array_with_a_mask_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    class Masking(PixelSource):
        def encode(self, pixels: Any, seeds: Any) -> Any:
            return np.ma.masked_less(super().encode(pixels, seeds), 0)

    with pytest.raises(LatentShapeError, match="with a mask"):
        build(manifest, tmp_path / "s", TWO[:1], Masking)


def test_the_records_tell_what_of_the_process_rounds_otherwise(manifest: Manifest, tmp_path: Path) -> None:
    build(manifest, tmp_path / "s", TWO[:1], PixelSource)
    made_with = open_store(tmp_path / "s").committed("depth")[0].made_with
    assert made_with["threads"] == torch.get_num_threads()
    assert made_with["float32_matmul"] == "highest"
