"""Training on what a store holds of the images: the same run from the very pixels, and never half on others."""

import shutil

import pytest

from dla_cache.errors import RecipeMismatchError
from dla_cache.spec import ImageRecipe
from dla_cache.store import create_store, open_store
from dla_cache.stored_images import encode_image, image_contents
from trainer.run import train_run

RAW = ImageRecipe(encoding="raw", size=256, made_by="these")
SMALL = ImageRecipe(encoding="jpeg", size=4, quality=90, made_by="these")


@pytest.fixture(scope="module")
def holding(tiny, tmp_path_factory):
    """`holding(recipe)`: a copy of the tiny store that holds its images so."""

    def make(recipe):
        path = tmp_path_factory.mktemp("pictures") / "cache.zarr"
        shutil.copytree(tiny.store, path)
        facts = open_store(path).metadata
        store = create_store(path, facts.rows, facts.class_names, facts.shard_size, facts.recipes, images=recipe)
        for shard in store.shards:
            rows = store.kept_rows(shard)
            files = image_contents(store, tiny.images, rows)
            ids = store.rows.kept_ids_of(shard)
            pictures = [encode_image(file, image_id, recipe) for file, image_id in zip(files, ids, strict=True)]
            store.write_images(shard, pictures, seconds=0)
        return str(path)

    return make


def test_raw_pictures_as_large_as_the_images_train_the_same_student(tiny, holding, tmp_path):
    fields = {"objective": {"ce": {}}, "loop": {"steps": 2, "evaluate_steps": 2}}
    from_files = train_run(tiny.run("student", tmp_path / "files", **fields))
    from_store = train_run(tiny.run("student", tmp_path / "store", store=holding(RAW), images=None, **fields))
    assert from_files.test_score == from_store.test_score
    one, other = (tmp_path / name / "student" / "model.safetensors" for name in ("files", "store"))
    assert one.read_bytes() == other.read_bytes()


def test_a_teacher_and_its_student_are_trained_on_small_pictures(tiny, holding, tmp_path):
    store = holding(SMALL)
    loop = {"steps": 2, "evaluate_steps": 2}
    train_run(tiny.run("teacher", tmp_path / "teacher", store=store, images=None, loop=loop))
    fields = {"teacher": tmp_path / "teacher", "objective": tiny.objectives["messy"], "loop": loop}
    student = train_run(tiny.run("student", tmp_path / "student", store=store, images=None, **fields))
    assert student.test_images == 4


def test_a_run_does_not_resume_on_other_pictures(tiny, holding, tmp_path):
    fields = {"objective": {"ce": {}}, "loop": {"steps": 2, "evaluate_steps": 2}}
    train_run(tiny.run("student", tmp_path / "run", **fields))
    with pytest.raises(RecipeMismatchError, match=r"was begun on other pictures of the images than"):
        train_run(tiny.run("student", tmp_path / "run", store=holding(SMALL), images=None, **fields), resume=True)
