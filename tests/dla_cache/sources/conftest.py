"""Tiny checkpoints of the rows of the catalog, saved once a test run, and sources opened on them."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dla_cache.sources import SOURCES, LatentSource, open_source
from dla_cache.spec import LatentSpec
from tests.dla_cache.sources import tiny_caption
from tests.dla_cache.sources.tiny import CAPTIONER, Tiny

FAMILIES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("tiny_*.py")))


def tiny_rows() -> dict[str, Tiny]:
    """How each row of the catalog is tried."""
    rows: dict[str, Tiny] = {}
    for family in FAMILIES:
        rows.update(importlib.import_module(f"tests.dla_cache.sources.{family}").TINY)
    return rows


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row's tiny checkpoint, saved when it is first asked for."""
    saved: dict[str, Path] = {}

    def find(name: str) -> Path:
        tiny = tiny_rows()[name]
        owner = tiny.same_checkpoint_as or name
        if owner not in saved:
            folder = tmp_path_factory.mktemp(owner) / "checkpoint"
            tiny_rows()[owner].save(folder)
            if tiny_rows()[owner].takes_captions:
                tiny_caption.save(folder.parent / CAPTIONER)
            saved[owner] = folder
        return saved[owner]

    return find


def places(name: str, folder: Path) -> dict[str, str]:
    """The parameters that say where a row's tiny weights lie."""
    tiny = tiny_rows()[name]
    beside = {**tiny.components, **({"captioner": CAPTIONER} if tiny.takes_captions else {})}
    return {"model": str(folder), **{parameter: str(folder.parent / place) for parameter, place in beside.items()}}


def spec_of(name: str, folder: Path, **changes: Any) -> LatentSpec:
    """A spec of one row on a tiny checkpoint, stored as float32 so that nothing is rounded."""
    tiny = tiny_rows()[name]
    parameters = {**places(name, folder), "view_size": tiny.view_size, **tiny.parameters}
    fields = {
        "modality": SOURCES[name].modality,
        "source": name,
        "parameters": parameters,
        "seed": 7,
        "dtype": "float32",
    }
    return LatentSpec.model_validate(fields | changes)


@pytest.fixture(scope="module")
def opened(checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], LatentSource]]:
    """A row's source on its tiny checkpoint; the last one stays open, so that a row's tests share it."""
    held: dict[str, LatentSource] = {}

    def find(name: str) -> LatentSource:
        if name not in held:
            for other in list(held):
                held.pop(other).close()
            held[name] = open_source(spec_of(name, checkpoint(name)), "cpu")
        return held[name]

    yield find
    for source in held.values():
        with closing(source):
            pass


def some_pixels(side: int, n_images: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth random images uint8 [n, 3, side, side], each another."""
    coarse = np.random.default_rng(0).integers(0, 256, (n_images, 3, 4, 4), np.uint8)
    return np.ascontiguousarray(coarse.repeat(-(-side // 4), 2).repeat(-(-side // 4), 3)[:, :, :side, :side])
