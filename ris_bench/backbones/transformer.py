"""The transformer block that CLIP and DINOv2 share, with every layer at a place of its own.

The libraries pack query, key and value into one weight, some behind a call that never reaches the layers it is made of:
an adapter put there would be ignored. Here each projection is a layer; what the block computes is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.base import ImageTower, Site, TextState, Tower
from ris_bench.speed import Layers, Region

NUM_STAGES = 3
"""Image and text towers are cut into as many stages, so that a method can pair them."""


class Attention(nn.Module):
    """Multi-head self-attention on tokens (B, N, C)."""

    def __init__(self, qkv_weight: Tensor, qkv_bias: Tensor, out: nn.Linear, num_heads: int) -> None:
        super().__init__()
        (self.q, self.k, self.v), self.out = unpacked(qkv_weight, qkv_bias), out
        self.num_heads = num_heads

    def packed(self) -> tuple[Tensor, Tensor]:
        """The weight (3C, C) and bias (3C,) that the projections came from."""
        layers = (self.q, self.k, self.v)
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def forward(self, x_BNC: Tensor, mask_NN: Tensor | None = None) -> Tensor:
        q, k, v = (
            layer(x_BNC).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        return self.out(self.attend(q, k, v, mask_NN).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask_NN: Tensor | None) -> Tensor:
        """(B, heads, N, C / heads), all four."""
        return F.scaled_dot_product_attention(q, k, v, mask_NN)


def unpacked(weight: Tensor, bias: Tensor) -> list[nn.Linear]:
    """The three layers of a packed weight (3C, C) and bias (3C,)."""
    layers = []
    for rows, offsets in zip(weight.detach().chunk(3), bias.detach().chunk(3), strict=True):
        layer = nn.Linear(rows.shape[1], len(rows), device="meta")
        layer.weight, layer.bias = nn.Parameter(rows.clone()), nn.Parameter(offsets.clone())
        layers.append(layer)
    return layers


class Block(Region):
    """A pre-norm transformer block: what attention and MLP return is added to their input."""

    def __init__(
        self,
        norm1: nn.Module,
        attention: Attention,
        scale1: nn.Module,
        norm2: nn.Module,
        ffn: tuple[nn.Linear, nn.Module, nn.Linear],
        scale2: nn.Module,
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.scale1 = norm1, attention, scale1
        self.norm2, self.ffn, self.scale2 = norm2, Layers(*ffn), scale2
        self.shortcut = nn.Identity()

    def forward(self, x_BNC: Tensor, mask_NN: Tensor | None = None) -> Tensor:
        x_BNC = x_BNC + self.scale1(self.attention(self.norm1(x_BNC), mask_NN))
        return self.shortcut(x_BNC) + self.scale2(self.ffn(self.norm2(x_BNC)))


class Blocks(nn.Module):
    """Consecutive transformer blocks on tokens (B, N, C)."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_BNC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BNC = block(x_BNC)
        return x_BNC


class CausalBlocks(Blocks):
    """Consecutive blocks of a text tower: a token sees itself and those before it."""

    def forward(self, state: TextState) -> TextState:
        x_BLE = state.x_BLE
        # For the length at hand, which a method may have changed.
        mask_LL = causal(x_BLE.shape[1], x_BLE.dtype, x_BLE.device)
        for block in self.blocks:
            x_BLE = block(x_BLE, mask_LL)
        return state._replace(x_BLE=x_BLE)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept from an evaluation may serve in training
def causal(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A float mask (length, length), as CLIP's own."""
    return torch.full((length, length), -torch.inf, device=device, dtype=dtype).triu(1)


def split(blocks: list[Block], stage: type[Blocks], ends: Sequence[int] = ()) -> list[Blocks]:
    """The blocks in NUM_STAGES stages; all but the last end after so many blocks as `ends` says (default: equal)."""
    size, rest = divmod(len(blocks), NUM_STAGES)
    assert ends or not rest
    ends = [0, *(ends or (size, 2 * size)), len(blocks)]
    return [stage(blocks[start:end]) for start, end in pairwise(ends)]


class TokenTower(ImageTower):
    """An image tower of transformer blocks on tokens (B, N, C), of which the first ones stand for no place."""

    convolutional = False

    def __init__(self, blocks: list[Block], patch: int, num_prefix_tokens: int, ends: Sequence[int] = ()) -> None:
        stages = split(blocks, Blocks, ends)
        super().__init__(stages, (blocks[0].attention.out.out_features,) * NUM_STAGES)
        self.strides = (patch,) * NUM_STAGES
        self.num_prefix_tokens = num_prefix_tokens

    def to_map(self, x_BNC: Tensor) -> Tensor:
        side = round((x_BNC.shape[1] - self.num_prefix_tokens) ** 0.5)
        return x_BNC[:, self.num_prefix_tokens :].mT.unflatten(2, (side, side))

    def add_map(self, x_BNC: Tensor, delta_BCHW: Tensor) -> Tensor:
        return x_BNC + F.pad(delta_BCHW.flatten(2).mT, (0, 0, self.num_prefix_tokens, 0))


def block_sites(tower: Tower, final_norm: tuple[nn.Module, str]) -> Iterator[Site]:
    """The sites of a tower made of `Blocks` with a last LayerNorm, given by its parent and its name there."""
    depth = 0
    for i, stage in enumerate(tower.stages):
        for block in stage.blocks:
            at = {"tower": tower, "step": i + 1, "depth": depth}
            width = tower.widths[i]
            norms = at | {"width": width, "kind": "norm", "parent": block}
            yield Site(**norms | {"attr": "norm1", "depth": 2 * depth})
            for kind in ("q", "k", "v", "out"):
                yield layer_site(kind, block.attention, kind, **at)
            yield Site(kind="attention", parent=block, attr="attention", width=width, **at)
            yield Site(**norms | {"attr": "norm2", "depth": 2 * depth + 1})
            yield layer_site("fc1", block.ffn, "0", **at)
            yield layer_site("fc2", block.ffn, "2", **at)
            yield Site(kind="ffn", parent=block, attr="ffn", width=width, **at)
            yield Site(kind="shortcut", parent=block, attr="shortcut", width=width, **at)
            depth += 1
    parent, attr = final_norm
    step = len(tower.stages) + 1
    yield Site(tower=tower, kind="norm", step=step, depth=2 * depth, width=tower.widths[-1], parent=parent, attr=attr)
    yield from tower.stage_sites()


def layer_site(kind: str, parent: nn.Module, attr: str, **at: Any) -> Site:
    """The site of a linear or convolution layer."""
    return Site(kind=kind, parent=parent, attr=attr, width=len(getattr(parent, attr).weight), **at)
