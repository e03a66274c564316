"""What a named module of a network puts out or takes in, and nothing run that comes after it."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dla_cache.errors import SourceError, name_some
from dla_cache.spec import Axis

# B images, N tokens, D channels of tokens; C, H, W channels and sides of maps.

HOOK = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*)(:input)?(?:\[(-?\d{1,3})\])?")

Pool = Literal["none", "mean", "cls"]
"""`mean` over all tokens, or places of a map; `cls`: the first token alone."""


@dataclass(frozen=True, slots=True)
class Hook:
    """Where in a network its activations are taken."""

    module: str
    """Dotted, as `named_modules` of torch has it."""
    of_input: bool = False
    """Whether it is the module's first argument that is taken, before it runs, in place of its result."""
    place: int | None = None
    """Which one, of a module that hands on several; the first if it is not said."""

    @classmethod
    def parse(cls, text: str) -> "Hook":
        """`encoder.layer.11`, `head:input` or `head:input[-1]` as a hook.

        Raises:
            SourceError: if it is none of these.
        """
        found = HOOK.fullmatch(text)
        if found is None:
            raise SourceError(
                f"`{text}` is no hook",
                hint="it is a module, as `encoder.layer.11`, maybe followed by `:input`, and by `[-1]` where there are"
                " several",
            )
        return cls(found[1], found[2] is not None, None if found[3] is None else int(found[3]))


class _Reached(BaseException):
    """Ends a forward pass at its hook. No `except Exception` on its way out takes it for a failure."""


def activations(network: nn.Module, hook: Hook, forward: Callable[[], Any]) -> Tensor:
    """The tensor at a hook, [B, ...]; `forward` is ended there the first time, so that no later module runs.

    The network is left without the hook, whatever `forward` raises.

    Raises:
        SourceError: if there is no such module, `forward` does not come to it, or there is no tensor.
    """
    module = _module_at(network, hook.module)
    caught: list[Any] = []

    def catch_input(_module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        caught.append(next(iter((*arguments, *options.values())), None))
        raise _Reached

    def catch_result(_module: nn.Module, _arguments: tuple[Any, ...], result: Any) -> None:
        caught.append(result)
        raise _Reached

    handle = (
        module.register_forward_pre_hook(catch_input, with_kwargs=True)
        if hook.of_input
        else module.register_forward_hook(catch_result)
    )
    try:
        forward()
    except _Reached:
        return _tensor_of(caught[0], hook)
    finally:
        handle.remove()
    raise SourceError(
        f"`{hook.module}` of `{type(network).__name__}` is there, but not run for an image",
        hint="name a module that an image goes through",
    )


def _module_at(network: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=4)
        there = (
            f"near it: {name_some(near, 4)}" if near else f"it begins with {name_some([n for n in modules if n], 6)}"
        )
        raise SourceError(f"`{type(network).__name__}` has no module `{name}`", hint=there)
    return modules[name]


def _tensor_of(value: Any, hook: Hook) -> Tensor:
    """The tensor itself, or one of several."""
    several = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(several, list | tuple):
        place = hook.place or 0
        if not -len(several) <= place < len(several):
            raise SourceError(
                f"`{hook.module}` has no `[{place}]`: there are {len(several)}", hint="count from 0, or back from -1"
            )
        several = several[place]
    elif hook.place is not None:
        raise SourceError(f"`{hook.module}` has one tensor, no `[{hook.place}]`", hint="leave the brackets out")
    if not isinstance(several, Tensor) or not several.is_floating_point():
        raise SourceError(
            f"at `{hook.module}` there is a `{type(several).__name__}`, no activations", hint="name another module"
        )
    return several


def pooled(features: Tensor, pool: Pool) -> Tensor:
    """Activations [B, N, D] or [B, C, H, W] as [B, D] or [B, C]; with the pool `none` as they are.

    Raises:
        SourceError: if they are of a shape that cannot be pooled so.
    """
    if pool == "none":
        return features
    if pool == "cls" and features.ndim == 3:
        return features[:, 0]
    if pool == "mean" and features.ndim in (3, 4):
        axes = axes_of(tuple(features.shape[1:]))
        return features.mean(dim=[1 + place for place, axis in enumerate(axes) if axis != "channel"])
    raise SourceError(
        f"activations {list(features.shape[1:])} cannot be pooled by `{pool}`",
        hint="`cls` is for tokens, `mean` for tokens and maps; set `pool: none`",
    )


def axes_of(shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """What the axes of one image's activations count: [D], [N, D], [C, H, W], or [H, W, C].

    The view is a square, and so are maps of it: that tells which axis of three is the channel.

    Raises:
        SourceError: if the shape is of none of these.
    """
    match shape:
        case (_,):
            return ("channel",)
        case (_, _):
            return ("token", "channel")
        case (_, height, width) if height == width:
            return ("channel", "height", "width")
        case (height, width, _) if height == width:
            return ("height", "width", "channel")
    raise SourceError(
        f"activations {list(shape)} are neither tokens nor a square map",
        hint="name a module with [token, channel] or [channel, height, width]",
    )


def as_array(features: Tensor) -> Any:
    """Activations as a float32 array of NumPy."""
    return features.to(torch.float32).cpu().numpy()
