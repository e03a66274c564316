"""A share of the labelled images, the same of each class; the others take part in nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import SpecError
from dla_cache.store import open_store
from trainer.roles import class_counts, labelled_ids, labelled_rows, training_statistics
from trainer.run import load_run, train_run
from trainer.run_folder import read_facts


class Labels:
    """A store of images with labels, as far as the roles of a run look at one."""

    def __init__(self, labels):
        self.rows, self.splits, self.is_multi_label, self.labels = self, {"labelled"}, False, np.array(labels)

    def rows_of(self, splits):
        return np.arange(len(self.labels))

    def label_numbers(self, rows):
        return self.labels[rows]

    def ids_of(self, rows):
        return tuple(f"image-{row}" for row in rows)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fractions=st.lists(st.floats(0.01, 1), min_size=2, max_size=2),
    seed=st.integers(0, 3),
)
def test_each_class_gives_its_share_rounded_up_and_a_smaller_share_is_part_of_a_larger(tiny, labels, fractions, seed):
    run = tiny.run("probe", "unused", label_fraction_seed=seed)
    store = Labels(labels)

    def kept(fraction):
        return labelled_rows(run.model_copy(update={"label_fraction": fraction}), store)

    small, large = map(kept, sorted(fractions))
    assert set(small) <= set(large)
    for label in set(labels):
        assert (store.labels[small] == label).sum() == math.ceil(min(fractions) * labels.count(label) - 1e-9)


def test_the_seed_of_the_fraction_decides_which_images_and_the_seed_of_the_run_does_not(tiny):
    store = open_store(tiny.store)

    def ids(**fields):
        return labelled_ids(tiny.run("probe", "unused", label_fraction=0.5, **fields), store)

    assert ids(seed=0) == ids(seed=1)
    assert len({ids(label_fraction_seed=seed) for seed in range(8)}) > 1
    assert labelled_ids(tiny.run("probe", "unused"), store) is None


def test_a_run_learns_from_its_share_alone_and_says_so(tiny, tmp_path):
    config = tiny.run("teacher", tmp_path / "run", label_fraction=0.5)
    store = open_store(tiny.store)
    train_run(config)
    facts = read_facts(tmp_path / "run")
    assert (facts.class_counts, facts.n_labelled) == ((1, 1, 1), 3)
    assert class_counts(config, store) == (facts.class_counts, 3)
    latents = store.read("depth", labelled_rows(config, store)).astype(np.float64)
    statistics = training_statistics(config, store, "depth")
    np.testing.assert_allclose(statistics.mean, latents.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(statistics.std, latents.std(axis=(0, 2, 3)))
    standardised = [value for name, value in load_run(tmp_path / "run").task.module.named_buffers() if "mean" in name]
    assert any(torch.allclose(value.flatten(), torch.tensor(statistics.mean).float()) for value in standardised)


def test_batches_hold_no_image_that_takes_no_part(tiny, tmp_path, monkeypatch):
    seen = set()
    from trainer.tasks import StudentTask

    losses = StudentTask.losses
    monkeypatch.setattr(StudentTask, "losses", lambda task, batch: seen.update(batch.image_ids) or losses(task, batch))
    config = tiny.run("student", tmp_path / "run", label_fraction=0.5)
    train_run(config)
    assert seen == labelled_ids(config, open_store(tiny.store))


def test_a_share_too_small_for_a_batch_is_refused_with_a_batch_that_fits(tiny, tmp_path):
    with pytest.raises(SpecError, match=r"`roles.labelled` has 3 images, and `labelled_per_batch` is 5") as refused:
        train_run(tiny.run("student", tmp_path / "run", label_fraction=0.5, labelled_per_batch=5))
    assert "labelled_per_batch=1" in refused.value.hint
