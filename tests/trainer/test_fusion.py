"""Where image and latents meet: what each stream can know of the others, and who answers."""

import pytest
import torch
from pydantic import ValidationError

from tests.trainer.teachers import EVERY_FUSION, make_batch, make_teacher, small_config
from trainer.blocks import Block
from trainer.teacher import Teacher


def changed_spans(teacher, block):
    """Which spans of a block's output depend on the sound."""
    pixels, latents = make_batch()
    other = {**latents, "audio": (latents["audio"] + 1) % 5}
    was, now = (teacher(pixels, given).block_outputs[block] for given in (latents, other))
    return {name for name, span in teacher.spans.items() if (was[:, span] - now[:, span]).abs().max() > 1e-6}


def test_early_fusion_lets_everything_see_everything_at_once():
    assert changed_spans(make_teacher(), 0) == {"cls", "image", "shape", "audio"}


def test_streams_of_late_fusion_never_meet():
    assert changed_spans(make_teacher(fusion="late", depth=3), 2) == {"audio"}


def test_streams_meet_through_bottlenecks_one_block_after_the_first_that_shares_them():
    teacher = make_teacher(fusion="bottleneck", depth=4, bottleneck_from=1)
    assert [changed_spans(teacher, block) for block in range(4)] == [
        {"audio"},
        {"audio"},
        {"cls", "image", "shape", "audio"},
        {"cls", "image", "shape", "audio"},
    ]


def test_bottleneck_tokens_become_the_mean_of_what_each_stream_makes_of_them():
    teacher = make_teacher(fusion="bottleneck", depth=2, bottleneck_from=0)
    tokens, shared = torch.randn(2, teacher.sequence_length, 16), torch.randn(2, 4, 16)
    after, shared_after = teacher.blocks[0](tokens, shared)
    streams = {"image": tokens[:, :5], "shape": tokens[:, 5:9], "audio": tokens[:, 9:]}
    seen = {n: teacher.blocks[0].streams[n](torch.cat([own, shared], dim=1)) for n, own in streams.items()}
    torch.testing.assert_close(after, torch.cat([out[:, :-4] for out in seen.values()], dim=1))
    torch.testing.assert_close(shared_after, sum(out[:, -4:] for out in seen.values()) / 3)


@EVERY_FUSION
def test_every_fusion_has_the_same_sequence_and_a_name_for_each_block(fusion):
    teacher, early = make_teacher(**fusion), make_teacher()
    outputs = teacher(*make_batch()).block_outputs
    assert teacher.spans == early.spans
    assert [tuple(output.shape) for output in outputs] == [(5, early.sequence_length, 16)] * 2
    assert [teacher.get_submodule(name) for name in teacher.widths] == list(teacher.blocks)


@pytest.mark.parametrize("fusion", ["bottleneck", "late"])
def test_a_new_teacher_of_streams_has_no_opinion_and_streams_start_different(fusion):
    teacher = Teacher(small_config(fusion=fusion)).eval()
    assert torch.equal(teacher(*make_batch()).logits, torch.zeros(5, 4))
    first, second, _ = teacher.blocks[0].streams.values()
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_late_streams_answer_by_heads_of_their_own_and_the_logits_are_averaged():
    teacher = make_teacher(fusion="late")
    output = teacher(*make_batch())
    last, heads = output.block_outputs[-1], teacher.stream_heads
    first = {"image": last[:, 0], "shape": last[:, 5], "audio": last[:, 9]}
    votes = [heads.heads[name](heads.norms[name](token)) for name, token in first.items()]
    torch.testing.assert_close(output.logits, sum(votes) / 3)


