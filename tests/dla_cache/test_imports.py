"""Ready-made latents: every file finds its image or is named, and what is stored is what the files held."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch

from dla_cache.errors import (
    LatentShapeError,
    MissingLatentError,
    NonFiniteLatentError,
    RecipeMismatchError,
    SourceError,
    SpecError,
    StoreError,
    WorkInterrupted,
)
from dla_cache.imports import import_latents, parse_modality
from dla_cache.manifest import Manifest, write_manifest
from dla_cache.spec import Modality
from dla_cache.store import open_store
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

N_IMAGES = 7


@pytest.fixture
def manifest(tmp_path: Path, made: SimpleNamespace) -> Manifest:
    return made.manifest(tmp_path / "data", N_IMAGES)


@pytest.fixture
def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N_IMAGES, 3, 2, 2)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, latents: np.ndarray) -> Path:
    """`image-<n>.npy`, one for every image of the manifest."""
    (tmp_path / "their-depth").mkdir()
    for number, latent in enumerate(latents):
        np.save(tmp_path / "their-depth" / f"image-{number}.npy", latent)
    return tmp_path / "their-depth"


@pytest.fixture
def run(tmp_path: Path, manifest: Manifest, folder: Path) -> Callable:
    def run(store: str = "s", **options: object):
        return import_latents(folder, manifest, Modality.DEPTH, tmp_path / store, **{"shard_size": 3, **options})

    return run


def stored(path: Path) -> np.ndarray:
    store = open_store(path)
    return store.read("depth", np.arange(len(store.rows)))


def test_what_the_files_hold_is_what_the_store_holds(
    tmp_path: Path, run: Callable, manifest: Manifest, latents: np.ndarray
) -> None:
    report = run()
    assert (report.n_images, report.images_imported) == (N_IMAGES, N_IMAGES)
    np.testing.assert_array_equal(stored(tmp_path / "s"), latents)
    assert verify_store(open_store(tmp_path / "s"), manifest).content_hash == report.content_hash


def test_the_recipe_names_the_import_and_no_place_on_disk(tmp_path: Path, run: Callable) -> None:
    recipe = run().recipe
    assert recipe.source == "import:their-depth"
    assert recipe.weights_sha256 == ""
    assert recipe.parameters == {"files": ".npy", "file_dtype": "float32", "source_view": "not known"}
    assert str(tmp_path) not in recipe.model_dump_json()


def write_pt(path: Path, latent: np.ndarray) -> None:
    torch.save(torch.from_numpy(latent), path)


def write_pt_dict(path: Path, latent: np.ndarray) -> None:
    torch.save({"latent": torch.from_numpy(latent), "step": 3}, path)


def write_safetensors(path: Path, latent: np.ndarray) -> None:
    safetensors.numpy.save_file({"any": latent}, path)


@pytest.mark.parametrize(
    ("suffix", "write"), [(".pt", write_pt), (".pt", write_pt_dict), (".safetensors", write_safetensors)]
)
def test_a_tree_of_tensors_is_keyed_by_the_images_paths(
    tmp_path: Path, manifest: Manifest, latents: np.ndarray, suffix: str, write: Callable
) -> None:
    (tmp_path / "release/images").mkdir(parents=True)
    for row, latent in zip(manifest.rows(), latents, strict=True):
        write((tmp_path / "release" / row.uri).with_suffix(suffix), latent)
    import_latents(tmp_path / "release", manifest, Modality.DEPTH, tmp_path / "s")
    np.testing.assert_array_equal(stored(tmp_path / "s"), latents)


def test_a_key_chooses_among_several_tensors(tmp_path: Path, manifest: Manifest, latents: np.ndarray) -> None:
    (tmp_path / "two").mkdir()
    for number, latent in enumerate(latents):
        torch.save({"a": torch.zeros(2), "b": torch.from_numpy(latent)}, tmp_path / f"two/image-{number}.pt")
    with pytest.raises(SourceError, match=r"holds 2 tensors\nhint: --key with one of `a`, `b`"):
        import_latents(tmp_path / "two", manifest, Modality.DEPTH, tmp_path / "s")
    import_latents(tmp_path / "two", manifest, Modality.DEPTH, tmp_path / "s", key="b")
    np.testing.assert_array_equal(stored(tmp_path / "s"), latents)


def test_bfloat16_is_stored_without_loss(tmp_path: Path, manifest: Manifest, latents: np.ndarray) -> None:
    (tmp_path / "bf").mkdir()
    narrow = torch.from_numpy(latents).bfloat16()
    for number, latent in enumerate(narrow):
        torch.save(latent.clone(), tmp_path / f"bf/image-{number}.pt")
    report = import_latents(tmp_path / "bf", manifest, Modality.DEPTH, tmp_path / "s")
    assert (report.recipe.parameters["file_dtype"], report.recipe.format.dtype) == ("bfloat16", "float32")
    np.testing.assert_array_equal(stored(tmp_path / "s"), narrow.float().numpy())


def test_a_batch_of_one_is_what_lies_in_it(tmp_path: Path, run: Callable, folder: Path, latents: np.ndarray) -> None:
    for number, latent in enumerate(latents):
        np.save(folder / f"image-{number}.npy", latent[None])
    with pytest.raises(LatentShapeError, match=r"nothing says which axis is which\nhint: .*--axes"):
        run()
    run(axes=["channel", "height", "width"])
    np.testing.assert_array_equal(stored(tmp_path / "s"), latents)


def test_codes_take_the_smallest_integer_that_holds_them(tmp_path: Path, run: Callable, folder: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 300, (N_IMAGES, 2, 5))
    for number, code in enumerate(codes):
        np.save(folder / f"image-{number}.npy", code)
    report = run(kind="codes", vocabulary=300)
    assert (report.recipe.format.dtype, report.recipe.format.axes) == ("int16", ("codebook", "step"))
    np.testing.assert_array_equal(stored(tmp_path / "s"), codes)
    with pytest.raises(NonFiniteLatentError, match=r"a code outside \[0, 100\)"):
        run("t", kind="codes", vocabulary=100)


def test_images_without_a_latent_are_counted_and_named_or_left_out(
    tmp_path: Path, run: Callable, folder: Path, latents: np.ndarray
) -> None:
    (folder / "image-2.npy").unlink()
    with pytest.raises(MissingLatentError, match=r"1 of 7 images have no latent in .*: `image-2`\nhint: .*--missing"):
        run()
    assert not (tmp_path / "s").exists()
    report = run(skip_missing=True)
    assert (report.n_images, report.missing) == (6, ("image-2",))
    assert open_store(tmp_path / "s").rows.image_ids == tuple(f"image-{n}" for n in (0, 1, 3, 4, 5, 6))
    np.testing.assert_array_equal(stored(tmp_path / "s"), latents[[0, 1, 3, 4, 5, 6]])


def test_latents_without_an_image_are_counted_and_named_or_left_out(run: Callable, folder: Path) -> None:
    np.save(folder / "stranger.npy", np.zeros((3, 2, 2), np.float32))
    with pytest.raises(SourceError, match=r"1 latents in .* belong to no image: `stranger.npy`"):
        run()
    assert run(allow_extra=True).extra == ("stranger.npy",)


def test_files_that_are_no_latents_are_named_and_left_alone(run: Callable, folder: Path) -> None:
    (folder / "README.md").write_text("about")
    (folder / "._image-0.npy").write_text("of a file manager")
    assert run().ignored == ("._image-0.npy", "README.md")


def test_two_files_of_one_image_are_refused(run: Callable, folder: Path) -> None:
    (folder / "images").mkdir()
    np.save(folder / "images/image-3.npy", np.zeros((3, 2, 2), np.float32))
    with pytest.raises(SourceError, match=r"1 images have more than one file in .*image-3.npy, images/image-3.npy"):
        run()


def test_a_file_that_fits_two_images_is_refused(
    tmp_path: Path, manifest: Manifest, folder: Path, run: Callable
) -> None:
    (folder / "images").mkdir()
    (folder / "image-1.npy").rename(folder / "images/image-1.npy")  # by its path too, of the same image: fine
    run()
    rows = list(manifest.rows())
    (folder / "images/image-1.npy").rename(folder / "image-1.npy")
    swapped = [replace(rows[0], uri="image-1.png"), replace(rows[1], uri="image-0.png"), *rows[2:]]
    crossed = write_manifest(tmp_path / "data/crossed.parquet", swapped, manifest.class_names)
    with pytest.raises(SourceError, match=r"2 files in .* fit more than one image: .* fits image-0 and image-1"):
        import_latents(folder, crossed, Modality.DEPTH, tmp_path / "t")


def test_other_latents_under_the_same_name_are_refused(run: Callable, folder: Path) -> None:
    before = run().content_hash
    assert run().content_hash == before
    changed = np.load(folder / "image-0.npy") + 1
    np.save(folder / "image-0.npy", changed)
    with pytest.raises(RecipeMismatchError, match=r"image-0.npy` holds another latent"):
        run()


def test_a_bare_name_further_down_is_not_taken_for_an_id(run: Callable, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "image-2.npy").rename(folder / "other/image-2.npy")  # maybe of another folder's image-2
    with pytest.raises(MissingLatentError, match="image-2"):
        run()


@pytest.mark.parametrize(
    ("odd", "error", "message"),
    [
        (np.zeros((3, 2, 3), np.float32), LatentShapeError, r"image-5.npy` holds `float32` \[3, 2, 3\], the first"),
        (np.zeros((3, 2, 2), np.float16), LatentShapeError, "image-5.npy` holds `float16`"),
        (np.full((3, 2, 2), np.nan, np.float32), NonFiniteLatentError, "hold NaN, .*image-5.npy"),
        (np.array([None]), SourceError, "image-5.npy` cannot be read: ValueError: Object arrays"),
        (np.float32(1), SourceError, r"image-5.npy` holds `float32` \[\]"),
    ],
)
def test_a_latent_unlike_the_others_is_named(
    run: Callable, folder: Path, odd: np.ndarray, error: type[Exception], message: str
) -> None:
    np.save(folder / "image-5.npy", odd)
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no tensor at all", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_one_error(run: Callable, folder: Path, suffix: str, content: bytes) -> None:
    (folder / "image-4.npy").unlink()
    (folder / f"image-4{suffix}").write_bytes(content)
    with pytest.raises(SourceError, match=rf"image-4\{suffix}` cannot be read: "):
        run()


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_file_that_would_run_code_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable, folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "image-0.npy").unlink()
    torch.save({"latent": Trap()}, folder / "image-0.pt")
    with pytest.raises(SourceError, match=r"image-0.pt` cannot be read: .*\nhint: .*pickled"):
        run()
    assert not Path("sprung").exists()


def test_a_value_beyond_float16_is_refused_and_kept_as_float32(
    tmp_path: Path, run: Callable, folder: Path, latents: np.ndarray
) -> None:
    np.save(folder / "image-1.npy", latents[1] + 1e6)
    with pytest.raises(NonFiniteLatentError, match=r"beyond `float16`: .*image-1.npy"):
        run(dtype="float16")
    np.testing.assert_array_equal(run("t") and stored(tmp_path / "t")[1], (latents[1] + 1e6).astype(np.float32))


def test_an_interrupted_import_goes_on_and_ends_as_an_unbroken_one(tmp_path: Path, run: Callable) -> None:
    whole = run("whole").content_hash
    with pytest.raises(WorkInterrupted, match=r"3 of 7 images are stored"):
        run(should_stop=lambda: True)
    told: list[tuple[int, int]] = []
    report = run(on_progress=lambda done, total: told.append((done, total)))
    assert (report.images_imported, report.content_hash) == (4, whole)
    assert told == [(3, 4), (4, 4)]
    again = run()
    assert (again.images_imported, again.content_hash) == (0, whole)


def test_an_import_goes_on_without_the_images_that_were_removed(
    tmp_path: Path, run: Callable, folder: Path, manifest: Manifest, latents: np.ndarray
) -> None:
    with pytest.raises(WorkInterrupted):
        run(should_stop=lambda: True)
    take_down([tmp_path / "s"], ["image-0", "image-4", "image-6"])  # the last one is all of the last shard
    (folder / "image-0.npy").unlink()
    np.save(folder / "image-4.npy", np.full(3, np.nan))  # nobody opens it
    report = run()
    assert (report.n_images, report.images_left_out, report.images_imported) == (4, 3, 2)
    assert (report.missing, report.extra) == ((), ())
    store = open_store(tmp_path / "s")
    np.testing.assert_array_equal(store.read("depth", store.rows_of()), latents[[1, 2, 3, 5]])
    assert verify_store(store, manifest).problems == ()
    assert run().content_hash == report.content_hash == store.content_hash()
    (folder / "image-1.npy").unlink()
    with pytest.raises(MissingLatentError, match="1 of 4 images have no latent"):
        run()


def test_another_modality_is_imported_without_the_images_that_were_removed(
    tmp_path: Path, run: Callable, folder: Path, manifest: Manifest
) -> None:
    run()
    take_down([tmp_path / "s"], ["image-0", "image-4", "image-6"])
    import_latents(folder, manifest, Modality.SHAPE, tmp_path / "s", shard_size=3)
    store = open_store(tmp_path / "s")
    rows = store.rows_of()
    np.testing.assert_array_equal(store.read("shape", rows), store.read("depth", rows))
    assert verify_store(store, manifest).problems == ()


def test_an_import_is_refused_where_a_removal_is_not_through_or_leaves_nothing(
    tmp_path: Path, run: Callable, manifest: Manifest
) -> None:
    run()
    take_down([tmp_path / "s"], manifest.image_ids)
    with pytest.raises(SourceError, match=r"all 7 images with a latent in .* were removed from"):
        run()
    run("t")
    (tmp_path / "t/takedown.json").write_text("{}")
    with pytest.raises(StoreError, match="images are being removed from"):
        run("t")


def test_another_set_under_another_name_is_refused_on_the_same_store(run: Callable) -> None:
    run()
    with pytest.raises(StoreError, match=r"depth.source` `import:their-depth` → `import:mine`"):
        run(name="mine")


def test_the_releases_names_of_modalities_are_known_at_the_door_alone() -> None:
    assert parse_modality("pc") is parse_modality("3d") is Modality.SHAPE
    with pytest.raises(SpecError, match=r"no modality `smell`\nhint: .*`depth`"):
        parse_modality("smell")


def test_a_folder_without_one_fitting_file_says_what_it_has(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other/x.npy", np.zeros(3))
    with pytest.raises(SourceError, match=r"no file in .* fits one of the 7 images; it has 1 latents, such as `x.npy`"):
        import_latents(tmp_path / "other", manifest, Modality.DEPTH, tmp_path / "s")
