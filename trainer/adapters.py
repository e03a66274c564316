"""From a stored latent to a fixed number of transformer tokens.

Dimensions: B images, N latent tokens (steps, or places of a grid), C channels, K codebooks,
M tokens a modality has in the sequence, D width.

Everywhere a mask is boolean [B, N] and true where a token is real. Masks alone say what is
padding: 0 is a valid code and a zero vector a valid latent.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dla_cache.errors import LatentShapeError, TrainingError, name_some
from dla_cache.spec import LatentFormat


def n_tokens(latent_format: LatentFormat) -> int:
    """Tokens of a full-length latent: all axes but channels or codebooks, multiplied."""
    return math.prod(latent_format.shape) // latent_format.shape[latent_format.channel_axis]


def tokens_of(latent: Tensor, latent_format: LatentFormat) -> Tensor:
    """A batch of latents with one token per step or place, row-major.

    The axes are those the format names; sizes are never used to guess them, since a latent may
    have as many tokens as channels.

    Args:
        latent: [B, *shape], where a `token` or `step` axis may be shorter than the format's.

    Returns:
        [B, N, C], or [B, N, K] for codes.

    Raises:
        LatentShapeError: if `latent` does not fit the format.
    """
    variable = {"token", "step"}
    fits = latent.dim() == len(latent_format.shape) + 1 and all(
        size == full or (axis in variable and 0 < size < full)
        for size, full, axis in zip(latent.shape[1:], latent_format.shape, latent_format.axes, strict=True)
    )
    if not fits:
        raise LatentShapeError(
            f"a latent has shape `{tuple(latent.shape[1:])}`, its format says `{latent_format.shape}`",
            hint="train on the store that the model was configured for",
        )
    tokens = latent.movedim(latent_format.channel_axis + 1, -1)
    return tokens[:, None] if tokens.dim() == 2 else tokens.flatten(1, -2)  # a mere vector is one token


def check_modalities(
    expected: tuple[str, ...], latents: Mapping[str, Tensor], present: Mapping[str, bool] | None
) -> tuple[str, ...]:
    """The modalities to look at: all that are expected and not declared absent.

    Raises:
        TrainingError: if a name is unknown, or a modality has no latent and is not declared absent.
            A misspelt name must not pass for a missing modality: that has spoilt published runs.
    """
    declared = present or {}
    unknown = sorted((set(latents) | set(declared)) - set(expected))
    if unknown:
        raise TrainingError(
            f"the model has no modality {name_some(unknown)}; it has {name_some(expected, shown=9)}",
            hint="hand over the modalities it was configured for",
        )
    wanted = tuple(name for name in expected if declared.get(name, True))
    missing = [name for name in wanted if name not in latents]
    if missing:
        raise TrainingError(
            f"no latent is given for {name_some(missing)}", hint="say `present={name: False}` to leave a modality out"
        )
    return wanted


class LatentScaler(nn.Module):
    """Standardises a raw continuous latent per channel; codes pass as they are.

    Mean and standard deviation are buffers, so a checkpoint brings its own. They start as NaN and a
    latent that comes before them is an error: unscaled latents would train, worse, without a word.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, latent_format: LatentFormat) -> None:
        super().__init__()
        self.is_continuous = latent_format.kind == "continuous"
        self.channel_axis = latent_format.channel_axis
        n_channels = latent_format.shape[self.channel_axis] if self.is_continuous else 0
        self.trailing = (1,) * (len(latent_format.shape) - self.channel_axis - 1)
        self.register_buffer("mean", torch.full((n_channels,), math.nan))
        self.register_buffer("std", torch.full((n_channels,), math.nan))
        self._has_statistics = False

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Takes the statistics of the training splits.

        Args:
            mean: [C], any float dtype.
            std: [C]; a channel that never varies counts as 1.

        Raises:
            LatentShapeError: if either has another number of channels.
        """
        if not mean.shape == std.shape == self.mean.shape:
            raise LatentShapeError(f"statistics have {len(mean)} and {len(std)} channels, the latent {len(self.mean)}")
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, raw_latent: Tensor) -> Tensor:
        """[B, *shape] raw, any float dtype → the same shape, standardised, float32; codes unchanged."""
        if not self.is_continuous:
            return raw_latent
        if not self._has_statistics:  # looked at once: a GPU would be waited for at every step
            if bool(self.std.isnan().any()):
                raise TrainingError(
                    "latents are to be standardised and no statistics are set", hint="call `set_statistics` first"
                )
            self._has_statistics = True
        shape = (-1, *self.trailing)
        return (raw_latent.to(self.mean.dtype) - self.mean.view(shape)) / self.std.view(shape)


class ContinuousAdapter(nn.Module):
    """LN(C) → Linear C→D → GELU → Linear D→D → dropout, on [B, N, C]."""

    def __init__(self, latent_format: LatentFormat, width: int, dropout: float) -> None:
        super().__init__()
        n_channels = latent_format.shape[latent_format.channel_axis]
        self.norm = nn.LayerNorm(n_channels)
        self.project = nn.Sequential(
            nn.Linear(n_channels, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout)
        )

    def forward(self, tokens_BNC: Tensor) -> Tensor:
        """[B, N, D]; the stored dtype becomes the parameters' own."""
        projected: Tensor = self.project(self.norm(tokens_BNC.to(self.norm.weight.dtype)))
        return projected


