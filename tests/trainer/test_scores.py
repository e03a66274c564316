"""Mean average precision is what its definition says, and its interval covers what it says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.scores import RESAMPLES, Accuracy, MeanPrecision, Ranking, new_tally


def drawn(seed: int, n: int, n_classes: int, n_levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of few levels, so that many are tied, and labels that follow them a little."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, n_levels, (n, n_classes)).astype(np.float32)
    labels = rng.random((n, n_classes)) < 0.2 + 0.5 * logits / n_levels
    return torch.from_numpy(logits), torch.from_numpy(labels.astype(np.int64))


def by_definition(logits: list[float], labels: list[int]) -> float:
    """Sum over thresholds of (R_n - R_{n-1}) P_n, as scikit-learn documents it."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(logits), reverse=True):
        taken = [label for logit, label in zip(logits, labels, strict=True) if logit >= threshold]
        recall = sum(taken) / sum(labels)
        total += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    return total


@given(st.integers(0, 2**16), st.integers(1, 40), st.integers(1, 4), st.integers(1, 30))
def test_average_precision_is_that_of_the_definition_with_ties_too(seed, n, n_classes, n_levels):
    logits, labels = drawn(seed, n, n_classes, n_levels)
    for k, value in enumerate(Ranking.of(logits, labels).precision().tolist()):
        if labels[:, k].any():
            assert value == pytest.approx(by_definition(logits[:, k].tolist(), labels[:, k].tolist()))
        else:
            assert np.isnan(value)


def test_equal_answers_to_all_are_worth_the_share_of_the_class():
    labels = torch.tensor([[1], [0], [0], [1]])
    assert MeanPrecision(torch.zeros(4, 1), labels).value == 0.5


def test_a_class_without_an_image_is_left_out_of_the_mean():
    logits = torch.tensor([[1.0, 5.0], [0.0, 9.0]])
    assert MeanPrecision(logits, torch.tensor([[1, 0], [0, 0]])).value == 1.0
    assert MeanPrecision(logits, torch.zeros(2, 2, dtype=torch.int64)).value == 0.0


@given(st.integers(0, 2**16), st.permutations(range(12)))
def test_the_order_of_images_decides_nothing(seed, order):
    logits, labels = drawn(seed, 12, 2, 3)
    shuffled = MeanPrecision(logits[order], labels[order])
    assert shuffled.value == pytest.approx(MeanPrecision(logits, labels).value)


def test_a_resample_counts_an_image_as_often_as_it_is_drawn():
    logits, labels = drawn(3, 9, 2, 4)
    counts = torch.tensor([2, 0, 1, 3, 0, 1, 1, 0, 1])
    repeated = Ranking.of(logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts, 0)).precision()
    assert Ranking.of(logits, labels).precision(counts.double()).tolist() == pytest.approx(repeated.tolist())


def test_nineteen_of_twenty_intervals_hold_the_true_value():
    big = MeanPrecision(*drawn(0, 40_000, 1, 12))
    true, n_held = big.value, 0
    for seed in range(40):
        low, high = MeanPrecision(*drawn(seed + 1, 80, 1, 12)).interval()
        n_held += low <= true <= high
    assert RESAMPLES >= 1000
    assert 33 <= n_held <= 40  # 38 are expected, with a standard deviation of 1.4


def test_an_interval_is_the_same_whenever_it_is_asked_for():
    score = MeanPrecision(*drawn(0, 50, 3, 9))
    assert score.interval() == score.interval()
    assert score.interval()[0] < score.value < score.interval()[1]


def test_a_tally_of_batches_is_that_of_all_at_once():
    logits, labels = drawn(1, 30, 3, 7)
    several, one = new_tally(labels), new_tally(labels[:, 0])
    for part in (slice(0, 7), slice(7, 30)):
        several.add(logits[part], labels[part])
        one.add(logits[part], labels[part, 0])
    assert several.score().value == MeanPrecision(logits, labels).value
    assert one.score() == Accuracy(int((logits.argmax(-1) == labels[:, 0]).sum()), 30)
