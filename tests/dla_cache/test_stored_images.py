"""Smaller pictures in the place of the images' files: what they are, that they are checked, and what refuses them."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dla_cache.build import BuildReport, build_cache
from dla_cache.errors import (
    CorruptShardError,
    ImageError,
    MissingLatentError,
    RecipeMismatchError,
    SpecError,
    StoreError,
)
from dla_cache.images import decode_image, shrink
from dla_cache.manifest import Manifest
from dla_cache.pairs import PairStream
from dla_cache.recompute import recompute
from dla_cache.spec import ORIGINAL_IMAGES, CacheSpec, ImageRecipe, canonical_json, parse_spec
from dla_cache.store import create_store, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.layout import sealed
from dla_cache.stored_images import encode_image, image_contents, image_recipe
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

SIZE = 4
"""Shorter side of the stored pictures; the images have 8 x 8 pixels."""

MADE = ("jpeg", "raw")


def recipe_of(encoding: str, size: int = SIZE, quality: int = 90) -> ImageRecipe:
    quality_of = {"quality": quality} if encoding == "jpeg" else {}
    return ImageRecipe(encoding=encoding, size=size, made_by="these", **quality_of)


def jpeg_of(height: int, width: int, orientation: int = 1) -> bytes:
    """A smooth picture."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(ramp, 3, axis=2).astype(np.uint8)).save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


@pytest.fixture
def build(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable) -> Callable:
    """Builds the same store of 23 images in five shards, again and again."""

    def run(encoding: str, *, store: str = "s", fields: dict[str, object] | None = None, **options) -> BuildReport:
        images = {"images": encoding, "image_size": SIZE, **(fields or {})}
        whole = spec.model_copy(update=images)
        return build_cache(manifest, whole, tmp_path / store, open_source=open_source, **options)

    return run


def pictures_of(manifest: Manifest, recipe: ImageRecipe) -> list[bytes]:
    return [encode_image(manifest.path_of(row.uri).read_bytes(), row.image_id, recipe) for row in manifest.rows()]


@pytest.mark.parametrize("encoding", MADE)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_made_picture_is_the_upright_image_with_its_shorter_side_of_that_size(
    encoding: str, orientation: int
) -> None:
    content = jpeg_of(60, 90, orientation)
    upright = decode_image(content, "a")
    made = decode_image(encode_image(content, "a", recipe_of(encoding, 20)), "a")
    assert made.shape == ((3, 20, 30) if orientation == 1 else (3, 30, 20))
    # Quality 90 of a smooth grey ramp; raw pixels are the very ones.
    np.testing.assert_allclose(made.astype(int), shrink(upright, 20), atol=6 if encoding == "jpeg" else 0)


@pytest.mark.parametrize("encoding", MADE)
def test_an_image_smaller_than_that_keeps_its_size(encoding: str) -> None:
    made = encode_image(jpeg_of(30, 50), "a", recipe_of(encoding, 256))
    assert decode_image(made, "a").shape == (3, 30, 50)


def test_quality_is_that_of_the_jpeg_and_colours_are_subsampled_as_usual() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    sizes = [len(encode_image(buffer.getvalue(), "a", recipe_of("jpeg", 64, quality))) for quality in (30, 60, 90)]
    assert sizes == sorted(set(sizes))
    with Image.open(io.BytesIO(encode_image(buffer.getvalue(), "a", recipe_of("jpeg", 64, 90)))) as image:
        image.load()
        expected = io.BytesIO()
        Image.new("RGB", (1, 1)).save(expected, "JPEG", quality=90, subsampling="4:2:0")
        with Image.open(expected) as tables:
            assert image.quantization == tables.quantization
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]


def test_a_raw_picture_is_a_ppm_that_any_reader_opens() -> None:
    made = encode_image(jpeg_of(30, 50), "a", recipe_of("raw", 20))
    assert made.startswith(b"P6 33 20 255\n")
    assert len(made) == 13 + 3 * 33 * 20
    with Image.open(io.BytesIO(made)) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), decode_image(made, "a"))


def test_an_image_too_long_for_a_jpeg_is_refused_and_named() -> None:
    buffer = io.BytesIO()
    Image.new("L", (65_501, 1)).save(buffer, "PNG")
    with pytest.raises(ImageError, match=r"`long` of 65501 x 1 pixels cannot be stored as JPEG[\s\S]*`raw`"):
        encode_image(buffer.getvalue(), "long", recipe_of("jpeg"))
    assert decode_image(encode_image(buffer.getvalue(), "long", recipe_of("raw")), "long").shape == (3, 1, 65_501)


