"""What every objective of the registry keeps to, whatever it computes; a variant is an entry of VARIANTS."""

import pytest
import torch
from pydantic import ValidationError

from tests.trainer.parties import LABELS, PARTIES, build, random_inputs, students_tensors
from trainer.objectives import Need, ObjectiveConfig, ObjectiveInputs
from trainer.presets import PRESETS
from trainer.watch import gradient_norms

VARIANTS = {
    "ce": {"ce": {}},
    "kd": {"kd": {}},
    "messy": {"messy": {}},
    "standardised kd": {"standardised_kd": {}},
    "generalized distillation": {"generalized_distillation": {}},
    "dkd": {"dkd": {}},
    "dkd that asks the reference": {"dkd": {"unlabelled": "teacher"}},
    "dkd that warms up": {"dkd": {"warmup_steps": 100}},
    "nkd": {"nkd": {}},
    "nkd that asks the reference": {"nkd": {"unlabelled": "teacher"}},
    "dist": {"dist": {}},
    "ofa": {"ofa": {}},
    "ofa that asks the reference": {"ofa": {"unlabelled": "teacher", "epsilon": 1.5}},
    "dho": {"dho": {}},
    "rkd": {"rkd": {}},
    "rkd of an early block's places": {"rkd": {"pair": {"student": 0, "span": "image", "read": "pooled"}}},
    "sp": {"sp": {}},
    "pkt": {"pkt": {}},
    "messy of tokens": {"messy": {"what": "tokens"}},
    "messy that reads places": {"messy": {"read": "spatial"}},
    "messy by smooth L1": {"messy": {"distance": "smooth_l1"}},
    "messy by the cosine": {"messy": {"distance": "cosine", "normalise_targets": True}},
    "messy by InfoNCE": {"messy": {"distance": "infonce", "spans": ["image"]}},
    "messy of tokens by InfoNCE": {"messy": {"distance": "infonce", "what": "tokens"}},
    "latents": {"latents": {"modalities": ["depth"]}},
    "latents by InfoNCE": {"latents": {"modalities": ["depth"], "distance": "infonce"}},
    "codes": {"latents": {"modalities": ["audio"]}},
    "pooled latents and codes": {"latents": {"modalities": ["depth", "audio"], "what": "pooled", "read": "spatial"}},
    "fitnets": {"fitnets": {}},
    "fitnets of a modality": {"fitnets": {"what": "pooled", "pairs": [{"span": "shape"}], "projector": "mlp"}},
    "attention": {"attention": {}},
    "vid": {"vid": {}},
    "vid of a modality": {"vid": {"what": "pooled", "pairs": [{"span": "shape"}]}},
    "crd": {"crd": {"negatives": 16}},
    "fd_cmkd": {"fd_cmkd": {}},
    "fd_cmkd, rescaled": {"fd_cmkd": {"rescale": True}},
}
"""Fields of an objective by a name for the test; the registry's name is the one key."""

PAPER = PRESETS["paper"]["student"]["objective"]

each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def loss_of(fields, **options):
    """The one term, its parts added up, and what it was computed from."""
    objectives = build(fields)
    inputs = random_inputs(objectives, **options)
    return total(objectives(inputs)), inputs, objectives


def total(terms):
    return torch.stack(list(terms.values())).sum()


def test_every_objective_of_the_registry_is_tried_here():
    assert {name for fields in VARIANTS.values() for name in fields} == set(ObjectiveConfig.model_fields)


@each_variant
def test_the_gradient_reaches_the_student_and_all_that_is_trained_for_it_but_no_target(fields):
    loss, inputs, objectives = loss_of(fields)
    loss.backward()
    assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in students_tensors(inputs))
    assert [name for name, value in objectives.named_parameters() if value.requires_grad and value.grad is None] == []
    assert all(target.grad is None for target in inputs.targets.values())


@each_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_half_precision_give_a_finite_loss_and_gradient_in_float32(fields, dtype):
    with torch.autocast("cpu", dtype):
        loss, inputs, _ = loss_of(fields, dtype=dtype, scale=100.0)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(one.grad.isfinite().all() for one in students_tensors(inputs) if one.grad is not None)


