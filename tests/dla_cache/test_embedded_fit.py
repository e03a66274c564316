"""How the embedded sources are made: what is fitted on what, resumed how, and what the card says of it."""

from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dla_cache.data.relief_digits import SPLITS, Split
from dla_cache.errors import SpecError, WorkInterrupted
from dla_cache.sources.fit import AutoencoderConfig, EmbeddedFit, FitSpec, FlowConfig
from dla_cache.sources.fit_card import SCORES, model_card
from dla_cache.sources.fit_pairs import HELD_OUT_VOICES, AudioPairs, DepthPairs, split_images
from dla_cache.sources.networks import PictureAutoencoder
from dla_cache.spec import load_yaml, parse_spec
from trainer.checkpoint import load_checkpoint
from trainer.loop import Loop
from trainer.schedule import LoopConfig

WEIGHTS = resources.files("dla_cache.sources") / "weights"
MANIFESTS = Path(__file__).parents[2] / "manifests"
SOURCES = ("embedded-depth", "embedded-audio")


def layout_of(path):
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}


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
    pairs = fitted.pairs
    digits_of = [{depth.numpy().tobytes() for depth in maps} for maps in (pairs.fitted_depth, pairs.held_out_depth)]
    assert [len(digits) for digits in digits_of] == [100, 20]
    assert digits_of[0].isdisjoint(digits_of[1])
    assert (len(pairs.fitted_pixels), len(pairs.held_out_pixels)) == (800, 40)


def test_image_and_depth_are_shifted_together_by_seed_and_step():
    pairs = DepthPairs(split_images(20), shift=2)
    depth = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs.fitted_depth, pairs.fitted_pixels = depth, depth.expand(-1, 3, -1, -1)
    batch = pairs.batch(0, 3, 16)
    assert batch.pixels.shape == (16, 3, 32, 32)
    assert torch.equal(batch.pixels, batch.targets.expand(-1, 3, -1, -1))
    assert torch.equal(batch.targets, pairs.batch(0, 3, 16).targets)
    assert not torch.equal(batch.targets, pairs.batch(0, 4, 16).targets)
    assert not torch.equal(batch.targets, pairs.batch(1, 3, 16).targets)
    pairs.shift = 0
    assert all(any(torch.equal(one, known) for known in depth) for one in pairs.batch(0, 3, 16).targets)


def test_a_sound_is_one_of_the_digit_in_the_image_by_a_voice_that_is_not_held_out():
    pairs = AudioPairs(split_images(20), shift=0)
    assert len(HELD_OUT_VOICES) == 2
    assert len(pairs.held_out_clips) == 10 * (5 + 3)
    batch = pairs.batch(0, 3, 64)
    label_of = {clip.numpy().tobytes(): int(label) for clip, label in zip(pairs.clips, pairs.clip_labels, strict=True)}
    images = [pixels.numpy().tobytes() for pixels in pairs.fitted_pixels]
    shown = [int(pairs.fitted_labels[images.index(pixels.numpy().tobytes())]) for pixels in batch.pixels]
    assert [label_of[clip.numpy().tobytes()] for clip in batch.targets] == shown
    assert len({clip.numpy().tobytes() for clip in batch.targets}) > 40
    assert not {clip.numpy().tobytes() for clip in pairs.held_out_clips} & label_of.keys()


def test_the_audio_flow_starts_from_the_image_encoder_of_the_shipped_depth_flow():
    spec = SPEC.model_copy(update={"source": "embedded-audio", "image_encoder": "embedded-depth"})
    encoder = EmbeddedFit(spec).flow.encoder.state_dict()
    with safe_open(WEIGHTS / "embedded-depth.safetensors", framework="pt") as file:
        shipped = {name: file.get_tensor(f"flow.encoder.{name}").float() for name in encoder}
    assert all(torch.equal(value, shipped[name]) for name, value in encoder.items())


def test_an_export_has_the_tensors_of_the_shipped_weights_and_a_card(fitted, tmp_path):
    fitted.fit_ridge()
    scores = fitted.export(tmp_path)
    for source in ("embedded-depth", "embedded-depth-ridge"):
        assert layout_of(tmp_path / f"{source}.safetensors") == layout_of(WEIGHTS / f"{source}.safetensors")
    card = (tmp_path / "embedded-depth.md").read_text(encoding="utf-8")
    for name, score in scores.items():
        assert f"| {name} | {score['depth_correlation']:.4f} | {score['latent_r2']:.4f} |" in card
    assert "selection" not in scores["embedded-depth"]


def test_an_audio_source_is_fitted_scored_and_exported_like_one_of_depth(few_digits, tmp_path):
    embedded = EmbeddedFit(SPEC.model_copy(update={"source": "embedded-audio"}))
    train(embedded.autoencoder_stage(), tmp_path / "autoencoder")
    train(embedded.flow_stage(), tmp_path / "flow")
    embedded.fit_ridge()
    scores = embedded.export(tmp_path)
    assert set(scores) == {"embedded-audio", "embedded-audio-ridge", "the autoencoder alone"}
    for source in ("embedded-audio", "embedded-audio-ridge"):
        assert layout_of(tmp_path / f"{source}.safetensors") == layout_of(WEIGHTS / f"{source}.safetensors")
        assert 0 <= scores[source]["right_digit"] <= 1


@pytest.mark.parametrize("source", SOURCES)
def test_the_model_card_has_data_seed_scores_licence_and_whether_labels_were_seen(source):
    card = " ".join((WEIGHTS / f"{source}.md").read_text(encoding="utf-8").split())
    for words in ("`generator` split", "`seed`: 0", f"| {source} |", "Apache-2.0"):
        assert words in card
    assert ("**No label was seen.**" in card) == (source == "embedded-depth")
    assert ("has seen the labels" in card) == (source == "embedded-audio")


@pytest.mark.parametrize("source", SOURCES)
def test_the_shipped_card_is_what_a_fit_would_write_and_says_what_the_held_out_digits_decided(source):
    card = (WEIGHTS / f"{source}.md").read_text(encoding="utf-8")
    lines = [line for line in card.splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    keys = [key for head in heads[1:] for key, words in SCORES.items() if words == head]
    scores = {name: {key: float(cell) for key, cell in zip(keys, cells, strict=True) if cell} for name, *cells in rows}
    spec = parse_spec(load_yaml(MANIFESTS / f"{source}-fit.yaml"), FitSpec, where=source)
    assert card == model_card(spec.model_dump(), 20_000, scores)
    assert "no part in fitting" not in card
    assert "were not fitted on" in card
    assert "chose which step of each stage was kept" in card


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
    autoencoder = PictureAutoencoder().eval()
    with torch.inference_mode():
        mean, logvar = autoencoder.moments(torch.zeros(2, 1, 32, 32))
        assert mean.shape == logvar.shape == (2, 8, 4, 4)
        assert autoencoder.decode(mean).shape == (2, 1, 32, 32)
