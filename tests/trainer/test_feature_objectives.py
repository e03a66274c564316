"""Objectives on features: values against the golden ones, and against loops written from the equations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dla_cache.errors import SpecError
from dla_cache.spec import LatentFormat
from tests.trainer.parties import FORMATS, LABELS, PARTIES, STUDENT, TEACHER, build, random_inputs
from tests.trainer.students import make_student, some_pixels
from trainer.loop import Loop
from trainer.objectives import ModelOutline, Parties
from trainer.objectives.crd import MOMENTUM, nce_loss
from trainer.objectives.distances import distance_between
from trainer.objectives.fd_cmkd import signed_log, split_frequencies
from trainer.objectives.hints import attention_loss, vid_loss
from trainer.objectives.latents import code_loss
from trainer.outline import find_blocks
from trainer.schedule import LoopConfig
from trainer.student import student_features
from trainer.watch import gradient_norms

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())["values"]


def numbers_of(tensor):
    return tensor.detach().double().numpy()


def golden_maps(n_channels, wave, pace):
    """Maps [4, C, 4, 4] as tokens [4, 16, C]."""
    numbers = wave(pace * np.arange(4 * n_channels * 16))
    return torch.from_numpy(numbers.reshape(4, n_channels, 16).transpose(0, 2, 1).copy())


def golden_vectors(width=16):
    i, d = np.arange(1, 5)[:, None], np.arange(1, width + 1)[None]
    return np.sin(0.3 * i * d), np.cos(0.2 * i * (d + 1))


def test_attention_transfer_has_the_golden_value_as_a_mean_over_places():
    loss = attention_loss(golden_maps(3, np.sin, 0.37), golden_maps(5, np.cos, 0.23))
    assert float(loss) == pytest.approx(GOLDEN["AT p2 one stage (unweighted)"], abs=1e-9)


def test_attention_of_a_finer_grid_is_that_of_the_means_of_its_cells():
    fine, coarse = torch.randn(2, 16, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    pooled = fine.view(2, 2, 2, 2, 2, 3).mean(dim=(2, 4)).view(2, 4, 3)
    for tokens, same in (((fine, coarse), (pooled, coarse)), ((coarse, fine), (coarse, pooled))):
        assert float(attention_loss(*tokens)) == pytest.approx(float(attention_loss(*same)), rel=1e-9)


def halves_by_sums(vector):
    """Low and high part by the sums of the discrete Fourier transform and its inverse."""
    width = len(vector)
    places = np.arange(width)
    halves = []
    for bins in (range(1, width // 2 // 2 + 1), range(width // 2 // 2 + 1, width // 2 + 1)):
        half = np.zeros(width)
        for k in bins:
            amplitude = sum(vector[n] * np.exp(-2j * math.pi * k * n / width) for n in places)
            twice = 1 if 2 * k == width else 2  # a bin and the negative frequency that mirrors it
            half += twice * (amplitude * np.exp(2j * math.pi * k * places / width)).real / width
        halves.append(half)
    return halves


def at_length_one(vector):
    return vector / np.sqrt((vector**2).sum())


def test_low_frequencies_have_the_golden_distance():
    low_s, low_t = (split_frequencies(torch.from_numpy(features))[0] for features in golden_vectors())
    distance = distance_between(*(one / one.norm(dim=1, keepdim=True) for one in (low_s, low_t)))
    assert float(distance) == pytest.approx(GOLDEN["FD low MSE (D=16, bins 1..4)"], abs=1e-9)


@pytest.mark.parametrize("width", [4, 7, 16])
def test_low_and_high_frequencies_and_the_mean_add_up_to_the_features(width):
    features, _ = golden_vectors(width)
    low, high = split_frequencies(torch.from_numpy(features))
    for row, ours in zip(features, zip(low, high, strict=True), strict=True):
        np.testing.assert_allclose(np.stack([*ours]), halves_by_sums(row), atol=1e-12)
    np.testing.assert_allclose(low.numpy() + high.numpy() + features.mean(axis=1, keepdims=True), features, atol=1e-12)


def test_fd_cmkd_equals_its_parts_written_from_the_equations():
    objectives = build({"fd_cmkd": {}})
    inputs = random_inputs(objectives)
    fd = objectives.terms["fd_cmkd"]
    projected = fd.projector(inputs.student.blocks[2][:, 0])
    sides = [[halves_by_sums(row) for row in numbers_of(one)] for one in (projected, inputs.targets[fd.pair.target])]

    def log(vector):
        return [math.copysign(math.log(1 + abs(number)), number) for number in vector]

    def ce(classifier, vector, y):
        weight, bias = numbers_of(classifier.weight), numbers_of(classifier.bias)
        logits = weight @ np.maximum(vector, 0) + bias
        return math.log(np.exp(logits).sum()) - logits[y]

    low = np.mean([(at_length_one(s[0]) - at_length_one(t[0])) ** 2 for s, t in zip(*sides, strict=True)])
    high = np.mean(
        [(np.array(log(at_length_one(s[1]))) - log(at_length_one(t[1]))) ** 2 for s, t in zip(*sides, strict=True)]
    )
    labelled = [(i, int(y)) for i, y in enumerate(LABELS) if y >= 0]
    shared = own = 0.0
    for half, of_both, of_student in ((0, fd.shared_low, fd.own_low), (1, fd.shared_high, fd.own_high)):
        shared += sum(ce(of_both, side[i][half], y) for side in sides for i, y in labelled) / len(labelled)
        own += sum(ce(of_student, sides[0][i][half], y) for i, y in labelled) / len(labelled)
    expected = {"fd_cmkd.low": low, "fd_cmkd.high": high, "fd_cmkd.shared": shared, "fd_cmkd.own": own}
    ours = {name: term.item() for name, term in objectives(inputs).items()}
    assert ours == pytest.approx(expected, rel=1e-4)


def test_rescaled_distances_are_the_published_ones_times_the_width():
    published, rescaled = (build({"fd_cmkd": {"rescale": rescale}}) for rescale in (False, True))
    inputs = random_inputs(published)
    ours, theirs = published(inputs), rescaled(inputs)
    ratio = {name: theirs[name].item() / ours[name].item() for name in ours}
    width = TEACHER.width(3)
    assert ratio == pytest.approx({"fd_cmkd.low": width, "fd_cmkd.high": width, "fd_cmkd.shared": 1, "fd_cmkd.own": 1})


def test_a_signed_log_is_odd_and_has_a_finite_gradient_at_zero():
    values = torch.tensor([-3.0, 0.0, 3.0], requires_grad=True)
    signed_log(values).sum().backward()
    torch.testing.assert_close(signed_log(values).detach(), torch.tensor([-math.log(4), 0.0, math.log(4)]))
    assert values.grad.isfinite().all()


def test_fitnets_is_the_mean_squared_error_of_the_regressed_tokens():
    objectives = build({"fitnets": {"weight": 1.0}})
    inputs = random_inputs(objectives)
    (pair,), (regressor,) = objectives.terms["fitnets"].pairs, objectives.terms["fitnets"].regressors
    weight, bias = numbers_of(regressor.weight), numbers_of(regressor.bias)
    errors = []
    for tokens, target in zip(inputs.student.blocks[1], inputs.targets[pair.target], strict=True):
        for token, wanted in zip(numbers_of(tokens)[1:], numbers_of(target), strict=True):
            errors += [*(weight @ token + bias - wanted) ** 2]
    (loss,) = objectives(inputs).values()
    assert (pair.block, pair.target.block) == (1, 1)
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_vid_is_the_negative_log_of_a_gaussian_without_its_constant():
    mean, target = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    variance = torch.tensor([0.5, 3.0], dtype=torch.float64)
    gaussian = torch.distributions.Normal(mean, variance.sqrt())
    expected = -gaussian.log_prob(target).mean() - 0.5 * math.log(2 * math.pi)
    assert float(vid_loss(mean, target, variance)) == pytest.approx(float(expected), rel=1e-9)


def test_the_learned_variance_of_vid_starts_at_five_and_reaches_the_optimiser(tmp_path):
    objectives = build({"vid": {}})
    variances = [nn.functional.softplus(scale) + 1e-5 for scale in objectives.terms["vid"].scales]
    torch.testing.assert_close(torch.cat(variances), torch.full((18,), 5.0))

    class Task:
        module, losses = objectives, None

        def taught_parameters(self):
            return []

    loop = Loop(Task(), LoopConfig(steps=1), tmp_path, seed=0)
    optimised = {id(one) for group in loop.optimizer.param_groups for one in group["params"]}
    assert {id(scale) for scale in objectives.terms["vid"].scales} <= optimised


def test_distances_equal_their_equations():
    generator = torch.Generator().manual_seed(0)
    p, t = (2 * torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    squares = [(a - b) ** 2 for a, b in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True)]
    smooth = [square / 2 if square < 1 else math.sqrt(square) - 0.5 for square in squares]

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    places = [(i, n) for i in range(3) for n in range(2)]
    contrasts = []
    for i, n in places:
        rivals = [math.exp(cosine(p[i, n], t[j, n]) / 0.5) for j in range(3)]
        contrasts.append(-math.log(rivals[i] / sum(rivals)))
    expected = {
        "mse": np.mean(squares),
        "smooth_l1": np.mean(smooth),
        "cosine": 1 - np.mean([cosine(p[i, n], t[i, n]) for i, n in places]),
        "infonce": np.mean(contrasts),
    }
    assert {name: float(distance_between(p, t, name, 0.5)) for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine", "infonce"])
def test_a_distance_has_a_finite_gradient_where_both_are_equal_or_nothing(distance):
    prediction = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    distance_between(prediction, torch.tensor([[0.0, 0.0], [1.0, 2.0]]), distance).backward()
    assert prediction.grad.isfinite().all()


def test_crd_equals_the_published_form_with_the_number_of_images_in_it():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    n_images, n_negatives, z = 50, 5, 1.7
    loss = 0.0
    for own, *others in scores.tolist():
        p = math.exp(own) / (z * n_images)
        loss -= math.log(p / (p + n_negatives / n_images))
        for other in others:
            p = math.exp(other) / (z * n_images)
            loss -= math.log((n_negatives / n_images) / (p + n_negatives / n_images))
    assert float(nce_loss(scores, torch.tensor(math.log(z), dtype=torch.float64))) == pytest.approx(loss / 3, rel=1e-9)


def test_the_memory_of_crd_moves_halfway_to_what_a_batch_shows_and_keeps_the_rest():
    objectives = build({"crd": {"negatives": 16}})
    crd, inputs = objectives.terms["crd"], random_inputs(objectives)
    before = crd.of_student.clone()
    shown = nn.functional.normalize(crd.embed_student(inputs.student.blocks[2][:, 0])).detach()
    objectives(inputs)
    moved = nn.functional.normalize(MOMENTUM * before[inputs.rows] + (1 - MOMENTUM) * shown)
    torch.testing.assert_close(crd.of_student[inputs.rows], moved)
    elsewhere = [row for row in range(20) if row not in inputs.rows.tolist()]
    assert torch.equal(crd.of_student[elsewhere], before[elsewhere])


def test_negatives_of_crd_are_images_that_were_shown_and_a_function_of_the_step():
    objectives = build({"crd": {"negatives": 500}})
    crd, inputs = objectives.terms["crd"], random_inputs(objectives)
    objectives(inputs)
    drawn = [crd.draw_negatives(step) for step in (4, 5, 4)]
    assert all(set(rows.tolist()) == set(inputs.rows.tolist()) for rows in drawn)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_crd_tells_no_image_from_itself_or_from_one_of_its_class():
    objectives = build({"crd": {"negatives": 500}})
    crd, inputs = objectives.terms["crd"], random_inputs(objectives)
    objectives(inputs)
    others = crd.draw_negatives(9)
    scores = crd.scores_of(torch.ones(6, 128), crd.of_student, inputs.rows, others)
    told_from = [set(others[row.isfinite()].tolist()) for row in scores[:, 1:]]
    labels, rows = inputs.labels.tolist(), inputs.rows.tolist()
    for image in range(6):
        alike = {rows[image]} | {row for row, label in zip(rows, labels, strict=True) if label == labels[image] >= 0}
        assert told_from[image] == set(rows) - alike


def test_crd_of_an_image_with_few_negatives_weighs_them_as_many_and_one_alone_is_drawn_to_its_own():
    scores = torch.tensor([[0.5, 2.0, -1.0, -math.inf, -math.inf], [0.5, 2.0, -1.0, 2.0, -1.0]])
    one, other = (nce_loss(scores[[image]], torch.tensor(0.3)).item() for image in (0, 1))
    assert one == pytest.approx(other)
    alone = torch.tensor([[0.5, -math.inf, -math.inf]], requires_grad=True)
    nce_loss(alone, torch.tensor(0.3)).backward()
    assert alone.grad[0, 0] < 0
    assert alone.grad.isfinite().all()


def test_crd_gives_the_same_losses_step_by_step_when_it_is_compiled():
    plain, other = build({"crd": {"negatives": 16}}), build({"crd": {"negatives": 16}})
    compiled = torch.compile(lambda inputs: other(inputs), backend="eager")
    for step in range(3):
        inputs = replace(random_inputs(plain, seed=step), step=step)
        assert compiled(inputs)["crd"].item() == pytest.approx(plain(inputs)["crd"].item(), rel=1e-6)


def test_crd_is_refused_where_several_processes_train():
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(SpecError, match="memory of all images") as refused:
            build({"crd": {}})
    finally:
        distributed.destroy_process_group()
    assert "one process" in refused.value.hint


def test_predicted_latents_are_standardised_and_compared_number_by_number():
    objectives = build({"latents": {"modalities": ["depth"], "layers": [1.0]}})
    inputs = random_inputs(objectives)
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 0.0])
    objectives.set_statistics("depth", mean, std)
    prediction = objectives.terms["latents"].heads["2-depth"](inputs.student.blocks[2][:, 0])
    expected = 0.0
    for image, ours in zip(inputs.latents["depth"], prediction.view(6, 4, 3), strict=True):
        for channel in range(3):
            wanted = (image[channel].flatten() - mean[channel]) / (std[channel] or 1)
            expected += (ours[:, channel] - wanted).square().sum().item()
    assert objectives(inputs)["latents.depth"].item() == pytest.approx(expected / 72, rel=1e-5)


def test_pooled_latents_are_the_mean_over_tokens_of_the_standardised_ones():
    objectives = build({"latents": {"modalities": ["depth"], "layers": [0], "what": "pooled"}})
    inputs = random_inputs(objectives)
    prediction = objectives.terms["latents"].heads["0-depth"](inputs.student.blocks[0][:, 0])
    expected = (prediction - inputs.latents["depth"].mean(dim=(2, 3))).square().mean()
    assert objectives(inputs)["latents.depth"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_predicted_codes_have_the_cross_entropy_of_each_step_or_of_how_often_each_occurs():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (2, 5, 3), generator=generator)  # 2 images, 5 steps, 3 codebooks
    each, pooled = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 3, 4), (3, 4)))
    flattened = np.mean(
        [
            math.log(each[i, n, k].exp().sum()) - float(each[i, n, k, codes[i, n, k]])
            for i in range(2)
            for n in range(5)
            for k in range(3)
        ]
    )
    histogram = 0.0
    for i in range(2):
        for k in range(3):
            log_p = pooled[i, k] - pooled[i, k].exp().sum().log()
            share = [float((codes[i, :, k] == code).double().mean()) for code in range(4)]
            histogram -= sum(s * float(one) for s, one in zip(share, log_p, strict=True)) / 6
    assert float(code_loss(each.flatten(1), codes, 4, "flattened")) == pytest.approx(flattened, rel=1e-9)
    assert float(code_loss(pooled.flatten(1), codes, 4, "pooled")) == pytest.approx(histogram, rel=1e-9)


def test_a_student_of_maps_with_blocks_of_several_widths_learns_by_every_objective():
    student = make_student("convnext", n_classes=7).train()
    blocks = find_blocks(student)
    outline = ModelOutline(blocks.widths, tuple(blocks.spans), 7)
    fields = {"fitnets": {}, "attention": {}, "vid": {}, "crd": {"negatives": 4}, "fd_cmkd": {}}
    fields |= {"messy": {"distance": "cosine"}, "latents": {"modalities": ["depth", "audio"], "read": "spatial"}}
    objectives = build(fields, replace(PARTIES, student=outline))
    seen = student_features(student, blocks, some_pixels(6))
    terms = objectives(replace(random_inputs(objectives), student=seen))
    norms = gradient_norms(terms, [one for name, one in student.named_parameters() if "stages.0" in name])
    assert len(norms) == 11
    assert all(norm > 0 for norm in norms.values())


def test_the_classifiers_of_fd_cmkd_learn_any_number_of_classes_an_image():
    objectives = build({"fd_cmkd": {}})
    labels = torch.randint(2, (6, 7), generator=torch.Generator().manual_seed(0))
    terms = objectives(random_inputs(objectives, labels=labels))
    chance = math.log(2)  # of a question that is answered by yes or no
    assert terms["fd_cmkd.own"].item() == pytest.approx(2 * chance, rel=0.3)


LONG = LatentFormat(kind="codes", shape=(4, 250), axes=("codebook", "step"), dtype="int16", vocabulary=2048)
NARROW = ModelOutline({"blocks.0": 3}, ("cls", "image"), 7)


@pytest.mark.parametrize(
    ("fields", "parties", "message"),
    [
        ({"latents": {"modalities": ["audio"]}}, Parties(STUDENT, None, {"audio": LONG}), "2,048,000 outputs"),
        ({"latents": {"modalities": ["depth"], "layers": [9]}}, PARTIES, "no block `9`"),
        (
            {"latents": {"modalities": ["depth"], "read": "cls"}},
            Parties(ModelOutline({"a": 4}, ("image",), 7), None, FORMATS),
            "`latents.read` is `cls`",
        ),
        ({"fd_cmkd": {}}, Parties(STUDENT, NARROW), "3 numbers"),
        ({"fd_cmkd": {"projector": "identity"}}, PARTIES, "width 8, the reference's 6"),
        ({"fitnets": {}}, Parties(STUDENT, ModelOutline({}, (), 7)), "`fitnets` compares blocks"),
        ({"attention": {"pairs": [{"span": "shape"}]}}, PARTIES, "`span` is `shape`"),
        ({"crd": {}}, Parties(STUDENT, ModelOutline({}, (), 7)), "`crd` compares blocks"),
    ],
)
def test_an_objective_that_does_not_fit_its_parties_is_refused_with_a_way_out(fields, parties, message):
    with pytest.raises(SpecError, match=message) as refused:
        build(fields, parties)
    assert refused.value.hint
