"""Statistics that merge: any cut of the images into parts gives numpy's numbers over all of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.store.statistics import measure, merge_statistics

# float64 sums of a few hundred values agree to some units in the last place.
TOLERANCE = 1e-12


@given(
    values=st.lists(st.floats(-6e4, 6e4, width=16), min_size=2, max_size=60),
    offset=st.sampled_from([0, 1e6]),
    cuts=st.lists(st.integers(1, 100), max_size=5),
)
def test_any_cut_gives_the_statistics_of_the_whole(values: list[float], offset: float, cuts: list[int]) -> None:
    latents = (np.array(values).repeat(6).reshape(-1, 3, 2) * [1, 2] + offset).swapaxes(1, 2)
    starts = sorted({0, *(cut % len(latents) for cut in cuts)})
    parts = [latents[start:stop] for start, stop in zip(starts, [*starts[1:], len(latents)], strict=True)]
    merged = merge_statistics([measure(part, 0) for part in parts])
    assert merged.count == len(latents)
    scale = np.abs(latents).max() + 1
    np.testing.assert_allclose(merged.mean, latents.mean((0, 2)), rtol=TOLERANCE, atol=TOLERANCE * scale)
    np.testing.assert_allclose(merged.std, latents.std((0, 2)), rtol=TOLERANCE, atol=TOLERANCE * scale)
    np.testing.assert_array_equal(merged.minimum, latents.min((0, 2)))
    np.testing.assert_array_equal(merged.maximum, latents.max((0, 2)))


def test_a_small_spread_on_a_large_mean_keeps_its_digits() -> None:
    latents = np.random.default_rng(0).normal(1e6, 1e-3, (50, 1, 4))
    merged = merge_statistics([measure(latents[:13], 0), measure(latents[13:], 0)])
    # The values themselves have 10 digits after the point; a sum of squares would keep none.
    np.testing.assert_allclose(merged.std, [latents.std()], rtol=1e-6)


@pytest.mark.parametrize("shard_size", [1, 3, 20])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 2, 2), "float16"), ((2, 5), "int16")])
@pytest.mark.parametrize("splits", [["train"], ["test"], ["train", "test"]])
def test_a_store_gives_the_statistics_of_the_asked_splits(
    tmp_path: Path, made: SimpleNamespace, shard_size: int, shape: tuple[int, ...], dtype: str, splits: list[str]
) -> None:
    recipe = made.recipe(shape, dtype)
    latents = made.latents(recipe, 11)
    store = made.store(tmp_path / "s", recipe, latents, shard_size)
    chosen = np.concatenate([latents[("train", "test").index(split) :: 2] for split in splits]).astype(np.float64)
    axes = (0, *range(2, chosen.ndim))
    statistics = store.statistics("depth", splits)
    assert statistics.count == len(chosen)
    np.testing.assert_allclose(statistics.mean, chosen.mean(axes), rtol=TOLERANCE)
    np.testing.assert_allclose(statistics.std, chosen.std(axes), rtol=TOLERANCE)


def test_the_same_part_cannot_stand_twice(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 11), 3)
    once, twice = (store.statistics("depth", splits) for splits in (["train"], ["train", "train"]))
    assert once.count == twice.count


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    axis=st.integers(0, 2),
    dtype=st.sampled_from(["float16", "float32", "int16"]),
    seed=st.integers(0, 9),
)
def test_moments_have_the_bits_of_numpys_on_all_values_at_once(
    shape: list[int], axis: int, dtype: str, seed: int
) -> None:
    axis %= len(shape) - 1
    latents = (np.random.default_rng(seed).normal(size=shape) * 100).astype(dtype)
    # As they were computed when the first stores were written: another order of adding gives another last digit.
    values = np.moveaxis(latents.astype(np.float64), axis + 1, 0)
    values = values.reshape(len(values), -1)
    found = measure(latents, axis)
    assert found.mean == tuple(values.mean(1).tolist())
    assert found.variance == tuple(values.var(1).tolist())
    assert found.minimum == tuple(values.min(1).tolist())
    assert found.maximum == tuple(values.max(1).tolist())
