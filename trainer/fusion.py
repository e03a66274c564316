"""Where image and latents meet in a teacher: in one sequence, through a few shared tokens, or only in the answer.

The sequence is the same for all, `[CLS] image [SEP] modality [SEP] modality ...`. It is one stream where fusion is
early. Else it falls into a stream for the image and one for each modality, whose first token, [CLS] or the [SEP] before
a modality, stands for the stream.

Dimensions: B images, N tokens of the sequence, b bottleneck tokens, D width, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.blocks import NORM_EPS, Block
from trainer.features import CLS, IMAGE

Fusion = Literal["early", "bottleneck", "late"]


def streams_of(spans: Mapping[str, slice]) -> dict[str, slice]:
    """Where each stream lies in the sequence, of where CLS, the image and each modality lie."""
    modalities = {name: slice(span.start - 1, span.stop) for name, span in spans.items() if name not in (CLS, IMAGE)}
    return {IMAGE: slice(0, spans[IMAGE].stop), **modalities}


class StreamBlocks(nn.Module):
    """A block of its own for each stream; they see each other at most through shared bottleneck tokens."""

    def __init__(self, streams: Mapping[str, slice], make_block: Callable[[], Block]) -> None:
        super().__init__()
        self.spans = dict(streams)
        self.streams = nn.ModuleDict({name: make_block() for name in streams})

    def forward(self, tokens_BND: Tensor, shared_BbD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The sequence [B, N, D] after the block, and the bottleneck tokens [B, b, D] if there are any.

        A stream sees its own tokens and the bottleneck tokens; what these have become is the mean over streams.

        Source: Nagrani et al., Attention Bottlenecks for Multimodal Fusion, arXiv:2107.00135, equations 8 and 9.
        """
        if shared_BbD is None:
            alone = [block(tokens_BND[:, self.spans[name]]) for name, block in self.streams.items()]
            return torch.cat(alone, dim=1), None
        own, shared = [], []
        for name, block in self.streams.items():
            stream = tokens_BND[:, self.spans[name]]
            seen = block(torch.cat([stream, shared_BbD], dim=1))
            own.append(seen[:, : stream.shape[1]])
            shared.append(seen[:, stream.shape[1] :])
        return torch.cat(own, dim=1), torch.stack(shared).mean(dim=0)


class StreamHeads(nn.Module):
    """A classifier of its own for each stream, zero at the start."""

    def __init__(self, streams: Sequence[str], width: int, n_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width, eps=NORM_EPS) for name in streams})
        self.heads = nn.ModuleDict({name: nn.Linear(width, n_classes) for name in streams})
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, classes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits [B, K] of each stream, of its first token [B, D]."""
        return {name: head(self.norms[name](classes[name])) for name, head in self.heads.items()}


def mean_of_present(logits: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """The mean [B, K] of the logits [B, K] of those streams that have something to see: the image always has.

    Args:
        kept: modality → boolean [B], false where it is absent.
    """
    votes = torch.stack(list(logits.values()))
    first = votes[0].new_ones(votes.shape[1])
    weights = torch.stack([kept[name].to(votes.dtype) if name in kept else first for name in logits])
    return (votes * weights[..., None]).sum(dim=0) / weights.sum(dim=0)[:, None]
