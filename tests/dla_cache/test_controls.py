"""Control stores: same images and shapes, other latents, by a recipe that says so; the same however they came about."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dla_cache
from dla_cache.control_recipe import Kind
from dla_cache.controls import control_store
from dla_cache.errors import IncompleteBuildError, RecipeMismatchError, StoreError, WorkInterrupted
from dla_cache.spec import ORIGINAL_IMAGES, Modality
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.rows import RowTable
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

N, N_CLASSES = 60, 3
SPLITS = ("train", "train", "validation", "test")
CLASS_NAMES = ("a", "b", "c")
SHUFFLES = ("shuffled", "shuffled-within-class", "shuffled-across-classes")

Make = Callable[..., LatentStore]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is played here, and there are many stores."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> Make:
    """Stores of depth and of codes of sound, of sixty images of three classes and as many splits."""

    def make_store(shard_size: int = 16, layout: str = "zarr", images: int = N, depth: str = "float32") -> LatentStore:
        rows = [
            replace(image, split=SPLITS[image.row % 4], label=image.row * 7 % 11 % N_CLASSES)
            for image in made.rows(images)
        ]
        recipes = {
            "depth": made.recipe(dtype=depth),
            "audio": made.recipe((2, 6), dtype="uint8", modality=Modality.AUDIO),
        }
        path = tmp_path_factory.mktemp("control") / "s"
        store = create_store(path, RowTable(rows), CLASS_NAMES, shard_size, recipes, layout=layout)
        for name, recipe in recipes.items():
            latents = made.latents(recipe, images)
            for shard in store.shards:
                store.write_shard(name, shard, latents[shard.start : shard.stop], seconds=0.1, device="cpu")
        return store

    return make_store


def latents_of(store: LatentStore, modality: str) -> np.ndarray:
    return store.read(modality, store.rows_of())


@pytest.fixture(scope="module")
def source(make: Make) -> LatentStore:
    return make()


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind not in ("fabricated", "gaussian-by-place")])
def test_a_control_has_the_images_and_shapes_of_the_real_store_and_says_what_it_is(
    source: LatentStore, tmp_path: Path, kind: Kind
) -> None:
    report = control_store(source, tmp_path / "c", kind=kind, seed=5)
    control = open_store(tmp_path / "c")
    assert (control.rows, control.class_names, control.shard_size) == (source.rows, source.class_names, 16)
    assert report.content_hash == control.content_hash() != source.content_hash()
    assert verify_store(control).problems == ()
    for name in source.modalities:
        real, recipe = source.recipe(name), control.recipe(name)
        assert recipe.format == real.format
        assert (recipe.source, recipe.seed, recipe.parameters["kind"]) == ("control", 5, kind)
        assert recipe.parameters["real_recipe"] == real.hash
        assert recipe.parameters["real_content"] == source.content_hash([name])
        assert (latents_of(control, name) != latents_of(source, name)).any()
    card = (tmp_path / "c" / "README.md").read_text()
    assert f"**control \\`{kind}\\` of \\`made\\`, seed 5" in card
    assert "**Not so audio, depth**" in card
    assert "dla cache build" not in card


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
@pytest.mark.parametrize("kind", SHUFFLES)
def test_a_shuffle_moves_the_latents_of_all_modalities_together(
    source: LatentStore, tmp_path: Path, kind: Kind
) -> None:
    report = control_store(source, tmp_path / "c", kind=kind)
    control = open_store(tmp_path / "c")
    rows = source.rows_of()
    index_of = {latent.tobytes(): place for place, latent in enumerate(latents_of(source, "depth"))}
    donors = np.array([index_of[latent.tobytes()] for latent in latents_of(control, "depth")])
    assert np.array_equal(latents_of(control, "audio"), latents_of(source, "audio")[donors])
    splits, labels = source.rows.splits_of(rows), np.array(source.rows.labels_of(rows))
    assert [splits[donor] for donor in donors] == splits
    assert (donors != rows).all()
    same = {"shuffled": None, "shuffled-within-class": N, "shuffled-across-classes": 0}[kind]
    assert (report.plan.n_own, report.plan.n_same_class) == (0, same)
    if same is not None:
        assert (labels[donors] == labels).sum() == same


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
@settings(max_examples=8)
@given(shard_size=st.integers(1, 70), kind=st.sampled_from(["shuffled-across-classes", "gaussian", "label-embedding"]))
def test_what_an_image_gets_does_not_depend_on_shards_or_layout(
    make: Make, tmp_path_factory: pytest.TempPathFactory, source: LatentStore, shard_size: int, kind: Kind
) -> None:
    other = make(shard_size=shard_size, layout="webdataset")
    folder = tmp_path_factory.mktemp("c")
    reports = [control_store(one, folder / str(at), kind=kind, seed=2) for at, one in enumerate((source, other))]
    assert reports[0].content_hash == reports[1].content_hash


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_noise_has_the_statistics_of_the_training_splits_and_knows_nothing_of_the_image(
    make: Make, tmp_path: Path
) -> None:
    source = make(images=2000, shard_size=512)
    control_store(source, tmp_path / "c", kind="gaussian")
    control = open_store(tmp_path / "c")
    assert control.recipe("depth").parameters["statistics_of"] == '["train"]'
    real, noise = (store.statistics("depth", ["train"]) for store in (source, control))
    np.testing.assert_allclose(noise.mean, real.mean, atol=5 * 2 / 4000**0.5)
    np.testing.assert_allclose(noise.std, real.std, rtol=5 / 8000**0.5)
    pairs = [latents_of(store, "depth").ravel() for store in (source, control)]
    assert abs(np.corrcoef(*pairs)[0, 1]) < 5 / 24000**0.5
    codes = [np.bincount(latents_of(store, "audio")[:, 0].ravel(), minlength=100) for store in (source, control)]
    assert np.abs(codes[0] - codes[1]).max() < 6 * (2 * 120) ** 0.5


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_codes_are_drawn_as_often_as_each_codebook_has_them(make: Make, tmp_path: Path) -> None:
    source = make(images=400)
    control_store(source, tmp_path / "c", kind="gaussian", modalities=["audio"])
    for codebook in range(2):
        real, drawn = (
            set(latents_of(store, "audio")[:, codebook].ravel().tolist())
            for store in (source, open_store(tmp_path / "c"))
        )
        assert drawn <= real


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_noise_by_place_has_the_mean_and_deviation_of_each_number(made: SimpleNamespace, tmp_path: Path) -> None:
    recipe = made.recipe(dtype="float32")
    means = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    latents = (means + made.latents(recipe, 3000) * (1 + means)).astype(np.float32)
    source = made.store(tmp_path / "s", recipe, latents, 1000)
    control_store(source, tmp_path / "c", kind="gaussian-by-place")
    real, noise = (store.read("depth", store.rows_of(["train"])) for store in (source, open_store(tmp_path / "c")))
    np.testing.assert_allclose(noise.mean(0), real.mean(0), atol=5 * 24 / 1500**0.5)
    np.testing.assert_allclose(noise.std(0), real.std(0), rtol=5 / 3000**0.5)


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_a_class_has_one_latent_and_noise_takes_its_share(source: LatentStore, tmp_path: Path) -> None:
    labels = np.array(source.rows.labels_of(source.rows_of()))
    stores = {}
    for noise in (None, 0.25, 1.0):
        control_store(source, tmp_path / str(noise), kind="label-embedding", noise=noise)
        stores[noise] = open_store(tmp_path / str(noise))
    for name in ("depth", "audio"):
        vectors = [latents_of(stores[None], name)[labels == label] for label in range(N_CLASSES)]
        assert all((of_class == of_class[0]).all() for of_class in vectors)
        assert (vectors[0][0] != vectors[1][0]).any()
    changed = (latents_of(stores[0.25], "audio") != latents_of(stores[None], "audio")).mean()
    assert 0.15 < changed < 0.35
    spread = np.mean([latents_of(stores[0.25], "depth")[labels == label].std(0) for label in range(N_CLASSES)])
    assert abs(spread / np.sqrt(0.25) / source.statistics("depth", ["train"]).std.mean() - 1) < 0.15


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_draws_of_an_image_share_the_vector_of_its_class(made: SimpleNamespace, tmp_path: Path) -> None:
    one = made.recipe()
    recipe = one.model_copy(update={"format": one.format.with_draws(4)})
    rows = [replace(image, label=image.row % 3) for image in made.rows(6)]
    store = create_store(tmp_path / "s", RowTable(rows), CLASS_NAMES, 6, {"depth": recipe})
    store.write_shard("depth", store.shards[0], made.latents(recipe, 6), seconds=0, device="cpu")
    for kind, n_different in (("label-embedding", 1), ("gaussian", 4)):
        control_store(store, tmp_path / kind, kind=kind)
        latents = open_store(tmp_path / kind).read("depth", np.arange(6))
        assert len(np.unique(latents[0], axis=0)) == n_different


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_control_of_rounded_latents_is_rounded_the_same_way(source: LatentStore, tmp_path: Path, dtype: str) -> None:
    convert_store(source, tmp_path / "small", "zarr", dtypes={"depth": dtype})
    small = open_store(tmp_path / "small")
    for kind in ("shuffled", "gaussian"):
        control_store(small, tmp_path / kind, kind=kind)
        control = open_store(tmp_path / kind)
        assert control.recipe("depth").format == small.recipe("depth").format
        assert verify_store(control).problems == ()
    moved = {latent.tobytes() for latent in latents_of(open_store(tmp_path / "shuffled"), "depth")}
    assert moved == {latent.tobytes() for latent in latents_of(small, "depth")}


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_modalities_that_are_not_named_are_copied(source: LatentStore, tmp_path: Path) -> None:
    control_store(source, tmp_path / "c", kind="gaussian", modalities=["depth"])
    control = open_store(tmp_path / "c")
    assert control.recipe("audio") == source.recipe("audio")
    assert control.content_hash(["audio"]) == source.content_hash(["audio"])
    assert control.recipe("depth").source == "control"


def test_images_are_copied_and_those_that_were_removed_stay_so(
    made: SimpleNamespace, tmp_path: Path, layout: str
) -> None:
    rows = [
        replace(image, sha256=made.sha256_of_bytes(str(image.row).encode()), label=image.row % 3)
        for image in made.rows(12)
    ]
    recipe = made.recipe()
    store = create_store(
        tmp_path / "s", RowTable(rows), CLASS_NAMES, 5, {"depth": recipe}, layout=layout, images=ORIGINAL_IMAGES
    )
    latents = made.latents(recipe, 12)
    for shard in store.shards:
        store.write_shard("depth", shard, latents[shard.start : shard.stop], seconds=0, device="cpu")
        store.write_images(shard, [str(row).encode() for row in range(shard.start, shard.stop)], seconds=0)
    take_down([tmp_path / "s"], ["image-3", "image-4"])
    store = open_store(tmp_path / "s")
    control_store(store, tmp_path / "c", kind="shuffled")
    control = open_store(tmp_path / "c")
    assert control.rows.removed_ids == {"image-3", "image-4"}
    assert control.read_images(control.rows_of()) == store.read_images(store.rows_of())
    given = {latent.tobytes() for latent in latents_of(control, "depth")}
    assert given == {latent.tobytes() for latent in latents_of(store, "depth")}
    assert verify_store(control).problems == ()


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_a_control_that_was_stopped_goes_on_where_it_stopped(source: LatentStore, tmp_path: Path) -> None:
    whole = control_store(source, tmp_path / "whole", kind="gaussian")
    with pytest.raises(WorkInterrupted, match="1 of 8 shards"):
        control_store(source, tmp_path / "c", kind="gaussian", should_stop=lambda: True)
    with pytest.raises(RecipeMismatchError, match=r"`depth\.seed` `0` → `1`"):
        control_store(source, tmp_path / "c", kind="gaussian", seed=1)
    report = control_store(source, tmp_path / "c", kind="gaussian")
    assert (report.shards_written, report.content_hash) == (7, whole.content_hash)


KILLED = """
import os, signal, sys
from pathlib import Path
from dla_cache.controls import control_store
from dla_cache.store import open_store

