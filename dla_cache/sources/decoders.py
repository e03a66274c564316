"""Calls of decoders, counted: whatever a source holds that decodes is found in it, and watched."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

DECODES = re.compile("_?decode")
"""What names of methods that decode begin with: `decode`, `decode_latents`, `decode_prediction`."""

LEAVES = (torch.Tensor, np.ndarray, str, bytes, int, float, complex, type, ModuleType, type(None))
MOST_OBJECTS = 1_000_000


@dataclass(slots=True)
class DecoderCalls:
    """What a watch has seen."""

    watched: set[str] = field(default_factory=set)
    """Every method that is counted, as `AutoencoderKL.decode`."""
    replaced: set[str] = field(default_factory=set)
    """Those of them that the source has put something else in the place of."""
    calls: Counter[str] = field(default_factory=Counter)
    """Calls of the methods themselves; those of what stands in their place do not count."""

    @property
    def total(self) -> int:
        return self.calls.total()


@contextmanager
def watch_decoders(source: object, others: Collection[str] = ()) -> Iterator[DecoderCalls]:
    """Counts the calls of every decoder that can be reached from a source, until the block ends.

    Args:
        others: names of further methods to watch.

    Methods are watched in their class: what a source puts in the place of one, for pipelines that decode unasked, is
    no decoder, and to call it is no decoding. Beside them the modules `decoder` of a model that can decode. Tokenizers
    and processors, which turn numbers into text, are left alone.
    """
    seen = DecoderCalls()
    with ExitStack() as stack:
        for thing in _reachable(source):
            kind = type(thing)
            if hasattr(kind, "batch_decode"):
                continue
            found = (name for name in dir(kind) if DECODES.match(name) or name in others)
            names = [name for name in found if callable(getattr(kind, name))]
            for name in names:
                owner = next(base for base in kind.__mro__ if name in vars(base))
                label = f"{owner.__name__}.{name}"
                if name in getattr(thing, "__dict__", ()):
                    seen.replaced.add(label)
                if label not in seen.watched and isinstance(vars(owner)[name], FunctionType):
                    stack.enter_context(_counted(owner, name, label, seen))
            decoder = getattr(thing, "decoder", None) if names else None
            if isinstance(decoder, torch.nn.Module):
                label = f"{kind.__name__}.decoder"
                seen.watched.add(label)
                stack.callback(decoder.register_forward_pre_hook(_count(seen, label)).remove)
        yield seen


def _count(seen: DecoderCalls, label: str) -> Callable[..., None]:
    return lambda *_: seen.calls.update([label])


@contextmanager
def _counted(owner: type, name: str, label: str, seen: DecoderCalls) -> Iterator[None]:
    method = vars(owner)[name]

    @functools.wraps(method)
    def counted(*arguments: Any, **options: Any) -> Any:
        seen.calls[label] += 1
        return method(*arguments, **options)

    seen.watched.add(label)
    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, method)


def _reachable(root: object) -> Iterator[object]:
    """Every object that an attribute, an item or a closure leads to, each once."""
    seen, waiting = {id(root)}, [root]
    while waiting and len(seen) < MOST_OBJECTS:
        thing = waiting.pop()
        yield thing
        for child in _children(thing):
            if id(child) not in seen and not isinstance(child, LEAVES):
                seen.add(id(child))
                waiting.append(child)


def _children(thing: object) -> Iterator[object]:
    if isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, MethodType):
        yield thing.__self__
    elif isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, FunctionType):
        yield from (cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell))
    yield from getattr(thing, "__dict__", {}).values()
    for base in type(thing).__mro__:
        slots = vars(base).get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        yield from (getattr(thing, name) for name in names if not name.startswith("__") and hasattr(thing, name))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
