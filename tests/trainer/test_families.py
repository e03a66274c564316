"""Students of every family: features, training, saving, as stock transformers has them."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from dla_cache.errors import SpecError
from tests.trainer.students import (
    FAMILIES,
    SETTINGS,
    SIDE,
    WIDTHS,
    WITH_BATCH_NORM,
    WITH_CLS,
    make_student,
    some_pixels,
)
from trainer.batch import Batch
from trainer.classifiers import ClassifierConfig, build_classifier
from trainer.objectives import ObjectiveConfig
from trainer.outline import find_blocks, model_size
from trainer.student import student_features
from trainer.tasks import StudentTask

every_family = pytest.mark.parametrize("family", FAMILIES)


def batch_of(n_images, labels=None):
    labels = torch.arange(n_images) % 3 if labels is None else labels
    return Batch(tuple(map(str, range(n_images))), some_pixels(n_images), {}, labels)


def task_of(family):
    return StudentTask(make_student(family).train(), ObjectiveConfig.model_validate({"ce": {}}), None)


@every_family
def test_blocks_are_what_the_modules_of_their_names_return(family):
    student, returned = make_student(family), {}
    blocks = find_blocks(student)
    for name in blocks.widths:
        student.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: returned.update({name: output[0] if type(output) is tuple else output})
        )
    features = student_features(student, blocks, some_pixels())
    assert dict(blocks.widths) == WIDTHS[family]
    for (name, width), tokens in zip(blocks.widths.items(), features.blocks, strict=True):
        expected = returned[name]
        if expected.ndim == 4:  # row by row
            expected = torch.stack([image.reshape(len(image), -1).T for image in expected])
        assert tokens.shape[-1] == width
        assert torch.equal(tokens, expected)


@every_family
def test_only_a_model_with_a_class_token_has_a_span_of_it_and_the_image_is_a_square(family):
    student = make_student(family)
    blocks = find_blocks(student)
    n_before = WITH_CLS.get(family, 0)
    assert list(blocks.spans) == (["cls", "image"] if n_before else ["image"])
    for tokens in student_features(student, blocks, some_pixels()).blocks:
        assert tokens[:, blocks.spans["image"]].shape[1] == tokens.shape[1] - n_before
        assert (tokens.shape[1] - n_before) ** 0.5 % 1 == 0


@every_family
def test_finding_blocks_draws_no_random_number_and_leaves_the_student_as_it_was(family):
    student = make_student(family).train()
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    before = torch.get_rng_state()
    find_blocks(student)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for module in student.modules())


@every_family
def test_one_step_of_training_changes_every_parameter(family):
    task = task_of(family)
    before = {name: value.detach().clone() for name, value in task.module.named_parameters()}
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2, weight_decay=0)
    task.losses(batch_of(8)).total.backward()
    optimizer.step()
    still = [name for name, value in task.module.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in still if "attention.query" not in name and "attention.key" not in name] == []
    # Of one patch a window there is nothing to choose between: all attention goes to it.
    assert not still or family == "mobilevit"


@every_family
def test_stock_transformers_loads_the_student_with_equal_logits(family, tmp_path):
    student = make_student(family)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded(some_pixels()).logits, student(some_pixels()).logits)


@every_family
def test_depths_of_parameters_rise_from_the_embeddings_to_the_classifier(family):
    task = task_of(family)
    depths, names = task.parameter_depths(), list(WIDTHS[family])
    assert list(depths) == [name for name, _ in task.module.named_parameters()]
    assert min(depths.values()) == 0
    classifier = [depth for name, depth in depths.items() if ".classifier." in name]
    assert set(classifier) == {len(names) + 1}
    for number, block in enumerate(names):
        assert {depth for name, depth in depths.items() if name.startswith(f"student.{block}.")} == {number + 1}


@pytest.mark.parametrize("family", WITH_BATCH_NORM)
def test_batch_norm_refuses_to_learn_from_one_image(family):
    with pytest.raises(SpecError, match="batch norm") as refused:
        task_of(family).losses(batch_of(1))
    assert "labelled_per_batch" in refused.value.hint


def test_the_size_of_a_model_is_that_of_its_layers():
    # A 3 x 3 convolution to 8 channels at half the side, pooled; two stages of two such each with shortcuts; a line.
    vit = make_student("vit")
    tokens, width, hidden = 17, 16, 32
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    size = model_size(vit, SIDE)
    assert size.flops == 2 * (16 * (3 * 8 * 8) * width + 2 * block + width * 3)
    assert size.parameters == sum(parameter.numel() for parameter in vit.parameters())


def config_of(**fields):
    return ClassifierConfig(**{"n_classes": 3, "image_size": SIDE, **fields})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"architecture": "swim"}, ("`swim`", "`swin`")),
        ({"architecture": "bert"}, ("`bert`",)),
        ({"architecture": "swin", "settings": {"embed_dmi": 8}}, ("`embed_dmi`", "`embed_dim`")),
        ({"architecture": "swin", "settings": {"embed_dim": "wide"}}, ("embed_dim", "int")),
        ({"architecture": "deit", "settings": {"patch_size": 64}}, ("32 x 32 pixels",)),
        ({"architecture": "resnet", "settings": {"num_channels": 1}}, ("32 x 32 pixels",)),
        ({"architecture": "imagegpt"}, ("imagegpt",)),
    ],
    ids=lambda value: str(value.get("settings", value["architecture"])) if isinstance(value, dict) else "",
)
def test_what_makes_no_student_is_refused_by_name(model, words):
    with pytest.raises(SpecError) as refused:
        build_classifier(config_of(**model), None)
    assert refused.value.hint
    for word in words:
        assert word in str(refused.value)


def test_other_classifiers_of_transformers_are_students_too():
    settings = {
        "dinov2": {**SETTINGS["vit"]},
        "swinv2": SETTINGS["swin"],
        "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8},
    }
    settings["dinov2"].pop("intermediate_size")
    for architecture, values in settings.items():
        student = build_classifier(config_of(architecture=architecture, settings=values), None)
        assert len(find_blocks(student).widths) == 2