@pytest.mark.parametrize("encoding", MADE)
def test_a_store_of_pictures_holds_them_says_what_they_are_and_verifies(
    tmp_path: Path, manifest: Manifest, layout: str, build: Callable, encoding: str
) -> None:
    bare = build("none", store="bare", fields={"image_size": 256})
    report = build(encoding)
    assert (report.images_stored, report.content_hash) == (23, bare.content_hash)
    store = open_store(tmp_path / "s")
    recipe = store.metadata.images
    assert (recipe.encoding, recipe.size, recipe.quality) == (encoding, SIZE, 90 if encoding == "jpeg" else None)
    assert recipe.made_by.startswith("Pillow ")
    rows = [22, 3, 3, 0, 17]
    pictures = pictures_of(manifest, recipe)
    assert store.read_images(np.array(rows)) == [pictures[row] for row in rows]
    assert verify_store(store, manifest).problems == ()
    card = (tmp_path / "s" / "README.md").read_text()
    assert f"lie in the store as smaller pictures: {encoding}, size {SIZE}, " in card
    told = json.loads((tmp_path / "s" / store.metadata.layout.main_file).read_bytes())
    told = told["attributes"]["dla"] if layout == "zarr" else told
    assert told["images"] == recipe.facts
    said = hashlib.sha256(canonical_json(told["images"]).encode()).hexdigest()
    assert said == store.committed("images")[0].recipe_hash


@pytest.mark.parametrize("encoding", MADE)
def test_a_store_of_pictures_has_the_same_bytes_whoever_builds_it(
    tmp_path: Path, build: Callable, encoding: str
) -> None:
    build(encoding)
    for rank in (1, 0):
        build(encoding, store="t", rank=rank, world_size=2, batch_size=2)
    one, other = (open_store(tmp_path / name).committed("images") for name in ("s", "t"))
    assert [one[shard].file_sha256 for shard in range(5)] == [other[shard].file_sha256 for shard in range(5)]


@pytest.mark.parametrize("layout", ["webdataset"], indirect=True, scope="session")
@pytest.mark.parametrize(("encoding", "suffix"), [("jpeg", "jpg"), ("raw", "ppm")])
def test_pictures_in_tars_have_the_suffix_of_their_encoding(
    tmp_path: Path, build: Callable, encoding: str, suffix: str
) -> None:
    build(encoding)
    assert f"image-0.{suffix}\0".encode() in open_store(tmp_path / "s").shard_path("images", 0).read_bytes()


def test_a_flipped_bit_in_a_picture_and_a_picture_of_another_image_are_noticed(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    build("raw")
    store = open_store(tmp_path / "s")
    path = store.shard_path("images", 1)
    content = path.read_bytes()
    pictures = pictures_of(manifest, store.metadata.images)[5:10]
    flipped = bytearray(content)
    flipped[content.index(pictures[2]) + 30] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CorruptShardError, match="shard 1 of `images` is damaged at `image-7`"):
        open_store(tmp_path / "s").read_images(np.arange(23))
    swapped = store.layout_of("images").encode(store.rows.image_ids[5:10], [pictures[1], pictures[0], *pictures[2:]])
    for file, bytes_of_file in zip(store.shard_files("images", 1), swapped, strict=True):
        file.write_bytes(bytes_of_file)
    assert any("not those that were committed" in problem.what for problem in verify_store(store).problems)
    assert build("raw", repair=True).shards_repaired == 1
    assert verify_store(open_store(tmp_path / "s"), manifest).problems == ()


@pytest.mark.parametrize(
    ("encoding", "fields", "fault"),
    [
        ("jpeg", {"image_size": 5}, "`images.size` `4` → `5`"),
        ("jpeg", {"image_quality": 80}, "`images.quality` `90` → `80`"),
        ("raw", {}, "`images.encoding` `jpeg` → `raw`"),
        ("original", {}, "`images.encoding` `jpeg` → `original`"),
    ],
)
def test_a_store_refuses_images_held_otherwise_and_names_the_field(
    build: Callable, encoding: str, fields: dict[str, int], fault: str
) -> None:
    build("jpeg")
    with pytest.raises(RecipeMismatchError, match=fault):
        build(encoding, fields=fields)


def test_pictures_of_another_library_are_refused_and_without_images_the_build_goes_on(
    monkeypatch: pytest.MonkeyPatch, build: Callable
) -> None:
    build("jpeg")
    monkeypatch.setattr("simplejpeg.__version__", "0.1")
    with pytest.raises(RecipeMismatchError, match=r"`images.made_by` `Pillow .*` → `Pillow .*, simplejpeg 0\.1`"):
        build("jpeg")
    assert build("none").shards_committed == 0


@pytest.mark.parametrize("encoding", MADE)
def test_a_stream_decodes_the_stored_pictures_and_needs_no_folder(
    tmp_path: Path, manifest: Manifest, build: Callable, encoding: str
) -> None:
    build(encoding)
    pictures = pictures_of(manifest, open_store(tmp_path / "s").metadata.images)
    shutil.rmtree(manifest.root / "images")
    stream = PairStream(open_store(tmp_path / "s"), None, ["train"], 4, seed=0, decode=decode_image)
    for batch in stream.epoch_once():
        for row, pixels in zip(batch.rows, batch.pixels, strict=True):
            assert np.array_equal(pixels, decode_image(pictures[row], "a"))