@pytest.mark.parametrize("fusion", ["bottleneck", "late"])
def test_the_stream_of_a_modality_that_is_absent_has_no_vote(fusion):
    teacher = make_teacher(fusion=fusion)
    pixels, latents = make_batch()
    absent = teacher(pixels, latents, present={"shape": False, "audio": False})
    cls = absent.block_outputs[-1][:, 0]
    alone = teacher.stream_heads(dict.fromkeys(("image", "shape", "audio"), cls))["image"] if fusion == "late" else None
    torch.testing.assert_close(absent.logits, alone if fusion == "late" else teacher.head(teacher.norm(cls)))
    masks = {"audio": torch.tensor([[False] * 9] + [[True] * 9] * 4)}  # of one image alone there is no sound
    padded, silent = teacher(pixels, latents, masks).logits, teacher(pixels, latents, present={"audio": False}).logits
    torch.testing.assert_close(padded[0], silent[0], atol=1e-5, rtol=0)
    assert (padded[1] - silent[1]).abs().max() > 1e-3


@EVERY_FUSION
def test_every_parameter_gets_a_gradient_from_a_batch_with_and_without_each_modality(fusion):
    teacher = make_teacher(**fusion, modality_dropout=0.5).train()
    output = teacher(*make_batch(20))
    output.logits[:, 0].sum().backward()
    missing = [name for name, parameter in teacher.named_parameters() if parameter.grad is None]
    assert missing == []


@EVERY_FUSION
def test_positions_are_counted_against_the_tokens_of_each_span_in_every_fusion(fusion):
    teacher = make_teacher(**fusion)
    assert teacher.position_to_content(*make_batch()).keys() == {"image", "shape", "audio"}


@pytest.mark.parametrize(("fusion", "n_calls"), [("early", 2), ("bottleneck", 6), ("late", 6)])
@pytest.mark.parametrize("is_training", [True, False])
def test_attention_is_fused_in_training_and_where_nothing_is_trained(monkeypatch, fusion, n_calls, is_training):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or fused(*a, **k)
    )
    with torch.set_grad_enabled(is_training):
        make_teacher(fusion=fusion).train(is_training)(*make_batch())
    assert len(calls) == n_calls + 2  # two resamplers


@pytest.mark.parametrize("is_training", [True, False])
def test_a_block_starts_and_computes_as_the_layer_of_torch(is_training):
    torch.manual_seed(0)
    stock = torch.nn.TransformerEncoderLayer(16, 2, 64, 0.1, "gelu", 1e-6, batch_first=True, norm_first=True)
    torch.manual_seed(0)
    own = Block(16, 2, mlp_ratio=4, dropout=0.1)
    assert own.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(own.state_dict()[name], value) for name, value in stock.state_dict().items())
    tokens, answers = torch.randn(3, 7, 16), []
    for block in (stock.train(is_training), own.train(is_training)):
        torch.manual_seed(1)  # of dropout
        with torch.set_grad_enabled(is_training):
            answers.append(block(tokens))
    # Where nothing is trained torch takes a path of its own, which adds up in another order.
    torch.testing.assert_close(answers[1], answers[0], atol=0 if is_training else 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"fusion": "middle"}, "Input should be 'early', 'bottleneck' or 'late'"),
        ({"fusion": "bottleneck", "depth": 3, "bottleneck_from": 2}, "two blocks at least must share"),
        ({"fusion": "bottleneck", "depth": 3, "bottleneck_from": 9}, "`bottleneck_from` is 9 of `depth` 3"),
        ({"fusion": "bottleneck", "depth": 1}, "two blocks at least must share"),
        ({"fusion": "bottleneck", "n_bottlenecks": 0}, "greater than 0"),
        ({"bottleneck_from": 0}, "belong to `fusion: bottleneck`"),
        ({"fusion": "late", "n_bottlenecks": 4}, "belong to `fusion: bottleneck`"),
        ({"fusion": "late", "formats": {}}, "needs a modality"),
    ],
)
def test_a_fusion_that_cannot_be_is_refused(fault, told):
    with pytest.raises(ValidationError, match=told):
        small_config(**fault)


@pytest.mark.parametrize(("depth", "first"), [(12, 8), (3, 1), (2, 0)])
def test_bottlenecks_begin_at_two_thirds_of_the_depth(depth, first):
    assert small_config(fusion="bottleneck", depth=depth).first_shared_block == first
