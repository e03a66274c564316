"""What of a student is compared with what of its reference, and how widths are brought together."""

import pytest
import torch
from torch import nn

from dla_cache.errors import SpecError
from tests.trainer.parties import PARTIES, STUDENT, TEACHER
from trainer.features import Features, Target
from trainer.objectives import ModelOutline, Parties
from trainer.objectives.layer_pairs import LayerPair, fit_pairs
from trainer.objectives.projectors import make_projector

WITHOUT_CLS = Parties(ModelOutline({"stages.0": 4}, ("image",), 7), ModelOutline({"a": 6}, ("image",), 7))
OF_PROBE = Parties(STUDENT, ModelOutline({}, (), 7))


def test_a_pair_compares_the_class_tokens_of_the_last_blocks_unless_told_otherwise():
    fitted = LayerPair().fitted(PARTIES, "pooled", "an objective")
    assert (fitted.block, fitted.span, fitted.target) == (2, "cls", Target("pooled", "cls", 3))
    assert (fitted.student_width, fitted.target_width) == (8, 6)


def test_without_class_tokens_a_pair_compares_the_means_over_the_image():
    fitted = LayerPair().fitted(WITHOUT_CLS, "pooled", "an objective")
    assert (fitted.span, fitted.target) == ("image", Target("pooled", "image", 0))


def test_what_a_pair_reads_of_the_student_is_its_own_block_and_span_alone():
    blocks = tuple(torch.randn(2, 5, 8) for _ in range(3))
    features = Features(torch.zeros(2, 7), blocks, {"cls": slice(0, 1), "image": slice(1, None)})
    pooled = LayerPair(student=1, read="pooled").fitted(PARTIES, "pooled", "an objective")
    torch.testing.assert_close(pooled.of_student(features), blocks[1][:, 1:].mean(dim=1))
    torch.testing.assert_close(
        LayerPair(student=0).fitted(PARTIES, "pooled", "an objective").of_student(features), blocks[0][:, 0]
    )
    tokens = LayerPair(student=0).fitted(PARTIES, "tokens", "an objective")
    assert torch.equal(tokens.of_student(features), blocks[0][:, 1:])


def test_pairs_that_fall_together_in_a_shallow_model_count_once():
    pairs = [LayerPair(student=depth, teacher=1.0) for depth in (0.8, 0.9, 1.0, 0.3)]
    assert [fitted.block for fitted in fit_pairs(pairs, PARTIES, "pooled", "an objective")] == [2, 0]


@pytest.mark.parametrize(
    ("pair", "what", "parties", "message"),
    [
        (LayerPair(), "pooled", OF_PROBE, "it is a probe"),
        (LayerPair(span="touch"), "pooled", PARTIES, "`touch`, the teacher has `cls`, `image`, `shape`"),
        (LayerPair(span="audio"), "tokens", PARTIES, "one by one, and `span` is `audio`"),
        (LayerPair(read="cls"), "tokens", PARTIES, "one by one"),
        (LayerPair(read="cls"), "pooled", WITHOUT_CLS, "no such token"),
        (LayerPair(student=7), "pooled", PARTIES, "student has no block `7`"),
        (LayerPair(teacher=7), "pooled", PARTIES, "teacher has no block `7`"),
    ],
)
def test_a_pair_that_one_of_the_models_has_not_is_refused_by_the_objective_s_name(pair, what, parties, message):
    with pytest.raises(SpecError, match=message) as refusal:
        pair.fitted(parties, what, "an objective")
    assert refusal.value.hint


def test_a_projector_is_nothing_where_widths_agree_and_linear_where_they_do_not():
    assert isinstance(make_projector(8, 8), nn.Identity)
    assert make_projector(8, 6)(torch.zeros(3, 2, 8)).shape == (3, 2, 6)
    assert [type(layer) for layer in make_projector(8, 8, "mlp", hidden=5)] == [nn.Linear, nn.GELU, nn.Linear]
    with pytest.raises(SpecError, match="width 8, the reference's 6"):
        make_projector(8, 6, "identity")


def test_every_span_of_a_teacher_can_be_asked_for():
    spans = [LayerPair(span=span).target(TEACHER, "pooled", "an objective").span for span in TEACHER.spans]
    assert spans == list(TEACHER.spans)
