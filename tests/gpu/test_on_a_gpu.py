"""What only a machine with a CUDA device can show: run `pytest -m gpu` there. None of this has been run yet.

Each test is the same as one on the CPU, but for the device and the tolerance, so that what fails here is the device.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dla_cache.build import build_cache
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.recompute import recompute
from dla_cache.sources import Encoded, open_source
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests.dla_cache.conftest import sha256_of
from tests.dla_cache.sources.conftest import checkpoint as checkpoint  # a fixture
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import SIDE, pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest -m gpu` where there is one"
    ),
]

DEVICE = "cuda"
ROWS = ("marigold-depth-lcm", "marigold-normals", "marigold-intrinsics-lighting")
FLOAT32, BFLOAT16 = 1e-3, 0.5
"""Absolute, for latents of about 1: kernels of another device sum in another order, and bfloat16 has 8 bits."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rows = []
    for number, picture in enumerate(pictures(some_pixels(SIDE, 7))):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        rows.append(ManifestRow(f"image-{number}", path.name, None, "train", sha256_of(path), SIDE, SIDE))
    return write_manifest(tmp_path / "manifest.parquet", rows, ())


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without TF32, which rounds inputs of float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def encoded(spec: LatentSpec, device: str, pixels: Any, seeds: Any) -> Any:
    with closing(open_source(spec, device)) as source:
        put_out = source.encode(pixels, seeds)
    return put_out.latents if isinstance(put_out, Encoded) else put_out


@pytest.mark.parametrize("row", ROWS)
def test_a_latent_is_that_of_the_cpu_and_does_not_depend_on_its_batch(
    row: str, checkpoint: Callable[[str], Path]
) -> None:
    spec, pixels, seeds = spec_of(row, checkpoint(row)), some_pixels(SIDE, 4), (1, 2, 3, 4)
    here = encoded(spec, DEVICE, pixels, seeds)
    np.testing.assert_allclose(here, encoded(spec, "cpu", pixels, seeds), rtol=0, atol=FLOAT32)
    np.testing.assert_allclose(encoded(spec, DEVICE, pixels[2:3], seeds[2:3]), here[2:3], rtol=0, atol=FLOAT32)
    assert np.array_equal(encoded(spec, DEVICE, pixels, seeds), here)


@pytest.mark.parametrize("row", ROWS)
def test_bfloat16_is_near_float32(row: str, checkpoint: Callable[[str], Path]) -> None:
    spec, pixels, seeds = spec_of(row, checkpoint(row)), some_pixels(SIDE, 4), (1, 2, 3, 4)
    coarse = spec.model_copy(update={"parameters": {**spec.parameters, "compute_dtype": "bfloat16"}})
    exact, rounded = encoded(spec, DEVICE, pixels, seeds), encoded(coarse, DEVICE, pixels, seeds)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=BFLOAT16)


def test_a_store_is_built_verified_and_made_again(
    manifest: Manifest, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    latents = tuple(spec_of(row, checkpoint(row)) for row in ROWS)
    spec = CacheSpec(latents=latents, shard_size=3)
    build_cache(manifest, spec, tmp_path / "store", open_source=open_source, device=DEVICE, batch_size=4)
    store = open_store(tmp_path / "store")
    assert not verify_store(store).problems
    records = [record for modality in store.modalities for record in store.committed(modality).values()]
    assert all(torch.cuda.get_device_name(0) in str(record.made_with["device"]) for record in records)
    again = recompute(store, manifest.root, 7, open_source=open_source, device=DEVICE, spec=spec)
    assert all(one.largest_difference < FLOAT32 for one in again)


def test_a_batch_that_does_not_fit_is_halved_and_no_image_is_lost(
    manifest: Manifest, tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CacheSpec(latents=(spec_of(ROWS[0], checkpoint(ROWS[0])),), shard_size=7)
    build_cache(manifest, spec, tmp_path / "whole", open_source=open_source, device=DEVICE, batch_size=7)

    class Greedy:
        """Asks for more memory than any device has as long as it gets more than two images."""

        def __init__(self, entry: LatentSpec, device: str) -> None:
            self.inner = open_source(entry, device)
            self.recipe, self.close = self.inner.recipe, self.inner.close
            self.tolerance = getattr(self.inner, "tolerance", 0.0)

        def encode(self, pixels: Any, seeds: Any) -> Any:
            if len(pixels) > 2:
                torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
            return self.inner.encode(pixels, seeds)

    build_cache(manifest, spec, tmp_path / "halved", open_source=Greedy, device=DEVICE, batch_size=7)
    whole, halved = (open_store(tmp_path / name) for name in ("whole", "halved"))
    rows = np.arange(7)
    np.testing.assert_allclose(halved.read("depth", rows), whole.read("depth", rows), rtol=0, atol=FLOAT32)
    assert halved.committed("depth")[0].made_with["out_of_memory"] >= 1


def test_several_devices_make_what_one_makes(
    manifest: Manifest, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from typer.testing import CliRunner

    from cli.main import app

    entry = spec_of(ROWS[0], checkpoint(ROWS[0])).model_dump(mode="json")
    (tmp_path / "spec.yaml").write_text(
        CacheSpec.model_validate({"latents": [entry], "shard_size": 2}).model_dump_json()
    )
    for name, device in (("one", "cuda:0"), ("two", "cuda:0,cuda:1")):
        arguments = ["cache", "build", str(tmp_path / "spec.yaml"), "--manifest", str(tmp_path / "manifest.parquet")]
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / name), "--device", device])
        assert result.exit_code == 0, result.output
    rows = np.arange(7)
    one, two = (open_store(tmp_path / name).read("depth", rows) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=0, atol=FLOAT32)