class CodeEmbedding(nn.Module):
    """The sum over codebooks of each code's learned vector."""

    offsets: Tensor

    def __init__(self, latent_format: LatentFormat, width: int) -> None:
        super().__init__()
        n_codebooks, vocabulary = latent_format.shape[latent_format.channel_axis], latent_format.vocabulary or 0
        self.embedding = nn.Embedding(n_codebooks * vocabulary, width)
        self.register_buffer("offsets", torch.arange(n_codebooks) * vocabulary, persistent=False)

    def forward(self, codes_BNK: Tensor) -> Tensor:
        """Codes [B, N, K], any integer dtype → [B, N, D]."""
        vectors: Tensor = self.embedding(codes_BNK.long() + self.offsets)
        return vectors.sum(dim=2)


class CodeAdapter(nn.Sequential):
    """Sum over codebooks of Embedding(vocabulary, D) → LN → Linear D→D → dropout, on [B, N, K]."""

    def __init__(self, latent_format: LatentFormat, width: int, dropout: float) -> None:
        super().__init__(
            CodeEmbedding(latent_format, width), nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)
        )


class Resampler(nn.Module):
    """M learned queries look at any number of tokens and become M tokens.

    Source: arXiv:2606.08336, the resampler of DLA; Perceiver, arXiv:2103.03206, section 3.1.
    """

    def __init__(self, width: int, n_queries: int, n_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(n_queries, width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.query_norm = nn.LayerNorm(width)
        self.token_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens_BND: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, D] and a mask [B, N] → [B, M, D]. Every sample needs a real token."""
        queries = self.queries.expand(len(tokens_BND), -1, -1)
        tokens = self.token_norm(tokens_BND)
        padding = None if mask is None else ~mask
        # need_weights=False keeps the fused attention kernels.
        looked, _ = self.attention(
            self.query_norm(queries), tokens, tokens, key_padding_mask=padding, need_weights=False
        )
        resampled: Tensor = queries + looked
        fed: Tensor = self.feed_forward(resampled)
        return resampled + fed


class ModalityEncoder(nn.Module):
    """One modality's latent as M tokens: adapter, learned position per step, resampler; or null tokens."""

    def __init__(
        self,
        latent_format: LatentFormat,
        width: int,
        *,
        tokens_per_modality: int,
        n_heads: int,
        dropout: float,
        position_std: float,
    ) -> None:
        super().__init__()
        self.format = latent_format
        adapter = ContinuousAdapter if latent_format.kind == "continuous" else CodeAdapter
        self.adapter = adapter(latent_format, width, dropout)
        self.step_positions = nn.Parameter(torch.empty(n_tokens(latent_format), width))
        self.resampler = Resampler(width, tokens_per_modality, n_heads)
        self.null_tokens = nn.Parameter(torch.empty(tokens_per_modality, width))
        nn.init.trunc_normal_(self.step_positions, std=position_std)
        nn.init.trunc_normal_(self.null_tokens, std=0.02)

    def forward(self, latent: Tensor, mask: Tensor | None, kept: Tensor) -> Tensor:
        """Tokens [B, M, D]; the null tokens where `kept` [B] is false.

        Args:
            latent: [B, *shape] of the format.
            mask: [B, N] or None when every token is real; a sample that is kept has a real token.
        """
        tokens = tokens_of(latent, self.format)
        if mask is not None:
            if self.format.kind == "codes":
                tokens = tokens.masked_fill(~mask[..., None], 0)  # padding may hold a number that is no code
            # Attention over no key at all is NaN in torch before 2.5; a sample that is not kept may look anywhere.
            mask = mask | ~kept[:, None]
        adapted = self.adapter(tokens)
        resampled = self.resampler(adapted + self.step_positions[: adapted.shape[1]], mask)
        tokens_BMD: Tensor = torch.where(kept[:, None, None], resampled, self.null_tokens.to(resampled.dtype))
        return tokens_BMD
