"""What a control must know of the images, labels of them or features; and what makes no sense."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from dla_cache.controls import control_store, plan_control
from dla_cache.errors import ManifestError, MissingLatentError, SpecError
from dla_cache.parquet import to_parquet
from dla_cache.spec import Modality
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.rows import RowTable

LAYOUTS = ["zarr"]
N = 24

Make = Callable[..., LatentStore]


@pytest.fixture
def make(made: SimpleNamespace, tmp_path: Path) -> Make:
    """A store of depth, of images `image-0` … in two splits, of which `test` tells its labels."""

    def make_store(
        name: str = "s", n_classes: int = 3, *, is_multi_label: bool = False, **recipe: object
    ) -> LatentStore:
        def label(row: int) -> object:
            return None if row % 2 == 0 else (row % n_classes,) if is_multi_label else row % n_classes

        rows = [replace(image, label=label(image.row)) for image in made.rows(N)]
        real = made.recipe(**recipe)
        class_names = ["a", "b", "c", "d"][:n_classes]
        table = RowTable(rows, is_multi_label=is_multi_label)
        store = create_store(tmp_path / name, table, class_names, 7, {real.modality.value: real})
        latents = made.latents(real, N)
        for shard in store.shards:
            store.write_shard(real.modality.value, shard, latents[shard.start : shard.stop], seconds=0, device="cpu")
        return store

    return make_store


def write_labels(path: Path, labels: list[object], image_ids: list[str] | None = None) -> Path:
    ids = image_ids or [f"image-{row}" for row in range(len(labels))]
    if path.suffix == ".csv":
        lines = ["image_id,label", *(f"{image_id},{label}" for image_id, label in zip(ids, labels, strict=True))]
        path.write_text("\n".join(lines))
    else:
        path.write_bytes(to_parquet(pa.table({"image_id": ids, "label": labels})))
    return path


@pytest.mark.parametrize("kind", ["shuffled-within-class", "shuffled-across-classes", "label-embedding"])
def test_images_without_a_label_are_refused_by_their_split_unless_a_table_tells(
    make: Make, tmp_path: Path, kind: str
) -> None:
    store = make()
    with pytest.raises(SpecError, match=f"`{kind}` needs the class of every image, and 12 have none, in split `train`"):
        control_store(store, tmp_path / "c", kind=kind)
    assert not (tmp_path / "c").exists()
    of_index = write_labels(tmp_path / "t.parquet", [row % 3 for row in range(N)])
    of_name = write_labels(tmp_path / "t.csv", ["abc"[row % 3] for row in range(N)])
    hashes = {
        control_store(store, tmp_path / path.suffix, kind=kind, labels=path).content_hash
        for path in (of_index, of_name)
    }
    assert len(hashes) == 1
    written = open_store(tmp_path / ".csv")
    assert written.rows == store.rows  # the store goes on hiding them
    other = write_labels(tmp_path / "o.csv", ["abc"[(row if row % 2 else row + 1) % 3] for row in range(N)])
    assert control_store(store, tmp_path / "o", kind=kind, labels=other).content_hash not in hashes


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (["zebra"] * N, "says label `zebra` of image `image-0` in row 1"),
        ([3] * N, "says label `3` of image"),
        ([-1] * N, "says label `-1` of image"),
        ([None] * N, "says label `None` of image"),
    ],
)
def test_a_label_that_is_no_class_of_the_store_is_refused(
    make: Make, tmp_path: Path, labels: list[object], fault: str
) -> None:
    with pytest.raises(ManifestError, match=fault):
        plan_control(
            make(), tmp_path / "c", kind="label-embedding", labels=write_labels(tmp_path / "t.parquet", labels)
        )


def test_a_table_that_contradicts_the_store_or_itself_is_refused(make: Make, tmp_path: Path) -> None:
    store = make()
    other = write_labels(tmp_path / "o.parquet", [(row + 1) % 3 for row in range(N)])
    with pytest.raises(SpecError, match="labels differ from the store's for 12 images: `image-1`"):
        plan_control(store, tmp_path / "c", kind="label-embedding", labels=other)
    twice = write_labels(tmp_path / "d.csv", ["a", "b"], ["image-0", "image-0"])
    with pytest.raises(ManifestError, match="two labels of image `image-0`"):
        plan_control(store, tmp_path / "c", kind="label-embedding", labels=twice)
    (tmp_path / "n.csv").write_text("image,label\na,b\n")
    with pytest.raises(ManifestError, match="has the columns `image`, `label`"):
        plan_control(store, tmp_path / "c", kind="label-embedding", labels=tmp_path / "n.csv")


def test_of_two_classes_another_class_would_tell_the_label(make: Make, tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "t.parquet", [row // 2 % 2 if row % 2 == 0 else row % 2 for row in range(N)])
    with pytest.raises(SpecError, match="would tell which one as well as a label"):
        plan_control(make(n_classes=2), tmp_path / "c", kind="shuffled-across-classes", labels=labels)


def test_controls_that_go_by_a_class_refuse_images_of_several(make: Make, tmp_path: Path) -> None:
    store = make(is_multi_label=True)
    with pytest.raises(SpecError, match=r"images of `.*` may have several"):
        plan_control(store, tmp_path / "c", kind="shuffled-within-class")
    for kind in ("shuffled", "gaussian"):
        assert control_store(store, tmp_path / kind, kind=kind).plan.kind == kind


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("gaussian", {"labels": Path("t.csv")}, "`gaussian` has no use for `labels`"),
        ("shuffled", {"labels": Path("t.csv")}, "`shuffled` has no use for `labels`"),
        ("gaussian", {"noise": 0.0}, "has no use for `noise`"),
        ("shuffled", {"series": "depth"}, "has no use for `series`"),
        ("label-embedding", {"noise": 1.5}, "`noise` is 1.5"),
        ("fabricated", {}, "is made of another model's features"),
        ("mixed", {}, "there is no control `mixed`"),
        ("gaussian", {"modalities": []}, "no modality of `.*` is named"),
        ("gaussian", {"modalities": ["audio"]}, "has no modality `audio`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path, kind: str, options: dict[str, object], fault: str
) -> None:
    with pytest.raises((SpecError, MissingLatentError), match=fault):
        control_store(make(), tmp_path / "c", kind=kind, **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", ["gaussian-by-place", "fabricated"])
def test_codes_have_no_such_control(make: Make, tmp_path: Path, kind: str) -> None:
    codes = make("codes", shape=(2, 3), dtype="uint8", modality=Modality.AUDIO)
    features = {"features": make("f")} if kind == "fabricated" else {}
    with pytest.raises(SpecError, match="is of real numbers, and `audio` holds codes"):
        plan_control(codes, tmp_path / "c", kind=kind, **features)


def test_a_fabricated_latent_is_a_function_of_the_features_with_the_real_statistics(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    recipe, pooled = made.recipe(), made.recipe(shape=(5,), modality=Modality("target-pooled-v0"))
    n_images = 600
    values = made.latents(pooled, n_images, seed=1)
    values[7] = values[9]
    source = made.store(tmp_path / "s", recipe, made.latents(recipe, n_images), 256)
    features = made.store(tmp_path / "f", pooled, values, 100)
    control_store(source, tmp_path / "c", kind="fabricated", features=features)
    control = open_store(tmp_path / "c")
    assert control.recipe("depth").parameters["features_content"] == features.content_hash()
    latents = control.read("depth", control.rows_of())
    assert (latents[7] == latents[9]).all()
    assert (latents[7] != latents[8]).any()
    real, made_up = (store.statistics("depth", ["train"]) for store in (source, control))
    np.testing.assert_allclose(made_up.mean, real.mean, atol=0.01)
    np.testing.assert_allclose(made_up.std, real.std, rtol=0.01)
    other = made.store(tmp_path / "g", pooled, values, 33)
    again = control_store(source, tmp_path / "d", kind="fabricated", features=other)
    assert again.content_hash == control.content_hash()


def test_features_must_be_of_every_image_and_of_the_same(make: Make, made: SimpleNamespace, tmp_path: Path) -> None:
    pooled = made.recipe(shape=(5,), modality=Modality("target-pooled-v0"))

    def features(name: str, rows: RowTable) -> LatentStore:
        store = create_store(tmp_path / name, rows, ["a", "b", "c"], 50, {"target-pooled-v0": pooled})
        store.write_shard("target-pooled-v0", store.shards[0], made.latents(pooled, len(rows)), seconds=0, device="cpu")
        return store

    store = make()
    train = [image for image in store.rows if image.split == "train"]
    some = features("some", RowTable([replace(image, row=row) for row, image in enumerate(train)]))
    with pytest.raises(MissingLatentError, match="has no features of 12 images, in split `test`: `image-1`"):
        plan_control(store, tmp_path / "c", kind="fabricated", features=some)
    others = features("others", RowTable([replace(image, sha256="1" * 64) for image in store.rows]))
    with pytest.raises(SpecError, match=r"24 images of `.*others` are others of the same ID"):
        plan_control(store, tmp_path / "c", kind="fabricated", features=others)
    with pytest.raises(MissingLatentError, match="has no modality `target-tokens-v0`"):
        plan_control(store, tmp_path / "c", kind="fabricated", features=others, series="target-tokens-v0")
