"""Ridge probes against their normal equations, what they reach and what no probe can."""

import pytest
import torch

from trainer.alignment_probes import PENALTIES, RidgeFeatures, noise_ceiling, r_squared, recall, retrieval_ranks


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge(features, latents, penalty):
    """Weights and intercept by the normal equations of standardised features."""
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    x, y = (features - mean) / std, latents - latents.mean(dim=0)
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return lambda other: (other - mean) / std @ weights + latents.mean(dim=0)


def test_the_probe_is_the_ridge_regression_of_the_penalty_with_the_least_gcv_score():
    x, y = normal(60, 5), normal(60, 5)[:, :2] + normal(60, 2, seed=1)
    others = normal(10, 5, seed=2)
    standardised = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    unit = float(torch.linalg.eigvalsh(standardised.T @ standardised).mean())

    def score(penalty):
        hat = standardised @ torch.linalg.solve(
            standardised.T @ standardised + penalty * torch.eye(5, dtype=x.dtype), standardised.T
        )
        return float((y - ridge(x, y, penalty)(x)).square().sum() / (60 - 1 - hat.trace()) ** 2)

    best = min((float(penalty) * unit for penalty in PENALTIES), key=score)
    features = RidgeFeatures.of(x)
    predicted = features.fit(y).predict(features.coordinates(others))
    torch.testing.assert_close(predicted, ridge(x, y, best)(others), atol=1e-8, rtol=0)


def test_a_linear_latent_is_predicted_and_an_independent_one_is_not():
    x, held = normal(400, 20), normal(300, 20, seed=1)
    mixing = normal(20, 6, seed=2)
    features = RidgeFeatures.of(x)
    known = features.fit(x @ mixing).predict(features.coordinates(held))
    assert r_squared(known, held @ mixing).value == pytest.approx(1, abs=1e-3)
    unknown = features.fit(normal(400, 6, seed=3)).predict(features.coordinates(held))
    assert r_squared(unknown, normal(300, 6, seed=4)).value == pytest.approx(0, abs=0.05)


def test_r_squared_does_not_depend_on_the_basis_or_units_of_the_features():
    x, held, mixing = normal(200, 6), normal(100, 6, seed=1), normal(6, 4, seed=2)
    y, truth = x @ mixing + normal(200, 4, seed=3), held @ mixing + normal(100, 4, seed=4)

    def reached(scale):
        features = RidgeFeatures.of(x * scale)
        return r_squared(features.fit(y).predict(features.coordinates(held * scale)), truth).value

    assert reached(torch.logspace(-3, 3, 6, dtype=torch.float64)) == pytest.approx(reached(1), abs=1e-9)


def test_features_that_do_not_vary_and_more_features_than_images_make_a_probe():
    x = torch.cat([normal(30, 80), torch.ones(30, 1)], dim=1)
    features = RidgeFeatures.of(x)
    predicted = features.fit(normal(30, 3, seed=1)).predict(features.coordinates(x))
    assert bool(predicted.isfinite().all())
    constant = RidgeFeatures.of(torch.ones(30, 4))
    probe = constant.fit(normal(30, 3, seed=1))
    torch.testing.assert_close(probe.predict(constant.coordinates(torch.ones(2, 4))), probe.centre.expand(2, 3))


def test_what_the_fitted_images_foretell_is_what_other_images_show():
    x, held, mixing = normal(500, 10), normal(500, 10, seed=1), normal(10, 3, seed=2)
    y, truth = x @ mixing + 3 * normal(500, 3, seed=3), held @ mixing + 3 * normal(500, 3, seed=4)
    features = RidgeFeatures.of(x)
    probe = features.fit(y)
    assert probe.expected_r2 == pytest.approx(
        r_squared(probe.predict(features.coordinates(held)), truth).value, abs=0.1
    )


def test_the_influence_on_r_squared_is_that_of_leaving_each_image_out():
    truth, predicted = normal(2000, 3), normal(2000, 3) + 0.5 * normal(2000, 3, seed=1)
    measured = r_squared(predicted, truth)
    kept = torch.arange(2000) != 7
    without = r_squared(predicted[kept], truth[kept]).value
    assert measured.value - without == pytest.approx(float(measured.influence[7]) / 2000, rel=0.02)


def test_the_right_latent_is_found_by_itself_and_never_more_often_than_chance_by_noise():
    latents = normal(500, 6)
    perfect = retrieval_ranks(0.1 * latents + latents.mean(dim=0), latents)
    assert recall(perfect, 1).value == pytest.approx(1, abs=0.01)
    guessed = retrieval_ranks(normal(500, 6, seed=1), latents)
    assert recall(guessed, 50).value == pytest.approx(50 / 500, abs=0.05)
    assert recall(perfect, 5).value >= recall(perfect, 1).value


def test_ranks_do_not_depend_on_the_block(monkeypatch):
    latents, predicted = normal(90, 4), normal(90, 4) + normal(90, 4, seed=1)
    whole = retrieval_ranks(predicted, latents)
    monkeypatch.setattr("trainer.alignment_probes.BLOCK", 11)
    assert retrieval_ranks(predicted, latents).tolist() == whole.tolist()


def test_one_latent_for_all_images_is_no_find():
    assert recall(retrieval_ranks(normal(60, 3), torch.ones(60, 3)), 5).value == 0


def test_the_noise_ceiling_is_what_the_best_predictor_of_a_draw_reaches():
    known, one, other = normal(4000, 3), normal(4000, 3, seed=1), normal(4000, 3, seed=2)
    draw, again = 2 * known + one, 2 * known + other  # 4 of 5 parts of the variance are of the image
    ceiling = noise_ceiling(draw, again)
    assert ceiling == pytest.approx(0.8, abs=0.03)
    assert r_squared(2 * known, draw).value == pytest.approx(ceiling, abs=0.03)
    assert r_squared(again, draw).value == pytest.approx(2 * ceiling - 1, abs=0.05)
