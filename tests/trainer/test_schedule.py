"""What follows from the loop's settings: rates, seeds, and which parameter is trained how."""

import math

import pytest
import torch
from torch import nn

from dla_cache.errors import SpecError, TrainingError
from dla_cache.store import open_store
from tests.trainer.toy import CONFIG, STEPS, ToyTask, make_loop, run_loop
from trainer.outline import parameter_depths
from trainer.run import build_task
from trainer.schedule import LoopConfig, learning_rate_at, parameter_groups, seed_of
from trainer.upbringing import Upbringing, data_facts


def test_the_rate_rises_to_its_peak_and_ends_on_a_cosine():
    config = LoopConfig(steps=110, learning_rate=2.0, final_learning_rate=0.5, warmup_steps=10)
    rates = [learning_rate_at(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[35] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[60] == pytest.approx(1.25)
    assert rates[110] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_rate_is_constant_within_an_epoch():
    config = LoopConfig(steps=60, learning_rate=1.0, schedule_steps=20)
    rates = [learning_rate_at(step, config) for step in range(60)]
    smooth = LoopConfig(steps=60, learning_rate=1.0)
    assert rates == [learning_rate_at(step, smooth) for step in (0, 20, 40) for _ in range(20)]
    assert len(set(rates)) == 3


def test_each_step_is_taken_at_its_rate(tmp_path):
    loop = make_loop(tmp_path)
    rates = []
    run_loop(loop, on_progress=lambda _: rates.extend(group["lr"] for group in loop.optimizer.param_groups))
    assert rates == [learning_rate_at(step, CONFIG) for step in range(STEPS)]


def test_every_part_of_every_step_of_every_run_draws_from_a_seed_of_its_own():
    seeds = {seed_of(seed, step, part) for seed in range(10) for step in range(100) for part in range(10)}
    assert len(seeds) == 10_000
    assert seed_of(3, 5, 1) == seed_of(3, 5, 1)
    torch.manual_seed(max(seeds))  # all 64 bits are a seed


def rate_scales(task, config):
    groups = parameter_groups(task.module, config, task.parameter_depths())
    of = {id(p): group["rate_scale"] for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in task.module.named_parameters()}


@pytest.fixture(scope="module")
def tasks(tiny):
    def build(kind):
        config = tiny.run(kind, "nowhere")
        return build_task(config, data_facts(config, open_store(tiny.store), Upbringing(config)), None)

    return {"teacher": build("teacher"), "student": build("student")}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "student",
            {
                "student.vit.embeddings.cls_token": 0.125,
                "student.vit.embeddings.patch_embeddings.projection.weight": 0.125,
                "student.vit.layers.0.mlp.fc1.weight": 0.25,
                "student.vit.layers.1.mlp.fc1.weight": 0.5,
                "student.vit.layernorm.weight": 1.0,
                "student.classifier.bias": 1.0,
            },
        ),
        (
            "teacher",
            {
                "positions": 0.125,
                "patch_embedding.weight": 0.125,
                "encoders.depth.null_tokens": 0.125,
                "blocks.0.linear1.weight": 0.25,
                "blocks.1.linear1.weight": 0.5,
                "norm.weight": 1.0,
                "head.weight": 1.0,
                "late_branch.classifier.1.weight": 1.0,
            },
        ),
    ],
)
def test_with_layer_decay_what_lies_nearer_the_pixels_learns_more_slowly(tasks, kind, expected):
    scales = rate_scales(tasks[kind], LoopConfig(layer_decay=0.5))
    assert {name: scales.get(name) for name in expected} == expected
    assert scales.keys() == {name for name, _ in tasks[kind].module.named_parameters()}


def test_each_group_has_its_share_of_the_rate(tmp_path):
    task = ToyTask()
    task.parameter_depths = lambda: parameter_depths(task.module, ["1"])
    loop = make_loop(tmp_path, CONFIG.model_copy(update={"layer_decay": 0.5}), task=task)
    rates = []
    run_loop(loop, on_progress=lambda _: rates.append([group["lr"] for group in loop.optimizer.param_groups]))
    assert rates == [[learning_rate_at(step, CONFIG) * scale for scale in (0.25, 0.5, 1)] for step in range(STEPS)]


def test_layer_decay_of_a_task_without_layers_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"`loop.layer_decay` is 0\.5, and this model has no layers") as refused:
        make_loop(tmp_path, CONFIG.model_copy(update={"layer_decay": 0.5}))
    assert refused.value.hint


def test_a_task_that_forgets_a_parameter_is_named():
    with pytest.raises(TrainingError, match="no depth of `bias`"):
        parameter_groups(nn.Linear(2, 2), LoopConfig(layer_decay=0.5), {"weight": 0})


@pytest.mark.parametrize(("decay_vectors", "expected"), [(True, {0.01}), (False, {0.01, 0.0})])
def test_vectors_are_spared_from_weight_decay_only_when_asked(decay_vectors, expected):
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    groups = parameter_groups(module, LoopConfig(decay_vectors=decay_vectors), None)
    assert {group["weight_decay"] for group in groups} == expected
    spared = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert {p.ndim for p in spared} == (set() if decay_vectors else {1})


def test_yaml_that_says_no_means_no_mixed_precision():
    assert LoopConfig.model_validate({"mixed_precision": False}).mixed_precision == "no"
