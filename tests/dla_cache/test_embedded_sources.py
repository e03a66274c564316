"""The embedded sources: what they refuse, on what a latent depends, how good it is, and how they are made."""

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
from dla_cache.data.relief_digits import SPLITS, Split, render_split
from dla_cache.errors import MissingDependencyError, SourceError, SpecError, WorkInterrupted
from dla_cache.manifest import ManifestRow, write_manifest
from dla_cache.sources import SOURCES, open_source
from dla_cache.sources.embedded import DepthAutoencoder, decode_depth
from dla_cache.sources.fit import AutoencoderConfig, DepthPairs, EmbeddedFit, FitSpec, FlowConfig, model_card
from dla_cache.sources.seeding import sample_seed
from dla_cache.spec import CacheSpec, LatentSpec, Modality, parse_spec
from dla_cache.store import open_store
from trainer.checkpoint import load_checkpoint
from trainer.loop import Loop, LoopConfig

WEIGHTS = resources.files("dla_cache.sources") / "weights"


def spec_of(source="embedded-depth", **fields):
    return LatentSpec(**{"modality": Modality.DEPTH, "source": source, "dtype": "float32", **fields})


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


@pytest.mark.parametrize("source", SOURCES)
def test_another_modality_is_refused(source):
    with pytest.raises(SourceError, match="makes `depth`, not `audio`"):
        open_source(spec_of(source, modality=Modality.AUDIO), "cpu")


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


@pytest.mark.parametrize("source", SOURCES)
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


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_error(source, device):
    with pytest.raises(SourceError, match=f"device `{device}` cannot be used") as refused:
        open_source(spec_of(source), device)
    assert refused.value.hint


@pytest.mark.parametrize("source", SOURCES)
def test_stored_latents_are_finite_float16(source, held_out):
    opened = open_source(spec_of(source, dtype="float16"), "cpu")
    latents = opened.encode(held_out[0], range(100))
    assert latents.dtype == np.float16 == np.dtype(opened.recipe.format.dtype)
    assert latents.shape == (100, 8, 4, 4)
    assert np.isfinite(latents).all()
    assert (latents.std(axis=(0, 2, 3)) > 0.01).all()
    opened.close()


@pytest.mark.parametrize("source", SOURCES)
def test_encoding_never_decodes(source, held_out, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a decoder was built or called")

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", refuse)
    monkeypatch.setattr(diffusers.AutoencoderKL, "__init__", refuse)
    opened = open_source(spec_of(source), "cpu")
    assert opened.encode(held_out[0][:2], [0, 1]).shape == (2, 8, 4, 4)
    with pytest.raises(AssertionError, match="decoder"):
        decode_depth(np.zeros((1, 8, 4, 4), np.float16))


@pytest.mark.parametrize("source", SOURCES)
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
        for source in SOURCES
    }
    assert scores["embedded-depth"] > 0.97
    assert scores["embedded-depth"] > scores["embedded-depth-ridge"] + 0.02


def test_decoded_depth_lies_between_0_and_1(held_out):
    decoded = decode_depth(np.random.default_rng(0).normal(scale=20, size=(4, 8, 4, 4)).astype(np.float16))
    assert decoded.shape == (4, 32, 32)
    assert decoded.dtype == np.float32
    assert (decoded.min(), decoded.max()) == (0, 1)


def test_the_shipped_generator_is_float16_of_at_most_4_mb():
    assert len((WEIGHTS / "embedded-depth.safetensors").read_bytes()) <= 4e6
    for source in SOURCES:
        assert {dtype for _, dtype in layout_of(WEIGHTS / f"{source}.safetensors").values()} == {"F16"}


def test_the_model_card_has_data_seed_scores_and_licence():
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    for words in ("No label was seen", "`generator` split", "`seed`: 0", "| embedded-depth |", "Apache-2.0"):
        assert words in card


def test_the_shipped_card_is_what_a_fit_would_write_and_says_what_the_held_out_digits_decided():
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.count("|") == 4]
    scores = {name: {"depth_correlation": float(one), "latent_r2": float(two)} for name, one, two in table[2:]}
    assert card == model_card(FitSpec(), 20_000, scores)
    assert "no part in fitting" not in card
    assert "were not fitted on" in card
    assert "chose which step of each stage was kept" in card


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


