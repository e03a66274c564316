"""Weights that a checkpoint lacks, and what is said of them."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dla_cache.errors import SourceError, name_some


@contextmanager
def only_errors() -> Iterator[None]:
    """Keeps what the libraries have to say of a checkpoint off the terminal, but for errors.

    They list the text half of a model of which the image half is loaded, weight by weight.
    """
    libraries = _loaded_libraries()
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Loads without the bars of diffusers and transformers: a command has one of its own."""
    shown = [library for library in _loaded_libraries() if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _loaded_libraries() -> list[Any]:
    """What the two log by. Who trains has no diffusers, and a library that is not loaded says nothing."""
    names = ("diffusers.utils.logging", "transformers.utils.logging")
    return [sys.modules[name] for name in names if name in sys.modules]


def require_loaded(components: Mapping[str, Any]) -> None:
    """Of models of diffusers, which leaves weights that a checkpoint lacks without numbers.

    Raises:
        SourceError: if there are such weights.
    """
    empty = [
        f"{name}.{weight}"
        for name, component in components.items()
        if isinstance(component, torch.nn.Module)
        for weight, numbers in component.named_parameters()
        if numbers.is_meta
    ]
    if empty:
        raise SourceError(
            f"the checkpoint lacks {name_some(sorted(empty))}",
            hint="fetch it again, or take one of this very kind of model",
        )


def require_finite(source: str, latents: NDArray[np.generic], compute_dtype: str, lacking: Sequence[str] = ()) -> None:
    """What a source makes of a grey image must be numbers.

    Args:
        lacking: names of weights that the checkpoint does not hold.

    Raises:
        SourceError: if some are NaN or infinite.
    """
    if np.isfinite(latents).all():
        return
    if lacking:
        raise SourceError(
            f"`{source}` depends on weights that the checkpoint does not hold: {name_some(lacking)}",
            hint="take a checkpoint of this very kind of model, or a `hook` before those weights, if it has one",
        )
    raise SourceError(
        f"`{source}` makes NaN or infinity of a grey image, computing in {compute_dtype}",
        hint="set `compute_dtype: float32`",
    )
