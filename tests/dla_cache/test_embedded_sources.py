"""The embedded sources: what they refuse, on what a latent depends, and how good it is."""

import hashlib
from importlib import resources

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open

import dla_cache.sources
from dla_cache.build import build_cache
from dla_cache.data.export import encode_png
from dla_cache.data.relief_digits import render_split
from dla_cache.data.spoken_digits import load_spoken_digits
from dla_cache.errors import MissingDependencyError, SourceError, SpecError
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.sources import SOURCES, open_source
from dla_cache.sources.check import check_source, sample_images
from dla_cache.sources.embedded import decode_audio, decode_depth
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store

EMBEDDED = [name for name in SOURCES if name.startswith("embedded-")]
DECODING = [name for name in EMBEDDED if SOURCES[name].row.decodes]
STOPPED = [name for name in EMBEDDED if name not in DECODING]
WEIGHTS = resources.files("dla_cache.sources") / "weights"


def spec_of(source="embedded-depth", **fields):
    modality = SOURCES[source].modality if source in SOURCES else Modality.DEPTH
    return LatentSpec(**{"modality": modality, "source": source, "dtype": "float32", **fields})


def layout_of(path):
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


@pytest.fixture(scope="module")
def flow():
    return open_source(spec_of(), "cpu")


@pytest.fixture(scope="module")
def held_out():
    """A hundred validation images, each of another digit, and their true depth."""
    _, pixels, depth = render_split("validation")
    return pixels[::8], depth[::8]


def test_an_unknown_source_is_refused_with_those_there_are():
    with pytest.raises(SourceError, match="no source `sora`") as refused:
        open_source(spec_of("sora"), "cpu")
    assert all(name in refused.value.hint for name in SOURCES)


@pytest.mark.parametrize(
    ("source", "parameters", "fault"),
    [
        ("embedded-depth", {"steps": 3}, "`steps`"),
        ("embedded-depth", {"sampling_steps": 0}, "`sampling_steps`"),
        ("embedded-depth-ridge", {"sampling_steps": 3}, "`sampling_steps`"),
    ],
)
def test_an_unknown_or_impossible_parameter_is_refused_by_its_name(source, parameters, fault):
    with pytest.raises(SpecError, match=fault) as refused:
        open_source(spec_of(source, parameters=parameters), "cpu")
    assert f"`{source}`" in refused.value.message


@pytest.mark.parametrize("source", EMBEDDED)
def test_another_modality_is_refused(source):
    with pytest.raises(SourceError, match=r"makes `(depth|audio)`, not `motion`") as refused:
        open_source(spec_of(source, modality=Modality.MOTION), "cpu")
    assert SOURCES[source].modality in refused.value.hint


def test_a_missing_library_is_named_with_its_cure(monkeypatch):
    entry = dla_cache.sources.SourceEntry(Modality.DEPTH, "a_library_that_is_not_there:Source", "made for this test")
    monkeypatch.setitem(SOURCES, "elsewhere", entry)
    with pytest.raises(MissingDependencyError, match="`a_library_that_is_not_there`") as refused:
        open_source(spec_of("elsewhere"), "cpu")
    assert "pip install" in refused.value.hint


def test_a_recipe_tells_all_that_decides_the_latents(flow):
    recipe = flow.recipe
    assert recipe.parameters == {"sampling_steps": 5}
    assert len(recipe.weights_sha256) == 64
    assert recipe.format.shape == (8, 4, 4)
    others = [
        spec_of(seed=1),
        spec_of(dtype="float16"),
        spec_of(parameters={"sampling_steps": 4}),
        spec_of("embedded-depth-ridge"),
    ]
    assert len({recipe.hash, *(open_source(other, "cpu").recipe.hash for other in others)}) == 5


def test_the_same_seed_gives_the_same_latent_and_another_seed_another(flow, held_out):
    pixels = held_out[0][:3]
    first = flow.encode(pixels, [1, 2, 3])
    assert np.array_equal(first, flow.encode(pixels, [1, 2, 3]))
    other = flow.encode(pixels, [1, 2, 4])
    assert np.array_equal(first[:2], other[:2])
    assert np.abs(first[2] - other[2]).max() > 1e-3


def test_the_image_matters_more_than_the_seed(flow, held_out):
    pixels = held_out[0][:8]
    one, two = flow.encode(pixels, [0] * 8), flow.encode(pixels, [1] * 8)
    of_seeds = np.abs(one - two).mean()
    of_images = np.abs(one - np.roll(one, 1, axis=0)).mean()
    assert of_images > 3 * of_seeds


