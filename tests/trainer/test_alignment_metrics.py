"""CKA, RSA and mutual neighbours against formulas of their own, and what they must not depend on."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from trainer.alignment_metrics import (
    Grams,
    Ranks,
    average_ranks,
    cka,
    cka_value,
    mutual_neighbours,
    neighbours,
    rsa,
    rsa_value,
    shuffled_neighbours,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden_values.json").read_text())["values"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=5):
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def hsic_by_four_images(k, l):  # noqa: E741
    """The U-statistic that HSIC₁ is, by its sums over distinct images, written out as loops."""
    n = len(k)
    pairs = sum(k[i, j] * l[i, j] for i in range(n) for j in range(n) if i != j)
    triples = sum(k[i, j] * l[i, q] for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3)
    quadruples = sum(
        k[i, j] * l[q, r]
        for i in range(n)
        for j in range(n)
        for q in range(n)
        for r in range(n)
        if len({i, j, q, r}) == 4
    )
    return pairs / math.perm(n, 2) - 2 * triples / math.perm(n, 3) + quadruples / math.perm(n, 4)


def test_cka_of_twelve_images_is_the_golden_value():
    i = torch.arange(1, 13, dtype=torch.float64)[:, None]
    x = torch.sin(0.3 * i * torch.arange(1, 6))
    y = torch.cos(0.2 * i * (torch.arange(1, 8) + 1))
    assert cka_value(Grams.of(x), Grams.of(y)) == pytest.approx(GOLDEN["unbiased linear CKA (N=12)"], abs=1e-9)


def test_hsic_is_the_u_statistic_over_four_distinct_images():
    x, y = normal(7, 3), normal(7, 2, seed=1)
    one, other = Grams.of(x), Grams.of(y)
    k, l = (x[one.order] @ x[one.order].T, y[one.order] @ y[one.order].T)  # noqa: E741
    assert float(one.sums(other).hsic()) == pytest.approx(float(hsic_by_four_images(k, l)), abs=1e-10)


def test_minibatches_sum_their_hsic_before_they_divide():
    x, y = normal(23, 4), normal(23, 3, seed=1) + normal(23, 4)[:, :3]
    one, other = Grams.of(x, batch_size=7), Grams.of(y, batch_size=7)
    parts = list(one.order.tensor_split(3))
    assert sorted(len(part) for part in parts) == [7, 8, 8]
    sums = {}
    for name, (a, b) in {"xy": (x, y), "xx": (x, x), "yy": (y, y)}.items():
        sums[name] = sum(float(Grams.of(a[part]).sums(Grams.of(b[part])).hsic()) for part in parts)
    expected = sums["xy"] / math.sqrt(sums["xx"] * sums["yy"])
    assert cka_value(one, other) == pytest.approx(expected, abs=1e-10)


def test_cka_sees_neither_rotation_nor_scale_nor_shift_and_is_one_with_itself():
    x, y = normal(300, 6), normal(300, 4, seed=1) + normal(300, 6)[:, :4]
    as_is = cka_value(Grams.of(x), Grams.of(y))
    moved = cka_value(Grams.of(3 * x @ rotation(6) + 1000), Grams.of(y))
    assert moved == pytest.approx(as_is, abs=1e-9)
    assert cka_value(Grams.of(x), Grams.of(x)) == pytest.approx(1, abs=1e-12)


def test_cka_of_independent_features_is_about_zero_where_they_are_wider_than_images_are_many():
    values = [
        cka_value(Grams.of(normal(60, 500, seed=seed)), Grams.of(normal(60, 400, seed=1000 + seed)))
        for seed in range(20)
    ]
    mean, error = sum(values) / 20, torch.tensor(values).std() / math.sqrt(20)
    assert abs(mean) < 4 * float(error)
    assert abs(mean) < 0.02  # the biased estimator says about 0.88 here


def test_features_that_do_not_vary_have_a_cka_and_an_rsa_of_zero():
    flat, x = torch.ones(60, 3), normal(60, 3)
    assert cka_value(Grams.of(flat), Grams.of(x)) == 0
    assert rsa_value(Ranks.of(flat), Ranks.of(x)) == 0


def test_the_influence_on_cka_is_that_of_leaving_each_image_out():
    x, y = normal(20, 3), normal(20, 3) + normal(20, 3, seed=1)
    measured = cka(Grams.of(x), Grams.of(y))
    without = torch.tensor(
        [
            cka_value(Grams.of(x[kept]), Grams.of(y[kept]))
            for kept in (torch.arange(20) != left_out for left_out in range(20))
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(measured.influence, 19 * (without.mean() - without), atol=1e-9, rtol=0)


def test_rsa_is_spearmans_correlation_of_the_distances():
    x, y = normal(40, 5), normal(40, 3, seed=1) + normal(40, 5)[:, :3]
    expected = spearmanr(pdist(x.numpy()), pdist(y.numpy())).statistic
    assert rsa_value(Ranks.of(x), Ranks.of(y)) == pytest.approx(expected, abs=1e-9)


def test_equal_values_share_the_mean_of_their_ranks():
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_ranks_of_shuffled_images_are_those_of_shuffled_features():
    x, order = normal(30, 3), torch.randperm(30, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(Ranks.of(x).shuffled(order).matrix, Ranks.of(x[order]).matrix)


def test_the_influence_on_rsa_is_zero_of_images_that_were_not_sampled():
    x, y = normal(90, 3), normal(90, 3) + normal(90, 3, seed=1)
    measured = rsa(Ranks.of(x, at_most=50), Ranks.of(y, at_most=50))
    assert int((measured.influence != 0).sum()) == 50
    assert float(measured.influence.mean()) == pytest.approx(0, abs=1e-9)


def spread_over_images(measure, n_images=80, repeats=60):
    """The spread of a measure over fresh images, and the mean one that its influences foretell."""
    values, foretold = [], []
    for seed in range(repeats):
        x = normal(n_images, 4, seed=seed)
        y = x[:, :3] + 0.8 * normal(n_images, 3, seed=5000 + seed)
        measured = measure(x, y)
        values.append(measured.value)
        foretold.append(float(measured.influence.std()) / math.sqrt(n_images))
    return float(torch.tensor(values).std()), sum(foretold) / repeats


@pytest.mark.parametrize(
    "measure",
    [
        lambda x, y: cka(Grams.of(x), Grams.of(y)),
        lambda x, y: rsa(Ranks.of(x), Ranks.of(y)),
        lambda x, y: rsa(Ranks.of(x, at_most=40), Ranks.of(y, at_most=40)),
    ],
    ids=["cka", "rsa", "rsa of half the images"],
)
def test_influences_foretell_the_spread_over_other_images(measure):
    spread, foretold = spread_over_images(measure)
    assert foretold == pytest.approx(spread, rel=0.3)  # 60 repeats know a spread to about 10 %


def test_neighbours_are_the_most_alike_others_whatever_the_block(monkeypatch):
    x = normal(50, 4)
    directions = x / x.norm(dim=1, keepdim=True)
    alike = directions @ directions.T
    expected = [
        set(sorted((j for j in range(50) if j != i), key=lambda j, i=i: -float(alike[i, j]))[:10]) for i in range(50)
    ]
    monkeypatch.setattr("trainer.alignment_metrics.BLOCK", 7)
    assert [set(row) for row in neighbours(x).tolist()] == expected


def test_mutual_neighbours_are_all_with_oneself_and_few_by_chance():
    x, y = normal(400, 8), normal(400, 8, seed=1)
    assert mutual_neighbours(neighbours(x), neighbours(x @ rotation(8) * 5)).value > 0.999  # but for rounding
    by_chance = mutual_neighbours(neighbours(x), neighbours(y))
    assert 0 <= by_chance.value <= 1
    assert by_chance.value == pytest.approx(10 / 399, abs=0.01)


def test_neighbours_of_shuffled_images_are_the_shuffled_neighbours():
    x, order = normal(60, 3), torch.randperm(60, generator=torch.Generator().manual_seed(3))
    shuffled = shuffled_neighbours(neighbours(x), order)
    assert [set(row) for row in shuffled.tolist()] == [set(row) for row in neighbours(x[order]).tolist()]
