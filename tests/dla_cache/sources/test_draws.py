"""Several draws of a latent: of other seeds each, the first one that of a store with one."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import SpecError
from dla_cache.recompute import recompute
from dla_cache.sources import open_source
from dla_cache.spec import CacheSpec, LatentSpec
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests.dla_cache.conftest import make_manifest
from tests.dla_cache.sources.conftest import spec_of

LCM = "marigold-depth-lcm"


def test_the_first_draw_is_that_of_a_store_with_one_and_the_others_are_others(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    manifest, spec = make_manifest(tmp_path, 5), spec_of(LCM, checkpoint(LCM))
    for draws in (1, 3):
        latents = (spec.model_copy(update={"draws": draws}),)
        build_cache(
            manifest,
            CacheSpec(latents=latents, shard_size=2),
            tmp_path / f"{draws}",
            open_source=open_source,
            batch_size=2,
        )
    one, several = (open_store(tmp_path / name) for name in ("1", "3"))
    single, drawn = (store.read("depth", np.arange(5)) for store in (one, several))
    assert drawn.shape == (5, 3, *single.shape[1:])
    assert several.recipe("depth").format.of_one_draw == one.recipe("depth").format
    assert np.array_equal(drawn[:, 0], single)
    assert np.abs(drawn[:, 1] - drawn[:, 2]).max() > 0.1
    assert not verify_store(several).problems
    entry = CacheSpec(latents=(spec.model_copy(update={"draws": 3}),))
    (again,) = recompute(several, tmp_path, 5, open_source=open_source, spec=entry)
    assert again.is_within


def test_several_draws_of_what_draws_nothing_are_refused() -> None:
    spec = LatentSpec(modality="depth", source="embedded-depth-ridge", draws=2)
    with pytest.raises(SpecError, match="`embedded-depth-ridge` draws nothing: 2 draws would be 2 times the same"):
        open_source(spec, "cpu")
    with closing(open_source(spec.model_copy(update={"draws": 1}), "cpu")) as source:
        assert source.recipe.format.n_draws == 1
