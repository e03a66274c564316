"""An image model of transformers in the place of a teacher's patches."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

from dla_cache.errors import SpecError
from tests.trainer.backbones import FAMILIES, MEAN, STD, save_pretrained
from tests.trainer.teachers import make_batch, small_config
from trainer.backbone import BackboneConfig, check_backbone_pixels, pretrained_backbone
from trainer.pretrained import PretrainedFacts, read_pretrained
from trainer.teacher import Teacher

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return {family: save_pretrained(family, folder / family) for family in FAMILIES}


def build_teacher(folder, *, freeze=False, **settings):
    torch.manual_seed(0)
    config = small_config(backbone={"pretrained": str(folder), "freeze": freeze}, **settings)
    teacher = Teacher(config, read_pretrained(str(folder), None))
    teacher.load_backbone()
    torch.nn.init.normal_(teacher.head.weight)
    return teacher


@FAMILY
def test_the_tokens_of_the_image_are_the_last_of_the_pretrained_model_normed_and_projected(saved, family):
    teacher = build_teacher(saved[family]).eval()
    entered = []
    teacher.blocks[0].register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    pixels, latents = make_batch()
    with torch.no_grad():
        output = teacher(pixels, latents)
        stock = AutoModel.from_pretrained(saved[family]).eval()(pixel_values=pixels).last_hidden_state
    stock = stock.flatten(2).transpose(1, 2) if stock.dim() == 4 else stock
    expected = teacher.backbone.project(teacher.backbone.norm(stock))
    image = teacher.spans["image"]
    torch.testing.assert_close((entered[0] - teacher.positions)[:, image], expected, atol=1e-5, rtol=0)
    assert image == slice(1, 1 + stock.shape[1])
    assert output.block_outputs[-1].shape == (5, 1 + stock.shape[1] + 2 * 4, 16)


@FAMILY
def test_a_frozen_backbone_has_no_gradient_and_is_never_in_training(saved, family):
    teacher = build_teacher(saved[family], freeze=True).train()
    before = {name: value.clone() for name, value in teacher.backbone.model.state_dict().items()}
    teacher(*make_batch()).logits.sum().backward()
    assert teacher.training
    assert not any(module.training for module in teacher.backbone.model.modules())
    assert all(parameter.grad is None for parameter in teacher.backbone.model.parameters())
    assert teacher.backbone.project.weight.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in teacher.backbone.model.state_dict().items())


@FAMILY
def test_a_backbone_that_is_not_frozen_learns(saved, family):
    teacher = build_teacher(saved[family]).train()
    teacher(*make_batch(8)).logits[:, 0].sum().backward()
    unreached = [name for name, value in teacher.backbone.model.named_parameters() if value.grad is None]
    # A token for masked images, and the norm of what it pools.
    of_other_uses = {"dinov2": ["embeddings.mask_token"], "convnext": ["layernorm.weight", "layernorm.bias"]}
    assert unreached == of_other_uses.get(family, [])


@FAMILY
def test_a_backbone_from_scratch_is_told_by_its_settings(family):
    settings = {name: value for name, value in FAMILIES[family].items() if name != "image_size"}
    backbone = {"architecture": family, "settings": settings}
    teacher = Teacher(small_config(backbone=backbone, image_size=16)).eval()
    assert teacher(torch.zeros(2, 3, 16, 16), make_batch(2)[1]).logits.shape == (2, 4)


def test_a_teacher_is_built_again_without_the_folder_of_its_backbone(saved):
    teacher = build_teacher(saved["swin"]).eval()
    facts = PretrainedFacts.model_validate_json(read_pretrained(str(saved["swin"]), None).model_dump_json())
    config = teacher.config.model_copy(update={"backbone": BackboneConfig(pretrained="gone")})
    again = Teacher(config, facts).eval()
    again.load_state_dict(teacher.state_dict())
    assert torch.equal(again(*make_batch()).logits, teacher(*make_batch()).logits)


def test_the_facts_of_a_backbone_are_the_hash_of_its_content_wherever_it_lies(saved, tmp_path):
    other = save_pretrained("vit", tmp_path / "elsewhere")
    facts = pretrained_backbone({"backbone": {"pretrained": str(saved["vit"])}})
    assert pretrained_backbone({"backbone": {"pretrained": str(other)}}) == facts
    assert str(tmp_path) not in json.dumps(facts.config)
    assert pretrained_backbone({"backbone": {"pretrained": str(saved["swin"])}}).sha256 != facts.sha256
    assert pretrained_backbone({}) is None


def test_pixels_of_another_scale_than_the_backbone_was_trained_on_are_refused(saved, tmp_path):
    model = {"backbone": {"pretrained": str(saved["vit"])}}
    check_backbone_pixels(model, MEAN, STD)
    with pytest.raises(SpecError, match=r"`pixel_mean` is `\[0.5, 0.5, 0.5\]`") as refused:
        check_backbone_pixels(model, (0.5, 0.5, 0.5), STD)
    assert refused.value.hint == "--set 'pixel_mean=[0.48, 0.45, 0.4]' --set 'pixel_std=[0.27, 0.26, 0.28]'"
    plain = save_pretrained("vit", tmp_path / "plain", do_normalize=False)
    check_backbone_pixels({"backbone": {"pretrained": str(plain)}}, (0, 0, 0), (1, 1, 1))
    (plain / "preprocessor_config.json").unlink()
    with pytest.raises(SpecError, match="nothing says how its model wants pixels"):
        check_backbone_pixels({"backbone": {"pretrained": str(plain)}}, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({}, "name one"),
        ({"pretrained": "a", "architecture": "vit"}, "name one"),
        ({"pretrained": "a", "settings": {"depths": [1]}}, "brings its own"),
        ({"architecture": "vit", "revision": "main"}, "`revision` is of a `pretrained`"),
        ({"architecture": "vit", "freeze": True}, "would never learn"),
    ],
)
def test_a_backbone_that_is_not_said_right_is_refused(fault, told):
    with pytest.raises(ValidationError, match=told):
        BackboneConfig.model_validate(fault)


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ({"architecture": "swinn"}, "`swinn`"),
        ({"architecture": "vit", "settings": {"hiden_size": 8}}, "no field `hiden_size`"),
        ({"architecture": "vit", "settings": {"hidden_size": "wide"}}, "make no `vit`"),
        ({"architecture": "vit", "settings": {**FAMILIES["vit"], "image_size": 32}}, "images of 8 pixels"),
        ({"architecture": "vit_mae", "settings": {**FAMILIES["vit"]}}, "draws random numbers"),
    ],
)
def test_an_architecture_that_cannot_be_a_backbone_is_refused(backbone, told):
    with pytest.raises(SpecError, match=told) as refused:
        Teacher(small_config(backbone=backbone))
    assert refused.value.hint


def test_pretrained_weights_that_may_not_be_loaded_are_refused(saved, tmp_path):
    with pytest.raises(SpecError, match="no folder `/nowhere/at/all`"):
        read_pretrained("/nowhere/at/all", None)
    with pytest.raises(SpecError, match="not on this machine") as refused:
        read_pretrained("somebody/something", None)
    assert "dla sources fetch --model somebody/something" in refused.value.hint
    pickled = save_pretrained("vit", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(SpecError, match="no safetensors"):
        read_pretrained(str(pickled), None)
    coded = save_pretrained("vit", tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(SpecError, match="code of its own"):
        read_pretrained(str(coded), None)


def test_weights_that_lack_a_layer_or_are_of_no_image_model_are_refused(saved, tmp_path):
    deeper = save_pretrained("vit", tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(SpecError, match=r"lack `layers.2.* of a `ViTModel`"):
        build_teacher(deeper)
    (deeper / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(SpecError, match="is a `bert`, which is no image model"):
        build_teacher(deeper)
