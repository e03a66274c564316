"""Stores with several draws of a latent: training goes through them, evaluation sees the first."""

import numpy as np
import pytest
import torch

from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.spec import LatentFormat, Modality, Recipe
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable
from trainer.data import PairSource, PixelScale, Role
from trainer.views import ViewConfig

N_IMAGES, N_DRAWS = 6, 3
ROLE = Role(("train",), 2)


@pytest.fixture
def source(tmp_path):
    """Draw d of image i is 10 i + d."""
    one = LatentFormat(kind="continuous", shape=(2, 1), axes=("token", "channel"), dtype="float32")
    recipe = Recipe(
        modality=Modality.SHAPE,
        source="made",
        weights_sha256="",
        parameters={},
        seed=0,
        source_view_size=8,
        format=one.with_draws(N_DRAWS),
    )
    rows = [
        ManifestRow(f"image-{number}", f"{number}", 0, "train", f"{number:064x}", 8, 8) for number in range(N_IMAGES)
    ]
    manifest = write_manifest(tmp_path / "manifest.parquet", rows, ["only"])
    store = create_store(tmp_path / "store", RowTable.from_manifest(manifest), ("only",), 8, {"shape": recipe})
    numbers = 10 * np.arange(N_IMAGES)[:, None, None, None] + np.arange(N_DRAWS)[:, None, None]
    latents = np.broadcast_to(numbers, (N_IMAGES, N_DRAWS, 2, 1)).astype(np.float32)
    store.write_shard("shape", store.shards[0], latents, seconds=0.0, device="cpu")
    return PairSource(
        store,
        None,
        image_size=8,
        pixel_scale=PixelScale((0.0,) * 3, (1.0,) * 3),
        modalities=["shape"],
        view=ViewConfig(),
        seed=0,
        device="cpu",
        sees_images=False,
    )


def draws_seen(batches):
    return [
        (image_id, int(latent[0, 0]) - 10 * int(image_id.split("-")[1]))
        for batch in batches
        for image_id, latent in zip(batch.image_ids, batch.latents["shape"], strict=True)
    ]


def test_in_as_many_epochs_as_there_are_draws_training_sees_each_once(source):
    stream = source.training([ROLE])(0)
    batches = [next(stream) for _ in range(N_DRAWS * N_IMAGES // ROLE.batch_size)]
    stream.close()
    assert all(batch.latents["shape"].shape == (2, 2, 1) for batch in batches)
    assert sorted(draws_seen(batches)) == [
        (f"image-{number}", draw) for number in range(N_IMAGES) for draw in range(N_DRAWS)
    ]


def test_a_resumed_run_sees_the_draws_of_the_unbroken_one(source):
    unbroken, resumed = source.training([ROLE])(0), source.training([ROLE])(4)
    for _ in range(4):
        next(unbroken)
    for _ in range(5):
        one, other = next(unbroken), next(resumed)
        assert one.image_ids == other.image_ids
        assert torch.equal(one.latents["shape"], other.latents["shape"])
    unbroken.close()
    resumed.close()


def test_evaluation_sees_the_first_draw(source):
    assert {draw for _, draw in draws_seen(source.evaluation(ROLE, ["shape"])())} == {0}
