"""Latents made smaller on purpose, before they are stored: a recipe says by how much, and nothing else is done."""

import torch

from dla_cache.errors import SpecError


def mean_of_groups(latents: torch.Tensor, n_groups: int) -> torch.Tensor:
    """[B, n_groups, C], the mean of each run of neighbouring tokens, of latents [B, T, C]; all of them for 0.

    Raises:
        SpecError: if T is no multiple of `n_groups`.
    """
    if not n_groups:
        return latents
    batch, n_tokens, width = latents.shape
    if n_groups < 0 or n_tokens % n_groups:
        raise SpecError(
            f"`pooled_tokens` {n_groups} does not divide {n_tokens} tokens", hint="take a divisor, or 0 for all tokens"
        )
    return latents.float().reshape(batch, n_groups, -1, width).mean(2)


def last_of_groups(latents: torch.Tensor, n_groups: int) -> torch.Tensor:
    """[B, n_groups, ...], the last frame of each group of neighbours, the groups as equal as can be, of [B, F, ...].

    So the last frame is always among them, and the first ones, which show the image itself, seldom. 0 keeps all.

    Raises:
        SpecError: if there are fewer frames.
    """
    if not n_groups:
        return latents
    n_frames = latents.shape[1]
    if not 0 < n_groups <= n_frames:
        raise SpecError(
            f"`kept_frames` {n_groups} of {n_frames} frames", hint="take as many as there are, or fewer; 0 keeps all"
        )
    return latents[:, [(group + 1) * n_frames // n_groups - 1 for group in range(n_groups)]]


def mean_of_squares(latents: torch.Tensor, side: int) -> torch.Tensor:
    """[..., H / side, W / side], the mean of each square of so many places, of latents [..., H, W].

    Raises:
        SpecError: if H or W is no multiple of `side`.
    """
    if side == 1:
        return latents
    height, width = latents.shape[-2:]
    if side < 1 or height % side or width % side:
        raise SpecError(
            f"`pooled_by` {side} does not divide {height} x {width} places", hint="take a divisor, or 1 for all places"
        )
    squares = latents.float().reshape(*latents.shape[:-2], height // side, side, width // side, side)
    return squares.mean((-3, -1))