def test_image_contents_are_those_of_the_store_or_of_the_folder(
    tmp_path: Path, manifest: Manifest, build: Callable
) -> None:
    build("raw")
    store = open_store(tmp_path / "s")
    pictures = pictures_of(manifest, store.metadata.images)
    assert image_contents(store, None, [5, 2]) == [pictures[5], pictures[2]]
    file = manifest.path_of("images/image-5.png")
    assert image_contents(store, manifest.root, np.array([5])) == [file.read_bytes()]
    file.write_bytes(b"another")
    with pytest.raises(ImageError, match="`image-5`"):
        image_contents(store, manifest.root, [5])


def test_latents_are_computed_again_from_the_files_and_never_from_pictures(
    tmp_path: Path, manifest: Manifest, build: Callable, open_source: Callable
) -> None:
    build("jpeg")
    build("none", store="bare", fields={"image_size": 256})
    for name, held in (("s", "smaller pictures"), ("bare", "no images")):
        store = open_store(tmp_path / name)
        with pytest.raises(MissingLatentError, match=rf"holds {held}: its sources saw the files\nhint: "):
            recompute(store, None, 5, open_source=open_source)
        (one,) = recompute(store, manifest.root, 5, open_source=open_source)
        assert one.n_equal == 5


def test_a_converted_store_has_the_same_pictures(tmp_path: Path, layout: str, build: Callable) -> None:
    build("jpeg")
    other = "webdataset" if layout == "zarr" else "zarr"
    source = open_store(tmp_path / "s")
    convert_store(source, tmp_path / "t", other)
    target = open_store(tmp_path / "t")
    assert target.metadata.images == source.metadata.images
    assert target.read_images(np.arange(23)) == source.read_images(np.arange(23))


def test_a_removed_image_leaves_no_picture(tmp_path: Path, manifest: Manifest, build: Callable) -> None:
    build("raw")
    picture = pictures_of(manifest, open_store(tmp_path / "s").metadata.images)[7]
    path = open_store(tmp_path / "s").shard_path("images", 1)
    assert picture in path.read_bytes()
    take_down([tmp_path / "s"], ["image-7"])
    assert picture not in path.read_bytes()
    assert verify_store(open_store(tmp_path / "s")).problems == ()


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"images": "original", "image_size": 128}, "`image_size` is of images as `jpeg` or `raw`, not as `original`"),
        ({"image_quality": 80}, "`image_quality` is of images as `jpeg`, not as `none`"),
        ({"images": "raw", "image_quality": 80}, "`image_quality` is of images as `jpeg`, not as `raw`"),
        ({"images": "jpeg", "image_quality": 101}, "less than or equal to 100"),
        ({"images": "raw", "image_size": 0}, "greater than 0"),
    ],
)
def test_a_setting_of_images_without_a_use_is_refused(fields: dict[str, object], fault: str) -> None:
    latents = [{"modality": "depth", "source": "pixels"}]
    with pytest.raises(SpecError, match=fault):
        parse_spec({"latents": latents, **fields}, CacheSpec, where="spec.yaml")
    plain = parse_spec({"latents": latents}, CacheSpec, where="spec.yaml")
    assert parse_spec(plain.model_dump(), CacheSpec, where="as printed") == plain
    assert image_recipe(plain) is None


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        ({"encoding": "wavelets"}, "holds images as `wavelets`\nhint: upgrade dla"),
        ({"encoding": "jpeg", "size": 4}, "metadata of .* is damaged.*not the fields of images as `jpeg`"),
        ({"encoding": "original", "size": 4}, "metadata of .* is damaged.*not the fields of images as `original`"),
        ("original", "metadata of .* is damaged"),
    ],
)
def test_a_main_file_that_says_something_else_of_images_is_refused(
    tmp_path: Path, made: SimpleNamespace, layout: str, images: object, fault: str
) -> None:
    store = create_store(tmp_path / "s", made.rows(3), [], 3, {}, layout=layout, images=ORIGINAL_IMAGES)
    path = tmp_path / "s" / store.metadata.layout.main_file
    told = json.loads(path.read_bytes())
    place = told["attributes"] if layout == "zarr" else {"dla": told}
    forged = sealed({**place["dla"], "images": images} | {"sha256": ""})
    forged = sealed({name: value for name, value in forged.items() if name != "sha256"})
    place["dla"] = forged
    path.write_text(json.dumps(told if layout == "zarr" else forged))
    with pytest.raises(StoreError, match=rf"(?s){fault}"):
        open_store(tmp_path / "s")
