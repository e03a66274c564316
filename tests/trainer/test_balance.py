"""Rare classes: weights, adjusted logits, smoothed labels, and classes without an image."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from dla_cache.errors import SpecError
from dla_cache.manifest import write_manifest
from dla_cache.store import open_store
from trainer.data import PairSource, PixelScale, Role
from trainer.objectives.cross_entropy import LabelConfig, MixedLabels, balance_of, cross_entropy
from trainer.run import load_run, train_run
from trainer.run_folder import read_facts
from trainer.views import ViewConfig

COUNTS = (90, 9, 1)
LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 1, 2, -1, 0, 1, 0])


def balanced(counts=COUNTS, *, n_images=None, is_multi_label=False, **config):
    n_images = sum(counts) if n_images is None else n_images
    return balance_of(LabelConfig.model_validate(config), counts, n_images, is_multi_label=is_multi_label)


def test_the_default_is_the_plain_cross_entropy_to_the_bit():
    assert balanced().is_plain
    expected = functional.cross_entropy(LOGITS[LABELS >= 0], LABELS[LABELS >= 0])
    assert torch.equal(cross_entropy(LOGITS, LABELS, balanced()), expected)


def test_balanced_weights_are_those_of_scikit_learn():
    torch.testing.assert_close(
        balanced(class_weights="balanced").weights, torch.tensor([100 / 270, 100 / 27, 100 / 3], dtype=torch.float64)
    )


def test_effective_weights_are_one_over_the_effective_number_with_a_mean_of_one():
    weights = balanced((5000, 500, 50), class_weights="effective").weights
    # (1 - beta)/(1 - beta^n) by hand, beta .9999: 1/3934.6, 1/487.7, 1/49.88.
    inverse = [1 / 3934.593, 1 / 487.7084, 1 / 49.87771]
    torch.testing.assert_close(
        weights, torch.tensor([3 * one / sum(inverse) for one in inverse]).double(), rtol=1e-4, atol=0
    )
    assert float(weights.mean()) == pytest.approx(1)


def test_weighted_losses_are_averaged_over_images_so_that_the_mean_over_parts_is_that_of_the_batch():
    balance = balanced(class_weights="balanced")
    mixed = MixedLabels(LABELS.flip(0), torch.rand(8))
    labels = LABELS.clone()
    labels[4], mixed.partner[3], mixed.partner[4] = 1, 1, 1
    for how in ({}, {"mixed": mixed}):
        whole = cross_entropy(LOGITS, labels, balance, **how)
        parts = [
            cross_entropy(
                LOGITS[part],
                labels[part],
                balance,
                MixedLabels(mixed.partner[part], mixed.share[part]) if how else None,
            )
            for part in (slice(0, 4), slice(4, 8))
        ]
        torch.testing.assert_close(sum(parts) / 2, whole)
    known = LABELS >= 0
    summed = functional.cross_entropy(LOGITS[known], LABELS[known], weight=balance.weights.float(), reduction="sum")
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, balance), summed / 7)


def test_logit_adjustment_adds_the_log_of_a_classs_share_and_so_asks_more_of_rare_classes():
    balance = balanced(logit_adjustment=2)
    adjusted = LOGITS + 2 * torch.tensor([0.9, 0.09, 0.01]).log()
    known = LABELS >= 0
    expected = functional.cross_entropy(adjusted[known], LABELS[known])
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, balance), expected)


def test_label_smoothing_is_that_of_torch():
    known = LABELS >= 0
    expected = functional.cross_entropy(LOGITS[known], LABELS[known], label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, balanced(label_smoothing=0.1)), expected)


def test_an_empty_class_has_no_weight_and_leaves_loss_and_gradient_finite():
    for config in ({"class_weights": "balanced"}, {"class_weights": "effective"}, {"logit_adjustment": 1}):
        balance = balanced((4, 2, 0), **config)
        logits = LOGITS.clone().requires_grad_()
        cross_entropy(logits, LABELS % 2, balance).backward()
        assert bool(logits.grad.isfinite().all())
        if balance.weights is not None:
            assert float(balance.weights[2]) == 0
        else:
            assert bool((logits.grad[:, 2] == 0).all())
    torch.testing.assert_close(
        balanced((4, 2, 0), class_weights="balanced").weights, torch.tensor([0.75, 1.5, 0]).double()
    )
    with pytest.raises(SpecError, match="without an image"):
        balanced((4, 2, 0), logit_adjustment=1, label_smoothing=0.1)


def test_of_several_labels_positives_weigh_as_much_as_negatives():
    balance = balanced((5, 2, 0, 10), n_images=10, is_multi_label=True, class_weights="balanced")
    assert balance.weights.tolist() == [1, 4, 0, 1]
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]])
    logits = torch.randn(2, 4)
    expected = functional.binary_cross_entropy_with_logits(
        logits, labels.float(), pos_weight=torch.tensor([1.0, 4, 0, 1])
    )
    torch.testing.assert_close(cross_entropy(logits, labels, balance), expected)


@pytest.mark.parametrize("config", [{"class_weights": "effective"}, {"logit_adjustment": 1}, {"label_smoothing": 0.1}])
def test_what_is_not_defined_for_several_labels_is_refused(config):
    with pytest.raises(SpecError, match=f"ce.{next(iter(config))}") as refused:
        balanced(is_multi_label=True, n_images=100, **config)
    assert "balanced" in refused.value.hint


def without_green(tiny, folder):
    rows = [
        replace(row, label=0 if row.split == "labelled" and row.label == 1 else row.label)
        for row in tiny.manifest.rows()
    ]
    manifest = write_manifest(tiny.manifest.root / f"{folder.name}-no-green.parquet", rows, tiny.manifest.class_names)
    return str(tiny.build(manifest, folder / "no-green.zarr"))


def test_a_class_without_a_labelled_image_is_named_before_anything_is_written_unless_the_run_allows_it(tiny, tmp_path):
    store = without_green(tiny, tmp_path)
    with pytest.raises(SpecError, match=r"1 of 3 classes have no image in `roles\.labelled`: `green`") as refused:
        train_run(tiny.run("probe", tmp_path / "run", store=store))
    assert "allow_empty_classes=true" in refused.value.hint
    assert not (tmp_path / "run").exists()
    ce = {"class_weights": "balanced"}
    train_run(tiny.run("probe", tmp_path / "run", store=store, allow_empty_classes=True, ce=ce))
    assert read_facts(tmp_path / "run").class_counts[1] == 0


@pytest.mark.parametrize("kind", ["probe", "teacher", "student"])
def test_every_kind_of_run_learns_labels_as_its_config_says_also_when_it_is_loaded(tiny, tmp_path, kind):
    ce = {"class_weights": "balanced", "label_smoothing": 0.1}
    train_run(tiny.run(kind, tmp_path / "run", ce=ce))
    run = load_run(tmp_path / "run")
    counts = run.facts.class_counts
    assert sum(counts) == run.facts.n_labelled
    assert run.task.balance.label_smoothing == 0.1
    expected = [sum(counts) / (len(counts) * count) for count in counts]
    torch.testing.assert_close(run.task.balance.weights, torch.tensor(expected).double())

    scale = PixelScale((0.5,) * 3, (0.5,) * 3)
    sees = {"image_size": 8, "pixel_scale": scale, "modalities": ("depth",), "view": ViewConfig(), "device": "cpu"}
    pairs = PairSource(open_store(tiny.store), tiny.images, seed=0, **sees)
    batch = next(pairs.evaluation(Role(("validation",), 4), ("depth",))())
    answers = list(run.task.branch_logits(batch).values())
    trained = answers[1:] or answers  # a teacher's answer is the mean of its branches
    weight = 0.25 if kind == "student" else 1
    losses = [weight * cross_entropy(answer, batch.labels, run.task.balance) for answer in trained]
    torch.testing.assert_close(torch.stack(list(run.task.losses(batch).terms.values())), torch.stack(losses))
    assert not torch.allclose(losses[0], weight * cross_entropy(trained[0], batch.labels))
