"""The attention of heads and methods: that of PyTorch, computed in two ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.speed import TwoWays, linear


class MultiheadAttention(nn.MultiheadAttention, TwoWays):
    """Queries (B, N, C), keys and values (B, M, E) -> (B, N, C); keys that `pad_BM` marks are not seen."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, other_width: int | None = None) -> None:
        """`other_width` is that of keys and values, where it is not `width`."""
        super().__init__(width, heads, dropout, batch_first=True, kdim=other_width, vdim=other_width)

    def forward(self, query_BNC: Tensor, key_BME: Tensor, value_BME: Tensor, pad_BM: Tensor | None = None) -> Tensor:
        if not self.fast:  # with weights, which nobody reads
            return super().forward(query_BNC, key_BME, value_BME, pad_BM)[0]
        k, v = self._split("key", key_BME), self._split("value", value_BME)
        if not self.training and k.shape[1] * k.shape[2] < self.embed_dim:
            return self._of_few(query_BNC, k, v, pad_BM)
        mask_B11M = None if pad_BM is None else ~pad_BM[:, None, None]
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(self._split("query", query_BNC), k, v, mask_B11M, dropout)
        # With the rows of a batch innermost, as PyTorch leaves them: a dropout behind draws in that order.
        return self.out_proj(seen.permute(2, 0, 1, 3).flatten(2)).transpose(0, 1)

    def _of_few(self, query_BNC: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, pad_BM: Tensor | None) -> Tensor:
        """The same, where all heads' keys are fewer than the channels: the projections of the queries and of what they
        see are applied to the keys and the values instead."""
        weight_CC, bias_C = self._projection("query")
        k_BHMD = k_BHMD * k_BHMD.shape[-1] ** -0.5
        asked_BSC = (k_BHMD @ weight_CC.unflatten(0, (self.num_heads, -1))).flatten(1, 2)
        offset_BHM = (k_BHMD @ bias_C.unflatten(0, (self.num_heads, -1))[:, :, None])[..., 0]
        if pad_BM is not None:
            offset_BHM = offset_BHM.masked_fill(pad_BM[:, None], -torch.inf)
        scores_BNS = torch.baddbmm(offset_BHM.flatten(1)[:, None], query_BNC, asked_BSC.mT)
        shares_BNS = scores_BNS.unflatten(2, (self.num_heads, -1)).softmax(3).flatten(2)
        told_BSC = (v_BHMD @ self.out_proj.weight.T.unflatten(0, (self.num_heads, -1))).flatten(1, 2)
        return shares_BNS @ told_BSC + self.out_proj.bias

    def _split(self, part: str, x: Tensor) -> Tensor:
        """Queries, keys or values by head: (B, heads, tokens, C / heads)."""
        return linear(x, *self._projection(part), self.kept(part)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _projection(self, part: str) -> tuple[Tensor, Tensor]:
        number = ("query", "key", "value").index(part)
        if self.in_proj_weight is None:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[number]
        else:
            weight = self.in_proj_weight.chunk(3)[number]
        return weight, self.in_proj_bias.chunk(3)[number]
