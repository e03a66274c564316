"""The blocks of any transformers image classifier, found by running it once without numbers; and its size.

Dimensions: B images, N tokens of a block, D its width, C channels, H and W sides of a map, K classes.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from dla_cache.errors import SpecError
from trainer.features import CLS, IMAGE, Features
from trainer.pretrained import told_as_spec_error

NUMBERED = re.compile(r"(?:.*\.)?(?:layer|stage|block|s)?_?\d+")
"""Name of a module that is one of several in a row; embeddings are not, and no block."""

CLS_TOKEN = "cls_token"
OTHER_TOKENS = ("distillation_token", "register_tokens")
"""Parameters [1, n, D]: tokens that stand before those of the image, the CLS first."""

ANY_SIDE = 64
"""Of the image on which a model that takes all sizes is looked at, in pixels."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which of a classifier's hidden states are outputs of blocks or stages, and what they hold."""

    numbers: tuple[int, ...]
    """Of these hidden states, counted from 0; the rest are embeddings."""
    widths: Mapping[str, int]
    """D of each by its name: that of the module that returns it, or `hidden_states.3` where none does."""
    spans: Mapping[str, slice]
    """Where `cls`, if there is one, and `image` lie among the tokens."""

    def features(self, logits: Tensor, hidden_states: Sequence[Tensor]) -> Features:
        """What a forward with hidden states said, maps as tokens row by row."""
        return Features(logits, tuple(as_tokens(hidden_states[number]) for number in self.numbers), self.spans)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model costs."""

    parameters: int
    flops: int
    """Of one image: two for each multiplication with an addition, as torch's counter has it."""


def as_tokens(hidden: Tensor) -> Tensor:
    """A map [B, C, H, W] as tokens [B, H·W, C]; tokens as they are."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def find_blocks(student: PreTrainedModel) -> Blocks:
    """The blocks of a classifier.

    A copy on torch's meta device is run: neither numbers are computed nor random ones drawn.

    Raises:
        SpecError: if it puts out no hidden states.
    """
    returned: list[tuple[str, Any]] = []
    copied = meta_copy(student)
    for name, module in copied.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: returned.append((name, output[0] if type(output) is tuple else output))
        )
    with told_as_spec_error(f"`{student.config.model_type}` does not tell what its blocks hold"):
        hidden_states = run_on_nothing(copied, side_of(student), output_hidden_states=True).hidden_states
        if not hidden_states:
            raise ValueError("it puts out no hidden states")
    names = [name_of(hidden, returned) for hidden in hidden_states]
    if not any(names):  # as where a model returns reshaped copies
        names = [f"hidden_states.{number}" for number in range(len(names))]
    numbers = tuple(number for number, name in enumerate(names) if name)
    return Blocks(
        numbers,
        {names[number]: as_tokens(hidden_states[number]).shape[-1] for number in numbers},
        spans_of(student, [hidden_states[number] for number in numbers]),
    )


def name_of(hidden: Tensor, returned: Sequence[tuple[str, Any]]) -> str:
    """The outermost numbered module that returned this very tensor, with the one that did first inside; or nothing."""
    names = [name for name, output in returned if output is hidden]
    around = [name for name in names if NUMBERED.fullmatch(name) and names[0].startswith(name)]
    return min(around, key=len) if around else ""


def spans_of(student: nn.Module, blocks: Sequence[Tensor]) -> dict[str, slice]:
    """Where CLS and image lie; a model of maps has its CLS, if any, not in them."""
    tokens = {name.rsplit(".", 1)[-1]: parameter for name, parameter in student.named_parameters()}
    if CLS_TOKEN not in tokens or any(block.ndim == 4 for block in blocks):
        return {IMAGE: slice(0, None)}
    n_before = 1 + sum(tokens[name].shape[1] for name in OTHER_TOKENS if name in tokens)
    return {CLS: slice(0, 1), IMAGE: slice(n_before, None)}


def model_size(student: PreTrainedModel, image_size: int) -> ModelSize:
    """Parameters, and operations of one image of `image_size` pixels a side."""
    with FlopCounterMode(display=False) as counter:
        run_on_nothing(meta_copy(student), image_size)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return ModelSize(parameters, counter.get_total_flops())


def meta_copy(student: PreTrainedModel) -> PreTrainedModel:
    """The same model without numbers, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        copied: PreTrainedModel = type(student)._from_config(copy.deepcopy(student.config))  # type: ignore[no-untyped-call]
    copied.train(False)
    return copied


@torch.no_grad()
def run_on_nothing(student: PreTrainedModel, side: int, **options: Any) -> Any:
    """What a model on the meta device makes of one image: shapes."""
    return student(pixel_values=torch.empty(1, 3, side, side, device="meta"), **options)


def side_of(student: PreTrainedModel) -> int:
    """A side of images, in pixels, that the model takes."""
    of_timm = (getattr(student.config, "model_args", None) or {}).get("img_size")
    match getattr(student.config, "image_size", of_timm):
        case int(side) | [int(side), *_]:
            return side
    return ANY_SIDE


def parameter_depths(student: nn.Module, block_names: Sequence[str]) -> dict[str, int]:
    """For each parameter 0 before the first block, i + 1 in block i, one more than the last block's after it.

    Raises:
        SpecError: if the blocks are no modules.

    Source: BEiT, arXiv:2106.08254, layer-wise decay of the learning rate as in its code.
    """
    names = [name for name, _ in student.named_parameters()]
    block_of = {
        name: number + 1 for number, block in enumerate(block_names) for name in names if name.startswith(f"{block}.")
    }
    if not block_of:
        raise SpecError("the student has no blocks by which rates could fall", hint="set `loop.layer_decay: 1.0`")
    first = min(place for place, name in enumerate(names) if name in block_of)
    depths, next_depth = dict.fromkeys(names[:first], 0), len(block_names) + 1
    for name in reversed(names[first:]):  # what stands between two blocks, as a stage's first layers, goes to the next
        next_depth = depths[name] = block_of.get(name, next_depth)
    return {name: depths[name] for name in names}
