"""What MESSy's heads read of a student, what they predict, and between which layers."""

import pytest
import torch
from pydantic import ValidationError

from dla_cache.errors import SpecError
from tests.trainer.students import FAMILIES, WITH_CLS, make_student, some_pixels
from trainer.features import Features, Target, resolve_layer
from trainer.heads import MessyHeads, MessyTerm, reading_of
from trainer.objectives import ObjectiveConfig
from trainer.objectives.messy import MessyConfig, messy_loss, messy_targets, messy_terms, resize_tokens
from trainer.outline import find_blocks
from trainer.student import student_features

POOLED = MessyTerm(0, Target("pooled", "depth", 0))
TOKENS = MessyTerm(0, Target("tokens", "image", 0))
SPANS = {"cls": slice(0, 1), "image": slice(1, None)}


SEEN = ("cls", "image", "depth")
"""Spans of what is learned from."""


def names(depth):
    return tuple(f"layers.{number}" for number in range(depth))


def reached(read, term=POOLED):
    """Which of five tokens a prediction depends on."""
    torch.manual_seed(0)
    block = torch.randn(2, 5, 8, requires_grad=True)
    heads = MessyHeads([term], [8], {term.target: 6}, hidden=4, read=read)
    prediction = heads(Features(torch.zeros(2, 3), (block,), SPANS))[term]
    prediction.square().sum().backward()
    return (block.grad.abs().sum(dim=(0, 2)) > 0).tolist(), tuple(prediction.shape)


@pytest.mark.parametrize("read", ["cls", "pooled", "spatial"])
def test_a_head_reads_the_class_token_or_all_of_the_image_and_nothing_else(read):
    assert reached(read) == ([read == "cls"] + [read != "cls"] * 4, (2, 6))


def test_a_learned_query_can_tell_places_apart_and_is_trained():
    torch.manual_seed(0)
    heads = MessyHeads([POOLED], [8], {POOLED.target: 6}, hidden=4, read="spatial")
    tokens = torch.randn(1, 5, 8)
    heads(Features(torch.zeros(1, 3), (tokens,), SPANS))[POOLED].square().sum().backward()
    assert [name for name, value in heads.named_parameters() if value.grad is None] == []
    assert heads.queries["0"].query.grad.abs().sum() > 0
    (query,) = heads.queries.values()
    many = torch.cat([tokens, tokens[:, 1:2].expand(-1, 20, -1)], dim=1)
    assert not torch.allclose(query(tokens), query(many))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("read", ["pooled", "spatial"])
def test_heads_take_the_widths_of_any_student_and_any_target(family, read):
    student = make_student(family)
    blocks = find_blocks(student)
    widths = list(blocks.widths.values())
    terms = [MessyTerm(number, Target("pooled", "depth", 0)) for number in range(len(widths))]
    heads = MessyHeads(terms, widths, {terms[0].target: 5}, hidden=4, read=read)
    predictions = heads(student_features(student, blocks, some_pixels()))
    assert {tuple(prediction.shape) for prediction in predictions.values()} == {(3, 5)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_without_a_class_token_is_read_by_its_mean_and_cannot_be_asked_for_one(family):
    spans = tuple(find_blocks(make_student(family)).spans)
    assert reading_of(None, spans, "messy") == ("cls" if family in WITH_CLS else "pooled")
    assert reading_of("spatial", spans, "messy") == "spatial"
    if family not in WITH_CLS:
        with pytest.raises(SpecError, match="no such token") as refused:
            reading_of("cls", spans, "messy")
        assert "pooled" in refused.value.hint


def test_tokens_are_predicted_token_by_token_on_the_target_s_grid():
    seen, shape = reached("pooled", TOKENS)
    assert (seen, shape) == ([False] + [True] * 4, (2, 4, 6))
    prediction, target = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    by_hand = (prediction - target).square().mean()
    assert messy_loss({TOKENS: prediction}, {TOKENS.target: target}).item() == pytest.approx(by_hand.item())
    assert messy_loss({TOKENS: prediction}, {TOKENS.target: torch.randn(2, 9, 6)}).isfinite()


def test_a_grid_of_tokens_is_resized_as_a_picture_is():
    rows = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # a ramp from top to bottom, 4 x 4
    smaller = resize_tokens(rows, 4)[0, :, 0]
    assert smaller[0] == smaller[1] < smaller[2] == smaller[3]
    assert smaller.mean() == pytest.approx(1.5)
    assert torch.equal(resize_tokens(rows, 16), rows)
    with pytest.raises(ValueError, match="square"):
        resize_tokens(rows, 5)


@pytest.mark.parametrize("fields", [{"spans": ["depth"]}, {"read": "pooled"}])
def test_tokens_go_from_the_image_to_the_image_and_no_reading_is_chosen(fields):
    with pytest.raises(ValidationError, match="image tokens"):
        ObjectiveConfig.model_validate({"messy": {"what": "tokens", **fields}})


def test_by_default_tokens_are_those_of_the_image():
    targets = messy_targets(MessyConfig(what="tokens"), names(12), SEEN)
    assert [str(target) for [target] in targets] == ["tokens/image/9", "tokens/image/10", "tokens/image/11"]


def pairs_of(config, student_depth, teacher_depth):
    terms = messy_terms(config, names(student_depth), messy_targets(config, names(teacher_depth), SEEN))
    return [(term.student_block, term.target.block) for term in terms]


@pytest.mark.parametrize(
    ("depths", "pairs"),
    [
        ((12, 12), [(9, 9), (10, 10), (11, 11)]),
        ((24, 12), [(19, 9), (21, 10), (23, 11)]),
        ((4, 12), [(3, 9), (3, 10), (3, 11)]),
        ((16, 3), [(13, 2), (14, 2), (15, 2)]),
        ((3, 3), [(2, 2)]),
    ],
)
def test_the_default_layers_are_the_paper_s_at_twelve_blocks_and_fit_any_depth(depths, pairs):
    assert pairs_of(MessyConfig(), *depths) == pairs


@pytest.mark.parametrize("depth", range(1, 60))
def test_a_fraction_of_the_depth_ends_the_block_that_it_says(depth):
    assert [resolve_layer(k / depth, names(depth), "student") for k in range(1, depth + 1)] == list(range(depth))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_go_by_number_fraction_and_name_in_every_family(family):
    blocks = tuple(find_blocks(make_student(family)).widths)
    last = len(blocks) - 1
    assert [resolve_layer(layer, blocks, "student") for layer in (last, 1.0, blocks[last])] == [last] * 3
    for absent in (len(blocks), "vit.layers.99", 1.5):
        with pytest.raises(SpecError, match=f"it has {len(blocks)}") as refused:
            resolve_layer(absent, blocks, "student")
        assert "fraction" in refused.value.hint
