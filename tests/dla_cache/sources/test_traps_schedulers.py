"""A scheduler that draws from a global generator makes a cache that nobody can make again."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dla_cache.errors import SourceError
from dla_cache.sources import SOURCES, LatentSource, open_source
from dla_cache.sources.catalog.entry import PipelineRow
from dla_cache.sources.presets import scheduler_like
from tests.dla_cache.sources.conftest import some_pixels, spec_of
from tests.dla_cache.sources.tiny import SIDE


def kinds_of_rows() -> list[str]:
    """One row for each pipeline and list of schedulers."""
    first: dict[Any, str] = {}
    for name, entry in SOURCES.items():
        if isinstance(entry.row, PipelineRow) and entry.row.schedulers:
            first.setdefault((entry.row.pipeline, entry.row.schedulers), name)
    return sorted(first.values())


@pytest.mark.parametrize("row", kinds_of_rows())
def test_every_allowed_scheduler_repeats_and_leaves_the_global_generators_alone(
    row: str, opened: Callable[[str], LatentSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = opened(row)
    pixels = some_pixels(source.recipe.source_view_size, 2)
    for name in SOURCES[row].row.schedulers:
        scheduler = scheduler_like(source.pipeline.scheduler, name, {})
        monkeypatch.setattr(source.pipeline, "scheduler", scheduler)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        first = source.encode(pixels, [3, 4]).latents
        second = source.encode(pixels, [3, 4]).latents
        assert np.array_equal(first, second), name
        assert torch.equal(torch.get_rng_state(), states[0]), name
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:], name
        alone = source.encode(pixels[1:], [4]).latents
        # With some of them the random weights of a tiny model make large numbers.
        np.testing.assert_allclose(alone[0], first[1], rtol=1e-4, atol=SOURCES[row].row.tolerance, err_msg=name)


@pytest.mark.parametrize("scheduler", ["DPMSolverSDEScheduler", "EulerDiscreetScheduler", "os"])
def test_a_scheduler_that_is_not_known_to_repeat_is_refused_with_those_that_are(
    scheduler: str, checkpoint: Callable[[str], Path]
) -> None:
    spec = spec_of("sd-img2img", checkpoint("sd-img2img"))
    spec = spec.model_copy(update={"parameters": {**spec.parameters, "scheduler": scheduler}})
    with pytest.raises(SourceError, match=f"`{scheduler}`") as refusal:
        open_source(spec, "cpu")
    assert "`DDIMScheduler`" in str(refusal.value)


def test_a_scheduler_in_the_place_of_another_does_not_cut_latents_off(checkpoint: Callable[[str], Path]) -> None:
    spec = spec_of("sd-img2img", checkpoint("sd-img2img"))
    spec = spec.model_copy(update={"parameters": {**spec.parameters, "scheduler": "DDIMScheduler"}})
    source: Any = open_source(spec, "cpu")
    by_itself = diffusers.DDIMScheduler.from_config(diffusers.PNDMScheduler().config)
    assert by_itself.config.clip_sample
    assert np.abs(source.encode(some_pixels(SIDE, 2), [1, 2]).latents).max() > 2


def test_a_checkpoint_with_a_scheduler_that_is_not_known_to_repeat_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "PNDMScheduler", diffusers.KDPM2DiscreteScheduler)
    with pytest.raises(SourceError, match="`KDPM2DiscreteScheduler`, with which"):
        open_source(spec_of("sd-img2img", checkpoint("sd-img2img")), "cpu")


def test_an_allowed_scheduler_that_draws_from_a_global_generator_all_the_same_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = diffusers.PNDMScheduler.step

    def draw_and_step(self: Any, *arguments: Any, **settings: Any) -> Any:
        torch.rand(1)
        return step(self, *arguments, **settings)

    monkeypatch.setattr(diffusers.PNDMScheduler, "step", draw_and_step)
    with pytest.raises(SourceError, match="no seed of an image decides"):
        open_source(spec_of("sd-img2img", checkpoint("sd-img2img")), "cpu")


def test_a_configuration_that_makes_an_allowed_scheduler_draw_globally_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("flux-img2img"), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "stochastic_sampling": True}))
    with pytest.raises(SourceError, match="no seed of an image decides"):
        open_source(spec_of("flux-img2img", folder), "cpu")