@each_variant
def test_a_loss_is_a_mean_over_images_and_does_not_depend_on_their_order(fields):
    objectives = build(fields)
    inputs = random_inputs(objectives)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))
    shuffled = ObjectiveInputs(
        type(inputs.student)(
            inputs.student.logits[order], tuple(block[order] for block in inputs.student.blocks), inputs.student.spans
        ),
        inputs.labels[order],
        {target: value[order] for target, value in inputs.targets.items()},
        {name: value[order] for name, value in inputs.latents.items()},
        inputs.rows[order],
        inputs.step,
    )
    one, other = total(build(fields)(inputs)), total(build(fields)(shuffled))
    assert other.item() == pytest.approx(one.item(), rel=1e-4)


@each_variant
def test_unlabelled_images_take_part_where_nothing_asks_for_their_label(fields):
    (name,) = fields
    objectives = build(fields)
    inputs = random_inputs(objectives, labels=torch.full((len(LABELS),), -1))
    terms = objectives(inputs)
    assert any(term.split(".")[0] == name for term in terms) == (not objectives.config.is_of_labels)
    if terms:
        total(terms).backward()
        touched = [one.grad for one in students_tensors(inputs) if one.grad is not None]
        per_image = torch.stack([gradient.flatten(1).abs().sum(dim=1) for gradient in touched]).sum(dim=0)
        assert (per_image > 0).all()


@each_variant
def test_the_weight_multiplies_the_loss_and_nothing_else(fields):
    ((name, settings),) = fields.items()
    heavier = {name: {**settings, "weight": 5.0}}
    default = ObjectiveConfig.model_validate(fields).active[name].weight
    assert loss_of(heavier)[0].item() == pytest.approx(5.0 / default * loss_of(fields)[0].item(), rel=1e-5)


@each_variant
def test_an_active_objective_without_its_inputs_is_refused(fields):
    objectives = build(fields)
    inputs = random_inputs(objectives)
    lacking = ObjectiveInputs(type(inputs.student)(inputs.student.logits))
    with pytest.raises(ValueError, match="lacks"):
        objectives(lacking)


@each_variant
def test_a_config_declares_all_that_its_loss_looks_at(fields):
    config = ObjectiveConfig.model_validate(fields)
    objectives = build(fields)
    declared = set(config.targets(PARTIES.reference))
    assert bool(declared) == (Need.REFERENCE in config.needs)
    assert set(objectives.targets) == declared
    blocks_seen = any(one.grad is not None for one in gradients_of_blocks(objectives))
    assert blocks_seen == (Need.STUDENT_BLOCKS in config.needs)


def gradients_of_blocks(objectives):
    inputs = random_inputs(objectives)
    total(objectives(inputs)).backward()
    return inputs.student.blocks


def test_terms_come_by_name_and_weighted_in_the_registry_s_order():
    objectives = build(PAPER)
    inputs = random_inputs(objectives)
    together = objectives(inputs)
    assert list(together) == ["ce", "kd", "messy"]
    for name, settings in PAPER.items():
        (alone,) = build({name: settings})(inputs).values()
        assert together[name].item() == pytest.approx(alone.item(), rel=1e-5) or name == "messy"


def test_each_part_of_an_objective_is_a_term_and_teaches_the_student_by_itself():
    objectives = build({"fd_cmkd": {"weight": 3.0}, "latents": {"modalities": ["depth", "audio"]}})
    inputs = random_inputs(objectives)
    terms = objectives(inputs)
    of_fd_cmkd = ["fd_cmkd.low", "fd_cmkd.high", "fd_cmkd.shared", "fd_cmkd.own"]
    assert list(terms) == ["latents.depth", "latents.audio", *of_fd_cmkd]
    assert all(norm > 0 for norm in gradient_norms(terms, students_tensors(inputs)).values())
    unweighted = build({"fd_cmkd": {}})(inputs)
    assert list(unweighted) == of_fd_cmkd


def test_a_batch_without_labels_has_no_cross_entropy_term_and_keeps_the_others():
    objectives = build(PAPER)
    assert set(objectives(random_inputs(objectives, labels=torch.full((6,), -1)))) == {"kd", "messy"}


def test_a_config_without_objectives_is_refused():
    with pytest.raises(ValidationError, match="no objective is active"):
        ObjectiveConfig()