SPEC = FitSpec(
    held_out_digits=20,
    autoencoder=AutoencoderConfig(steps=4, batch_size=8, learning_rate=2e-3, ema_decay=0.5),
    flow=FlowConfig(steps=4, batch_size=8, learning_rate=2e-3, ema_decay=0.5),
)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """A generator split of 120 digits; the shipped weights were made from 2,700."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPLITS, "generator", Split(12, 8, labelled=False))
        yield


def train(stage, folder, should_stop=lambda _: False):
    config = LoopConfig(
        steps=stage.config.steps,
        learning_rate=stage.config.learning_rate,
        ema_decay=stage.config.ema_decay,
        evaluate_steps=2,
    )
    loop = Loop(stage.task, config, folder, seed=0)
    if (folder / "last.safetensors").exists():
        loop.resume()
    loop.run(stage.batches, stage.score, should_stop=lambda: should_stop(loop.step))
    stage.task.module.load_state_dict(load_checkpoint(folder / "best.safetensors")[0])
    stage.task.module.eval()


@pytest.fixture(scope="module")
def fitted(few_digits, tmp_path_factory):
    """The stages run through, four steps each."""
    folder, embedded = tmp_path_factory.mktemp("fit"), EmbeddedFit(SPEC)
    train(embedded.autoencoder_stage(), folder / "autoencoder")
    train(embedded.flow_stage(), folder / "flow")
    return embedded


def test_a_fit_that_is_stopped_in_both_stages_and_resumed_is_bitwise_the_unbroken_one(fitted, tmp_path):
    embedded = EmbeddedFit(SPEC)
    with pytest.raises(WorkInterrupted):
        train(embedded.autoencoder_stage(), tmp_path / "autoencoder", lambda step: step == 3)
    embedded = EmbeddedFit(SPEC)
    train(embedded.autoencoder_stage(), tmp_path / "autoencoder")
    with pytest.raises(WorkInterrupted):
        train(embedded.flow_stage(), tmp_path / "flow", lambda step: step == 1)
    embedded = EmbeddedFit(SPEC)
    train(embedded.autoencoder_stage(), tmp_path / "autoencoder")
    train(embedded.flow_stage(), tmp_path / "flow")
    for ours, unbroken in ((embedded.autoencoder, fitted.autoencoder), (embedded.flow, fitted.flow)):
        expected = unbroken.state_dict()
        assert [name for name, value in ours.state_dict().items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize(
    "fields", [{"seed": -1}, {"seed": 2**63}, {"held_out_digits": 0}, {"shift_pixels": 32}, {"kl_weight": float("inf")}]
)
def test_a_fit_spec_out_of_bounds_is_refused_by_its_field(fields):
    with pytest.raises(SpecError, match=f"`{next(iter(fields))}`"):
        parse_spec(fields, FitSpec, where="fit.yaml")


@pytest.mark.parametrize("held_out_digits", [120, 121])
def test_holding_out_all_digits_is_refused(held_out_digits):
    with pytest.raises(SpecError, match="has 120 digits in all") as refused:
        EmbeddedFit(SPEC.model_copy(update={"held_out_digits": held_out_digits}))
    assert "at most 119" in refused.value.hint


def test_one_field_of_a_stage_leaves_the_others_at_their_defaults():
    spec = parse_spec({"flow": {"steps": 2}, "autoencoder": {"batch_size": 3}}, FitSpec, where="fit.yaml")
    assert spec.flow == FitSpec().flow.model_copy(update={"steps": 2})
    assert spec.autoencoder == FitSpec().autoencoder.model_copy(update={"batch_size": 3})


def test_held_out_digits_are_not_fitted_on(fitted):
    digits_of = [{depth.numpy().tobytes() for depth in pairs.depth} for pairs in (fitted.fitted, fitted.held_out)]
    assert [len(digits) for digits in digits_of] == [100, 20]
    assert digits_of[0].isdisjoint(digits_of[1])
    assert (len(fitted.fitted.pixels), len(fitted.held_out.pixels)) == (800, 40)


def test_image_and_depth_are_shifted_together_by_seed_and_step():
    depth = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = DepthPairs(depth.expand(-1, 3, -1, -1), depth)
    batch = pairs.batch(0, 3, 16, shift=2)
    assert batch.pixels.shape == (16, 3, 32, 32)
    assert torch.equal(batch.pixels, batch.depth.expand(-1, 3, -1, -1))
    assert torch.equal(batch.depth, pairs.batch(0, 3, 16, shift=2).depth)
    assert not torch.equal(batch.depth, pairs.batch(0, 4, 16, shift=2).depth)
    assert not torch.equal(batch.depth, pairs.batch(1, 3, 16, shift=2).depth)
    unmoved = pairs.batch(0, 3, 16, shift=0)
    assert all(any(torch.equal(one, known) for known in depth) for one in unmoved.depth)


def test_an_export_has_the_tensors_of_the_shipped_weights_and_a_card(fitted, tmp_path):
    fitted.fit_ridge()
    scores = fitted.export(tmp_path)
    for source in SOURCES:
        assert layout_of(tmp_path / f"{source}.safetensors") == layout_of(WEIGHTS / f"{source}.safetensors")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for name, score in scores.items():
        assert f"| {name} | {score['depth_correlation']:.4f} | {score['latent_r2']:.4f} |" in card
    assert scores["autoencoder on true depth"]["latent_r2"] == 1


def test_the_autoencoder_learns_in_a_few_steps():
    embedded = EmbeddedFit(SPEC)
    stage = embedded.autoencoder_stage()
    optimizer = torch.optim.AdamW(stage.task.module.parameters(), lr=2e-3)
    losses = []
    for _, batch in zip(range(25), stage.batches(0), strict=False):
        loss = stage.task.losses(batch).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_autoencoder_gives_depth_of_its_own_size():
    autoencoder = DepthAutoencoder().eval()
    with torch.inference_mode():
        mean, logvar = autoencoder.moments(torch.zeros(2, 1, 32, 32))
        assert mean.shape == logvar.shape == (2, 8, 4, 4)
        assert autoencoder.decode(mean).shape == (2, 1, 32, 32)
