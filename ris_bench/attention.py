"""The attention of heads and methods: that of PyTorch, computed in two ways."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.speed import Kept, TwoWays, linear


class MultiheadAttention(nn.MultiheadAttention, TwoWays):
    """Queries (B, N, C), keys and values (B, M, E) -> (B, N, C); keys that `pad_BM` marks are not seen."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, other_width: int | None = None) -> None:
        """`other_width` is that of keys and values, where it is not `width`."""
        super().__init__(width, heads, dropout, batch_first=True, kdim=other_width, vdim=other_width)
        self._packed = Kept(), Kept(), Kept()

    def forward(self, query_BNC: Tensor, key_BME: Tensor, value_BME: Tensor, pad_BM: Tensor | None = None) -> Tensor:
        if not self.fast:  # with weights, which nobody reads
            return super().forward(query_BNC, key_BME, value_BME, pad_BM)[0]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        q, k, v = (
            linear(x, weight, bias, packed).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias, packed in zip(
                (query_BNC, key_BME, value_BME),
                weights if self.in_proj_weight is None else self.in_proj_weight.chunk(3),
                self.in_proj_bias.chunk(3),
                self._packed,
                strict=True,
            )
        )
        mask_B11M = None if pad_BM is None else ~pad_BM[:, None, None]
        seen = F.scaled_dot_product_attention(q, k, v, mask_B11M, self.dropout if self.training else 0.0)
        # With the rows of a batch innermost, as PyTorch leaves them: a dropout behind draws in that order.
        return self.out_proj(seen.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)
