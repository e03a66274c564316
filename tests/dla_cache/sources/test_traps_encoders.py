"""What would corrupt a cache of an encoder's features without a word, and what is said instead."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dla_cache.errors import SourceError, SpecError
from dla_cache.preprocessing import read_preprocessing
from dla_cache.sources import LatentSource, open_source
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import SIDE, generators, save_seeded
from tests.dla_cache.sources.tiny_encoders import VISION, processed, processor

Checkpoint = Callable[[str], Path]
PIXELS = some_pixels(SIDE)
SEEDS = (11, 12, 13)


def open_row(row: str, folder: Path, **parameters: Any) -> LatentSource:
    spec = spec_of(row, folder)
    return open_source(spec.model_copy(update={"parameters": spec.parameters | parameters}), "cpu")


def features(row: str, folder: Path, **parameters: Any) -> NDArray[Any]:
    with closing(open_row(row, folder, **parameters)) as source:
        put_out = source.encode(PIXELS, SEEDS)
        return getattr(put_out, "latents", put_out)


def shape_of(row: str, folder: Path, **parameters: Any) -> tuple[Any, ...]:
    with closing(open_row(row, folder, **parameters)) as source:
        return source.recipe.format.shape, source.recipe.format.axes


def stock(model_class: str, folder: Path, field: str, kind: str) -> NDArray[Any]:
    model = getattr(transformers, model_class).from_pretrained(folder, local_files_only=True)
    with torch.inference_mode():
        return getattr(model(processed(folder, PIXELS, kind)), field).numpy()


@pytest.mark.parametrize(
    "kind",
    [f"{name}ImageProcessorPil" for name in ("CLIP", "Siglip", "Bit", "Flava", "ViT", "DPT", "MobileViT", "ConvNext")],
)
def test_pixels_come_to_a_model_as_its_own_image_processor_makes_them(kind: str, tmp_path: Path) -> None:
    processor(kind).save_pretrained(tmp_path)
    made = read_preprocessing(tmp_path)(torch.from_numpy(PIXELS))
    torch.testing.assert_close(made, processed(tmp_path, PIXELS, kind).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "has no `preprocessor_config.json`"),
        ({"do_normalize": True}, "cannot be loaded, and its file does not say all"),
        ({"do_rescale": True, "do_normalize": True}, "does not say the mean"),
        ({"image_processor_type": "EfficientNetImageProcessor", "include_top": True}, "makes more of pixels"),
        ({"image_processor_type": "ImageGPTImageProcessor", "do_color_quantize": True}, "wants `do_color_quantize`"),
        ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "wants `rescale_offset`"),
    ],
)
def test_a_model_that_wants_pixels_otherwise_is_refused(
    said: Mapping[str, Any] | None, message: str, tmp_path: Path
) -> None:
    if said is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(SourceError, match=message):
        read_preprocessing(tmp_path)


def test_the_view_is_as_large_as_the_image_processor_makes_it_unless_a_spec_says_another(
    checkpoint: Checkpoint,
) -> None:
    folder = checkpoint("dinov2")
    with closing(open_row("dinov2", folder, view_size=0)) as source:
        assert source.recipe.source_view_size == SIDE == source.recipe.parameters["view_size"]
    assert shape_of("dinov2", folder, view_size=48)[0] == (10, 16)


def test_nothing_runs_behind_a_hook_and_everything_before_it(checkpoint: Checkpoint) -> None:
    with closing(open_row("auto-model", checkpoint("auto-model"), hook="layers.0.mlp", pool="none")) as source:
        ran: list[str] = []
        for name, module in source.model.named_modules():
            module.register_forward_pre_hook(lambda _module, _arguments, name=name: ran.append(name))
        source.encode(PIXELS, SEEDS)
    assert "embeddings" in ran
    assert "layers.0.mlp.fc2" in ran
    assert not [name for name in ran if name.startswith(("layers.1", "layernorm", "pooler"))]


def test_the_head_of_a_depth_model_is_never_run(checkpoint: Checkpoint) -> None:
    with closing(open_row("depth-anything", checkpoint("depth-anything"))) as source:
        source.model.head.conv1.weight.data.fill_(float("nan"))
        source.model.head.forward = None  # whoever calls it fails
        assert np.isfinite(source.encode(PIXELS, SEEDS)).all()
    finest, _ = shape_of("depth-anything", checkpoint("depth-anything"), hook="head:input[-1]")
    assert finest == (8, 8, 8)


def test_a_model_is_left_without_hooks_whatever_happens_on_the_way(checkpoint: Checkpoint) -> None:
    with closing(open_row("auto-model", checkpoint("auto-model"))) as source:
        before = source.encode(PIXELS, SEEDS)
        breaking = source.model.embeddings.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            source.encode(PIXELS, SEEDS)
        breaking.remove()
        assert not [name for name, module in source.model.named_modules() if module._forward_hooks]
        np.testing.assert_array_equal(source.encode(PIXELS, SEEDS), before)


@pytest.mark.parametrize(
    ("hook", "message", "hint"),
    [
        ("layers.O", "has no module `layers.O`", "`layers.0`"),
        ("nonsense", "has no module `nonsense`", "it begins with `embeddings`"),
        ("layers.0:output", "is no hook", "`:input`"),
        ("../layers", "is no hook", "`encoder.layer.11`"),
        ("layers.0[3]", "has one tensor, no `[3]`", "leave the brackets out"),
        ("layers.0.attention[7]", "has no `[7]`: there are 2", "count from 0"),
    ],
)
def test_a_hook_that_is_not_there_is_an_error_that_says_what_is(
    hook: str, message: str, hint: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(SourceError) as caught:
        open_row("auto-model", checkpoint("auto-model"), hook=hook, pool="none")
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_a_module_that_no_image_goes_through_is_an_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(SourceError, match="is there, but not run for an image"):
        open_row("auto-model", checkpoint("clip"), hook="text_model", pool="none")


def test_of_a_model_of_images_and_texts_the_image_half_is_asked_alone(checkpoint: Checkpoint) -> None:
    folder = checkpoint("clip")
    alone = stock("CLIPVisionModel", folder, "last_hidden_state", "CLIPImageProcessorPil")
    np.testing.assert_allclose(features("auto-model", folder, hook="", pool="none"), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "settings", "model_class", "field"),
    [
        ("clip", {"hook": "visual_projection"}, "CLIPVisionModelWithProjection", "image_embeds"),
        ("siglip", {"hook": "head"}, "SiglipVisionModel", "pooler_output"),
        ("dinov2", {"pool": "cls"}, "Dinov2Model", "pooler_output"),
    ],
)
def test_one_vector_an_image_is_the_librarys_own(
    row: str, settings: dict[str, Any], model_class: str, field: str, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(row)
    expected = stock(model_class, folder, field, "CLIPImageProcessorPil")
    np.testing.assert_allclose(features(row, folder, **settings), expected, rtol=0, atol=1e-5)
    assert shape_of(row, folder, **settings) == ((expected.shape[1],), ("channel",))


def test_axes_are_found_by_the_shape_of_activations(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert shape_of("auto-model", checkpoint("auto-model"), hook="layers.0", pool="none")[1] == ("token", "channel")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=SIDE)
    save_seeded(lambda: transformers.ConvNextModel(config), tmp_path)
    processor("ConvNextImageProcessorPil").save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="cannot be run with the attention backend `sdpa`"):
        open_row("auto-model", tmp_path)
    stage, inside = "encoder.stages.1", "encoder.stages.1.layers.0.layernorm"
    plain = {"attention": "eager", "pool": "none"}
    assert shape_of("auto-model", tmp_path, **plain, hook=stage) == ((12, 4, 4), ("channel", "height", "width"))
    assert shape_of("auto-model", tmp_path, **plain, hook=inside) == ((4, 4, 12), ("height", "width", "channel"))
    every_place = features("auto-model", tmp_path, **plain, hook=inside)
    pooled = features("auto-model", tmp_path, hook=inside, attention="eager", pool="mean")
    np.testing.assert_allclose(pooled, every_place.mean((1, 2)), rtol=0, atol=1e-6)
    with pytest.raises(SourceError, match="cannot be pooled by `cls`"):
        open_row("auto-model", tmp_path, hook=stage, attention="eager", pool="cls")


def test_features_that_depend_on_weights_that_the_checkpoint_lacks_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**VISION, num_labels=3)
    save_seeded(lambda: transformers.ViTForImageClassification(config), tmp_path)
    processor("ViTImageProcessorPil").save_pretrained(tmp_path)
    assert np.isfinite(features("auto-model", tmp_path, hook="", pool="none")).all()
    with pytest.raises(SourceError, match=r"depends on weights .* not hold: `pooler.dense.bias`"):
        open_row("auto-model", tmp_path, hook="pooler", pool="none")


def test_a_model_that_draws_at_random_is_refused(checkpoint: Checkpoint) -> None:
    # Of a masked autoencoder the patches that are left would be others each time; `vit-mae` masks none.
    with pytest.raises(SourceError, match="draws random numbers that no seed of an image decides"):
        open_row("auto-model", checkpoint("vit-mae"), hook="", pool="none")


@pytest.mark.parametrize("name", ["flash_attention_hub", "kernels-community/flash-attn", "flash_attention_2"])
def test_an_attention_backend_that_would_be_fetched_is_refused(name: str, checkpoint: Checkpoint) -> None:
    with pytest.raises(SourceError, match=f"does not take the attention backend `{name}`"):
        open_row("dinov2", checkpoint("dinov2"), attention=name)


def test_the_attention_backend_is_recorded_and_lies_outside_identity(checkpoint: Checkpoint) -> None:
    folder = checkpoint("dinov2")
    with closing(open_row("dinov2", folder)) as one, closing(open_row("dinov2", folder, attention="eager")) as other:
        assert (one.made_with["attention"], other.made_with["attention"]) == ("sdpa", "eager")
        assert one.model.config._attn_implementation == "sdpa"
        assert one.recipe == other.recipe
        np.testing.assert_allclose(one.encode(PIXELS, SEEDS), other.encode(PIXELS, SEEDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", ["dinov2", "vae-sd", "denoiser-features"])
def test_the_compute_dtype_is_that_of_the_model_and_part_of_the_recipe(row: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(row)
    with closing(open_row(row, folder, compute_dtype="bfloat16")) as source:
        model = source.pipeline.unet if row == "denoiser-features" else source.model
        assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
        assert source.recipe.parameters["compute_dtype"] == "bfloat16"
    rounded = features(row, folder, compute_dtype="bfloat16")
    exact = features(row, folder)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("row", ["dinov2", "vae-sd"])
@pytest.mark.parametrize("setting", [{"scheduler": "DDIMScheduler"}, {"masked_words": "cat"}, {"hok": "layer"}])
def test_settings_that_an_encoder_has_no_use_for_are_refused(
    row: str, setting: dict[str, str], checkpoint: Checkpoint
) -> None:
    with pytest.raises(SpecError, match=next(iter(setting))):
        open_row(row, checkpoint(row), **setting)


def test_a_draw_of_the_posterior_is_the_librarys_own_of_the_same_seeds(checkpoint: Checkpoint) -> None:
    folder = checkpoint("vae-sd")
    model = diffusers.AutoencoderKL.from_pretrained(folder, local_files_only=True)
    with torch.inference_mode():
        posterior = model.encode(2 * (torch.from_numpy(PIXELS) / 255) - 1).latent_dist
        expected = posterior.sample(generators(SEEDS)).numpy()
    with closing(open_row("vae-sd", folder, sample=True)) as source, closing(open_row("vae-sd", folder)) as mean:
        np.testing.assert_allclose(source.encode(PIXELS, SEEDS), expected, rtol=0, atol=1e-5)
        alone = source.encode(PIXELS[1:2], SEEDS[1:2])
        np.testing.assert_allclose(alone[0], expected[1], rtol=0, atol=1e-5)
        assert (source.ignores_seed, mean.ignores_seed) == (False, True)
        assert source.recipe.hash != mean.recipe.hash


def test_opening_an_encoder_says_nothing_on_the_terminal(
    checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Of CLIP the text half is not loaded, weight by weight; taesd's configuration has more than is known.
    folders = {row: checkpoint(row) for row in ("clip", "vae-tiny")}
    libraries = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    capfd.readouterr()
    for library in libraries:
        library.addHandler(caplog.handler)
    try:
        for row, folder in folders.items():
            features(row, folder)
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    assert (capfd.readouterr(), caplog.messages) == (("", ""), [])


def test_a_pipeline_of_which_a_component_is_not_whole_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for component, weight in (("unet", "conv_in.weight"), ("text_encoder", "final_layer_norm.weight")):
        folder = Path(shutil.copytree(checkpoint("denoiser-features"), tmp_path / component))
        file = next((folder / component).glob("*.safetensors"))
        save_file({name: kept for name, kept in load_file(file).items() if not name.endswith(weight)}, file)
        with pytest.raises(SourceError, match=f"{component}.*{weight}"):
            open_row("denoiser-features", folder)


def test_a_denoiser_is_asked_once_and_stopped_at_its_block(checkpoint: Checkpoint) -> None:
    with closing(open_row("denoiser-features", checkpoint("denoiser-features"))) as source:
        ran: list[str] = []
        unet = source.pipeline.unet
        for name in ("down_blocks.0", "up_blocks.0", "up_blocks.1", "conv_out"):
            unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        source.encode(PIXELS, SEEDS)
    assert ran == ["down_blocks.0", "up_blocks.0"]


def test_activations_of_a_denoiser_depend_on_block_noise_and_text(checkpoint: Checkpoint) -> None:
    folder = checkpoint("denoiser-features")
    usual = features("denoiser-features", folder)
    for change in ({"noise_step": 600}, {"prompt": "1 2 3"}):
        other = features("denoiser-features", folder, **change)
        assert other.shape == usual.shape
        assert np.abs(other - usual).max() > 1e-2
    assert shape_of("denoiser-features", folder, block="up_blocks.1")[0] != usual.shape[1:]
    assert shape_of("denoiser-features", folder, pool="mean") == ((16,), ("channel",))
    with pytest.raises(SpecError, match="`noise_step` is 1000"):
        open_row("denoiser-features", folder, noise_step=1000)
    with pytest.raises(SourceError, match=r"has no module `up_blocks\.7`"):
        open_row("denoiser-features", folder, block="up_blocks.7")
