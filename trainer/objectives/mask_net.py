"""The mask networks of MST-Distill: which features of a teacher a student is to be shown.

Dimensions: B images, N tokens, D features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 32
"""Of the vector that stands for a feature."""

HEADS = 4


class MaskNet(nn.Module):
    """A weight in (0, 1) for each feature of an image, from self-attention over its features.

    The mean over tokens is layer-normed; feature d with value x_d becomes the vector x_d·v + e_d of learned v and e_d;
    all attend to all; a linear layer and a sigmoid make a weight of each. The weight is that of feature d in all
    tokens. Its cost grows with D².

    The published network embeds by one linear layer from D to D·h numbers with h about D/2: that is 226 million
    parameters at D = 768. Here they are 32·D and 4,321.

    Source: published code of arXiv:2507.07015, `KD_methods/MST.py`, MaskNet_1d; of maps, as there, features are
    channels.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(WIDTH))
        self.feature = nn.Parameter(torch.randn(n_features, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.weight = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Weights [B, D] of tokens [B, N, D], which get no gradient from here."""
        pooled = tokens.detach().float().mean(dim=1)
        values = functional.layer_norm(pooled, pooled.shape[-1:])
        features = values[..., None] * self.value + self.feature
        looked, _ = self.attention(features, features, features, need_weights=False)
        weights: Tensor = self.weight(looked).squeeze(-1).sigmoid()
        return weights
