"""The transformer block of a teacher, with fused attention wherever it runs.

Dimensions: B images, N tokens, D width, H heads.
"""

from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-6


class Block(nn.TransformerEncoderLayer):
    """Pre-norm attention and MLP with GELU: the parameters, their start and the numbers of torch's own layer.

    torch's layer takes a path of its own at evaluation that writes all attention weights [B, H, N, N] to memory and is
    one opaque operation to whoever counts FLOPs. This one is the same fused attention in training and at evaluation.

    Source: arXiv:2010.11929, equations 2 and 3.
    """

    def __init__(self, width: int, n_heads: int, *, mlp_ratio: int, dropout: float) -> None:
        super().__init__(
            width,
            n_heads,
            dim_feedforward=mlp_ratio * width,
            dropout=dropout,
            activation="gelu",
            layer_norm_eps=NORM_EPS,
            batch_first=True,
            norm_first=True,
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:  # type: ignore[override]
        """[B, N, D] of tokens [B, N, D], each of which sees all."""
        seen: Tensor = tokens_BND + self.dropout1(self._attend(self.norm1(tokens_BND)))
        hidden = self.dropout(functional.gelu(self.linear1(self.norm2(seen))))
        after: Tensor = seen + self.dropout2(self.linear2(hidden))
        return after

    def _attend(self, tokens_BND: Tensor) -> Tensor:
        attention = self.self_attn
        tokens_NBD = tokens_BND.transpose(0, 1)
        looked, _ = functional.multi_head_attention_forward(
            tokens_NBD,
            tokens_NBD,
            tokens_NBD,
            attention.embed_dim,
            attention.num_heads,
            attention.in_proj_weight,
            attention.in_proj_bias,
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=attention.dropout,
            out_proj_weight=attention.out_proj.weight,
            out_proj_bias=attention.out_proj.bias,
            training=self.training,
            need_weights=False,
        )
        return looked.transpose(0, 1)