def test_the_number_of_steps_matters(flow, held_out):
    few = open_source(spec_of(parameters={"sampling_steps": 1}), "cpu")
    assert np.abs(few.encode(held_out[0][:2], [0, 1]) - flow.encode(held_out[0][:2], [0, 1])).max() > 1e-2


@pytest.mark.parametrize("source", EMBEDDED)
def test_a_latent_is_the_same_to_the_bit_whatever_its_batch_its_place_and_the_threads(source, held_out):
    opened, pixels, seeds = open_source(spec_of(source), "cpu"), held_out[0][:70], [*range(70)]
    whole = opened.encode(pixels, seeds)
    assert np.array_equal(whole[::-1], opened.encode(pixels[::-1], seeds[::-1]))
    for start, stop in ((69, 70), (3, 10)):
        assert np.array_equal(whole[start:stop], opened.encode(pixels[start:stop], seeds[start:stop]))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert np.array_equal(whole, opened.encode(pixels, seeds))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A folder with the PNGs of seven images, and their rows."""
    folder, rows = tmp_path_factory.mktemp("listed"), []
    for rendering, pixels in zip(*(part[:7] for part in render_split("validation")[:2]), strict=True):
        content = encode_png(pixels)
        (folder / f"{rendering.image_id}.png").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        rows.append(ManifestRow(rendering.image_id, f"{rendering.image_id}.png", None, "validation", digest, 32, 32))
    return folder, rows


def test_what_is_stored_does_not_depend_on_batch_size_shard_size_or_order(listed, tmp_path):
    folder, rows = listed
    latents = (spec_of(parameters={"sampling_steps": 1}),)
    hashes, stored = set(), []
    for number, (batch_size, shard_size) in enumerate([(64, 512), (7, 512), (1, 512), (64, 5)]):
        for order in (rows, rows[::-1]) if number == 0 else (rows,):
            manifest = write_manifest(folder / "manifest.parquet", order, [])
            path = tmp_path / f"{number}-{order[0].image_id}"
            spec = CacheSpec(latents=latents, shard_size=shard_size)
            report = build_cache(manifest, spec, path, open_source=open_source, batch_size=batch_size)
            store = open_store(path)
            stored.append(store.read("depth", np.array([store.rows.row_of(row.image_id) for row in rows])))
            hashes |= {report.content_hash} if order is rows else set()
    assert len(hashes) == 1
    assert all(np.array_equal(one, stored[0]) for one in stored)


@pytest.mark.parametrize("source", EMBEDDED)
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_error(source, device):
    with pytest.raises(SourceError, match=f"device `{device}` cannot be used") as refused:
        open_source(spec_of(source), device)
    assert refused.value.hint


@pytest.mark.parametrize("source", EMBEDDED)
def test_latents_are_float32_for_the_store_to_round_and_finite_in_float16(source, held_out):
    opened = open_source(spec_of(source, dtype="float16"), "cpu")
    latents = opened.encode(held_out[0], range(100))
    assert (latents.dtype, opened.recipe.format.dtype) == (np.float32, "float16")
    assert latents.shape == (100, *opened.recipe.format.shape)
    assert np.isfinite(latents.astype(np.float16)).all()
    by_channel = np.moveaxis(latents, opened.recipe.format.channel_axis + 1, 0)
    assert (by_channel.reshape(len(by_channel), -1).std(axis=1) > 0.01).all()
    opened.close()


@pytest.mark.parametrize("source", STOPPED)
def test_encoding_never_decodes(source, held_out, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a decoder was built or called")

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", refuse)
    monkeypatch.setattr(diffusers.AutoencoderKL, "__init__", refuse)
    opened = open_source(spec_of(source), "cpu")
    assert opened.encode(held_out[0][:2], [0, 1]).shape == (2, 8, 4, 4)
    with pytest.raises(AssertionError, match="decoder"):
        decode_depth(np.zeros((1, 8, 4, 4), np.float16))


@pytest.mark.parametrize(("modality", "decode"), [("depth", decode_depth), ("audio", decode_audio)])
def test_the_decoded_control_is_the_picture_that_the_latent_decodes_to_in_patches(modality, decode, held_out):
    pixels, seeds = held_out[0][:5], range(5)
    plain, decoded = (
        open_source(spec_of(f"embedded-{modality}{control}"), "cpu").encode(pixels, seeds)
        for control in ("", "-decoded")
    )
    pictures = decode(plain)
    patches = pictures.reshape(5, 4, 8, 4, 8).swapaxes(2, 3).reshape(5, 16, 64)
    np.testing.assert_allclose(decoded, patches, atol=1e-5)  # of other numbers of images at a time


def test_a_picture_in_patches_is_not_mirrored_by_turning_their_grid():
    decoded = open_source(spec_of("embedded-depth-decoded"), "cpu").recipe.format
    assert "flattened into tokens" in decoded.no_mirror_of(Modality.DEPTH)


@pytest.mark.parametrize("modality", ["depth", "audio"])
def test_what_is_decoded_and_encoded_again_is_near_the_latent_and_another(modality, held_out):
    plain, again = (
        open_source(spec_of(f"embedded-{modality}{control}"), "cpu").encode(held_out[0], range(100))
        for control in ("", "-reencoded")
    )
    assert again.shape == plain.shape
    lost = ((plain - again) ** 2).mean() / plain.var()
    assert 1e-4 < lost < 0.5


@pytest.mark.parametrize("source", ["embedded-depth-decoded", "embedded-depth-reencoded"])
def test_a_control_that_decodes_passes_the_check_of_sources_for_it_says_so(source):
    claims = check_source(spec_of(source), "cpu", sample_images(), open_source=open_source).claims
    assert [claim for claim in claims if not claim.holds] == []
    assert "it decodes, as it says" in {claim.name for claim in claims}


@pytest.mark.parametrize("source", EMBEDDED)
def test_the_global_generator_of_torch_plays_no_part(source, held_out):
    opened = open_source(spec_of(source), "cpu")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = opened.encode(held_out[0][:2], [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(opened.encode(held_out[0][:2], [0, 1]), first)


def depth_correlation(latents, depth):
    decoded = decode_depth(latents).reshape(len(depth), -1)
    return np.mean([np.corrcoef(ours, true.ravel())[0, 1] for ours, true in zip(decoded, depth, strict=True)])


def test_on_unseen_digits_decoded_depth_is_near_the_truth_and_nearer_than_by_ridge(held_out):
    pixels, depth = held_out
    scores = {
        source: depth_correlation(
            open_source(spec_of(source, dtype="float16"), "cpu").encode(pixels, range(100)), depth
        )
        for source in ("embedded-depth", "embedded-depth-ridge")
    }
    assert scores["embedded-depth"] > 0.97
    assert scores["embedded-depth"] > scores["embedded-depth-ridge"] + 0.02


def right_digits(source, n_images):
    """How often the real clip nearest to the decoded sound says the digit in an unseen image."""
    plan, pixels, _ = render_split("validation")
    latents = open_source(spec_of(source, dtype="float16"), "cpu").encode(pixels[:n_images], range(n_images))
    spoken = load_spoken_digits()
    clips, sounds = (pictures.reshape(len(pictures), -1) for pictures in (spoken.clips / 255, decode_audio(latents)))
    distances = (sounds**2).sum(axis=1)[:, None] - 2 * sounds @ clips.T + (clips**2).sum(axis=1)
    return np.mean(spoken.labels[distances.argmin(axis=1)] == [rendering.label for rendering in plan[:n_images]])


@pytest.mark.parametrize("source", ["embedded-audio", "embedded-audio-ridge"])
def test_on_unseen_digits_the_decoded_sound_is_mostly_that_of_the_digit(source):
    assert right_digits(source, 200) > 0.8


def test_whoever_may_have_seen_labels_says_so():
    assert {name for name, entry in SOURCES.items() if "seen the labels" in entry.note} == {
        "embedded-audio",
        "embedded-audio-ridge",
        "embedded-audio-decoded",
        "embedded-audio-reencoded",
    }


@pytest.mark.parametrize("decode", [decode_depth, decode_audio])
def test_what_is_decoded_lies_between_0_and_1(decode):
    decoded = decode(np.random.default_rng(0).normal(scale=20, size=(4, 8, 4, 4)).astype(np.float16))
    assert decoded.shape == (4, 32, 32)
    assert decoded.dtype == np.float32
    assert (decoded.min(), decoded.max()) == (0, 1)


def test_the_shipped_generators_are_float16_of_at_most_4_mb():
    for source in STOPPED:
        assert len((WEIGHTS / f"{source}.safetensors").read_bytes()) <= 4e6
        assert {dtype for _, dtype in layout_of(WEIGHTS / f"{source}.safetensors").values()} == {"F16"}


def test_a_sample_seed_depends_on_each_of_its_parts_and_stays_what_it_was():
    seed = sample_seed(0, "depth", "digit-0001-render-0")
    assert seed == sample_seed(0, "depth", "digit-0001-render-0", 0) == 1614511397297180030
    others = [
        sample_seed(1, "depth", "digit-0001-render-0"),
        sample_seed(0, "audio", "digit-0001-render-0"),
        sample_seed(0, "depth", "digit-0001-render-1"),
        sample_seed(0, "depth", "digit-0001-render-0", 1),
    ]
    assert len({seed, *others}) == 5
    assert all(0 <= other < 2**63 for other in others)