def die_at(done, _total):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

control_store(open_store(sys.argv[1]), Path(sys.argv[2]), kind="shuffled-within-class", on_progress=die_at)
"""


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_a_control_that_was_killed_ends_as_an_unbroken_one(source: LatentStore, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(dla_cache.__file__).parents[1])}
    for kill, n_committed in ((2, 2), (3, 5)):
        command = [sys.executable, "-c", KILLED, source.path, tmp_path / "c", str(kill)]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
        killed = open_store(tmp_path / "c")
        assert sum(len(killed.committed(name)) for name in killed.modalities) == n_committed
    whole = control_store(source, tmp_path / "whole", kind="shuffled-within-class")
    assert control_store(source, tmp_path / "c", kind="shuffled-within-class").content_hash == whole.content_hash


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_death_before_any_step_to_disk_loses_nothing_committed(
    make: Make, tmp_path: Path, dies_before: Callable
) -> None:
    source = make(images=12, shard_size=6)
    whole = control_store(source, tmp_path / "whole", kind="gaussian").content_hash
    step, path = 0, tmp_path / "c"
    while dies_before(step, lambda: control_store(source, path, kind="gaussian")):
        step += 9
    assert step > 30
    assert open_store(path).content_hash() == whole


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_images_that_are_removed_meanwhile_end_it(make: Make, tmp_path: Path) -> None:
    source = make()

    def remove(done: int, _total: int) -> None:
        if done == 8:
            take_down([source.path], ["image-0"])

    with pytest.raises(StoreError, match="may hold their latents under other IDs"):
        control_store(source, tmp_path / "c", kind="shuffled", on_progress=remove)


@pytest.mark.parametrize("layout", ["zarr"], indirect=True)
def test_a_store_with_a_gap_and_itself_are_refused(make: Make, tmp_path: Path) -> None:
    source = make()
    with pytest.raises(StoreError, match="is the store to read"):
        control_store(source, source.path, kind="gaussian")
    source.withdraw("depth", {1: source.committed("depth")[1]})
    with pytest.raises(IncompleteBuildError, match="lacks 1 of 4 shards of `depth`"):
        control_store(source, tmp_path / "c", kind="gaussian")
    assert not (tmp_path / "c").exists()
