"""Training on latents that lie on disk in fewer bits: models get float32, standardised by what is stored."""

import numpy as np
import pytest
import torch

from dla_cache.joined import JoinedStore
from dla_cache.pairs import PairStream
from dla_cache.store import create_store, open_store
from dla_cache.store.exchange import convert_store
from trainer.run import train_run


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def rounded(tiny, tmp_path_factory, request):
    """The tiny cache in fewer bits."""
    path = tmp_path_factory.mktemp("rounded") / "cache.zarr"
    source = open_store(tiny.store)
    if request.param == "int8":
        convert_store(source, path, "zarr", dtypes={"depth": "int8"})
        return path
    recipe = source.recipe("depth")
    recipe = recipe.model_copy(update={"format": recipe.format.model_copy(update={"dtype": "bfloat16"})})
    store = create_store(path, source.rows, source.class_names, source.shard_size, {"depth": recipe})
    for shard in store.shards:
        latents = source.read("depth", source.kept_rows(shard))
        store.write_shard("depth", shard, latents, seconds=0, device="cpu")
    return path


def test_batches_are_float32_and_have_the_statistics_of_the_store(tiny, rounded):
    for store in (open_store(rounded), JoinedStore([open_store(rounded)])):
        stream = PairStream(
            store, tiny.images, ["labelled"], 6, seed=0, decode=lambda *_: np.zeros((3, 8, 8), np.uint8)
        )
        latents = next(stream.epoch_once()).latents["depth"]
        assert latents.dtype == torch.float32
        statistics = open_store(rounded).statistics("depth", ["labelled"])
        values = latents.double().numpy()
        np.testing.assert_allclose(values.mean((0, 2, 3)), statistics.mean, rtol=1e-12)
        np.testing.assert_allclose(values.std((0, 2, 3)), statistics.std, rtol=1e-12)


def test_a_teacher_and_a_probe_train_on_them(tiny, rounded, tmp_path):
    for kind in ("probe", "teacher"):
        train_run(tiny.run(kind, tmp_path / kind, store=str(rounded)))
        assert (tmp_path / kind / "result.json").is_file()
