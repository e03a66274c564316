"""The leak audit finds images that are trained on and tested, and latents that saw labels."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.sources.catalog import SOURCES
from dla_cache.store import open_store
from tests.conftest import build_store
from trainer.checkpoint import write_atomically
from trainer.config import Roles
from trainer.leak_audit import AUDIT_NAME, NEAR_BITS, leak_audit, perceptual_hash, read_audit

ROLES = Roles(transfer=("transfer",))
SIDE = 32


def picture(seed):
    """A smooth random picture, as a photograph is to a hash."""
    coarse = np.random.default_rng(seed).integers(40, 200, (10, 10), dtype=np.uint8)
    return Image.fromarray(np.repeat(coarse[..., None], 3, axis=2)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def as_jpeg(image, quality=90):
    held = io.BytesIO()
    image.save(held, "JPEG", quality=quality)
    return held.getvalue()


def as_png(image):
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A store with a test image that is trained on byte by byte, and one that is compressed anew."""
    folder = tmp_path_factory.mktemp("leaky")
    contents = {
        f"{split}-{number}": as_png(picture(100 * place + number))
        for place, split in enumerate(("labelled", "transfer", "validation", "test"))
        for number in range(6)
    }
    contents["test-1"] = contents["transfer-2"]
    contents["test-2"] = as_jpeg(picture(3))  # labelled-3
    rows = []
    (folder / "images").mkdir()
    for image_id, content in contents.items():
        (folder / "images" / image_id).write_bytes(content)
        split, number = image_id.split("-")
        label = None if split == "transfer" else int(number) % 3
        digest = hashlib.sha256(content).hexdigest()
        rows.append(ManifestRow(image_id, f"images/{image_id}", label, split, digest, SIDE, SIDE))
    manifest = write_manifest(folder / "manifest.parquet", rows, ("red", "green", "blue"))
    return open_store(build_store(manifest, folder / "cache.zarr")), folder


def test_bytes_that_stand_in_two_roles_and_pictures_that_look_alike_are_found(leaky):
    store, folder = leaky
    audit = leak_audit(store, [ROLES], image_root=folder)
    assert [one.image_ids for one in audit.shared] == [{"transfer": "transfer-2", "test": "test-1"}]
    assert [(pair.image_id, pair.test_image_id) for pair in audit.near] == [("labelled-3", "test-2")]
    assert (audit.n_shared, audit.n_near_pairs, audit.n_near_test) == (1, 1, 1)
    assert audit.images == {"labelled": 6, "transfer": 6, "validation": 6, "test": 6}
    assert not audit.is_clean


def test_a_split_that_one_run_trains_on_and_another_tests_on_counts_for_both(leaky):
    store, folder = leaky
    audit = leak_audit(store, [Roles(), Roles(labelled=("test",), test=("labelled",))], image_root=folder)
    assert audit.test_in_statistics
    assert audit.n_shared == 12
    assert not audit.test_in_selection


def test_a_clean_store_is_called_clean(tiny):
    store = open_store(tiny.store)
    audit = leak_audit(store, [ROLES], image_root=Path(tiny.images))
    assert (audit.n_shared, audit.test_in_statistics, audit.test_in_selection, audit.is_clean) == (
        0,
        False,
        False,
        True,
    )
    assert [(one.modality, one.saw_labels) for one in audit.modalities] == [("depth", False)]


def test_an_audit_is_read_as_it_was_written(leaky, tmp_path):
    store, folder = leaky
    audit = leak_audit(store, [ROLES], image_root=folder, more_stores={"other": store})
    write_atomically(tmp_path / AUDIT_NAME, audit.model_dump_json(indent=1).encode())
    assert read_audit(tmp_path) == audit
    assert [one.store for one in audit.modalities] == ["", "other"]
    assert read_audit(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "alter",
    [
        lambda image: Image.open(io.BytesIO(as_jpeg(image))),
        lambda image: image.resize((96, 96), Image.Resampling.BICUBIC),
        lambda image: image.point(lambda value: min(255, int(value * 1.1 + 8))),
    ],
    ids=["compressed", "scaled", "brightened"],
)
def test_a_copy_that_was_made_again_has_nearly_the_same_hash(alter):
    bits = []
    for seed in range(20):
        pair = [np.asarray(one).transpose(2, 0, 1) for one in (picture(seed), alter(picture(seed)))]
        bits.append(int(np.bitwise_count(perceptual_hash(pair[0]) ^ perceptual_hash(pair[1]))))
    assert np.mean([one <= NEAR_BITS for one in bits]) >= 0.9


def test_pictures_of_other_things_have_other_hashes():
    hashes = [perceptual_hash(np.asarray(picture(seed)).transpose(2, 0, 1)) for seed in range(60)]
    bits = [int(np.bitwise_count(one ^ other)) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(bits) > NEAR_BITS


def test_the_catalog_marks_every_source_whose_note_says_that_it_saw_labels():
    marked = {name for name, entry in SOURCES.items() if entry.saw_labels}
    assert marked == {name for name, entry in SOURCES.items() if "seen the labels" in entry.note}
    assert "embedded-audio" in marked
