"""The decoder that ETRIS trains on top of every backbone: hierarchical alignment, global alignment, projector.

Xu et al., ICCV 2023, arXiv:2307.11545; github.com/kkakkkka/ETRIS model/layers.py. Shapes: B batch, C channels, H W map,
N = H * W cells, L words, E text width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.attention import MultiheadAttention
from ris_bench.backbones.base import Backbone, Features
from ris_bench.errors import UserError
from ris_bench.registry import Registry
from ris_bench.speed import Layers, Region, TwoWays, doubled_convolution, foldable

HEADS = Registry("head", "ris_bench.head")
"""Modules from `Features` to logits. One that has `prepare(maps)` and `decode(features with what that gives for maps)`,
which after one another are its `forward`, prepares the maps of an image once for all its sentences in evaluation."""


def conv(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, padding: int = 0) -> Layers:
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    return Layers(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def upsampling_conv(in_channels: int, out_channels: int, stride: int) -> Layers:
    layer = nn.ConvTranspose2d(in_channels, out_channels, stride, stride, bias=False)
    return Layers(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class HierarchicalAlignment(TwoWays):
    """Maps of all stages -> one map (B, width, H, W) on the middle stage's grid, each multiplied by the sentence.

    `prepare` brings them to that grid, before any sentence is read.
    If not `aligned`, the sentence has no part in it. `residual` adds what enters the convolutions with coordinates to
    what leaves them.
    """

    def __init__(self, backbone: Backbone, width: int, heads: int, aligned: bool, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        strides, channels = backbone.image.strides, backbone.image.out_channels
        self.to_grid = nn.ModuleList(
            [
                conv(channels[0], width, strides[1] // strides[0], strides[1] // strides[0]),
                conv(channels[1], width),
                upsampling_conv(channels[2], width, strides[2] // strides[1]),
            ]
        )
        self.attention = None
        if aligned:
            self.sentence = nn.Linear(backbone.sentence_width, width)
            self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(3))
        self.aggregate = conv(3 * width, width)
        self.coordinates = nn.Sequential(conv(width + 2, width, 3, padding=1), conv(width, width, 3, padding=1))

    def prepare(self, maps_BCHW: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(to_grid(map_BCHW) for to_grid, map_BCHW in zip(self.to_grid, maps_BCHW, strict=True))

    def forward(self, maps_BCHW: tuple[Tensor, ...], sentence_BE: Tensor) -> Tensor:
        return self.fuse(self.prepare(maps_BCHW), sentence_BE)

    def fuse(self, grids_BCHW: tuple[Tensor, ...], sentence_BE: Tensor) -> Tensor:
        grids = list(grids_BCHW)
        if self.attention is not None:
            key_BC = self.sentence(sentence_BE)
            for i, attention in enumerate(self.attention):
                if self.fast:
                    grids[i] = grids[i] * attend_to_one(attention, key_BC)[:, :, None, None]
                else:
                    cells_BNC = grids[i].flatten(2).mT
                    seen_BNC = attention(cells_BNC, key_BC[:, None], key_BC[:, None])[0]
                    grids[i] = (cells_BNC * seen_BNC).mT.unflatten(2, grids[i].shape[-2:])
        x_BCHW = self.aggregate(torch.cat(grids, dim=1))
        places_2HW = coordinates(*x_BCHW.shape[-2:], x_BCHW.dtype, x_BCHW.device)
        out_BCHW = self.coordinates(torch.cat([x_BCHW, places_2HW.expand(len(x_BCHW), -1, -1, -1)], dim=1))
        return out_BCHW + x_BCHW if self.residual else out_BCHW


def attend_to_one(attention: nn.MultiheadAttention, key_BC: Tensor) -> Tensor:
    """What any query receives from a single key (B, C): its value, because the softmax over one key is 1."""
    weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
    return attention.out_proj(F.linear(key_BC, weight, bias))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept from an evaluation may serve in training
def coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The x and y of every cell, from -1 to 1: (2, H, W)."""
    x_HW = torch.linspace(-1, 1, width, device=device).expand(height, width)
    y_HW = torch.linspace(-1, 1, height, device=device)[:, None].expand(height, width)
    return torch.stack([x_HW, y_HW]).to(dtype)


class GlobalAlignmentLayer(Region):
    """Cells attend to each other, then to the words; pre-norm, with a second norm after each attention."""

    def __init__(self, width: int, word_width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(width, heads, dropout)
        self.cross_attention = MultiheadAttention(width, heads, dropout, word_width)
        self.ffn = Layers(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.LayerNorm(ffn), nn.Linear(ffn, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.self_norm, self.cross_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor, words_BLE: Tensor, cell_NC: Tensor, place_LE: Tensor, pad_BL: Tensor) -> Tensor:
        normed = self.norms[0](x_BNC)
        query = normed + cell_NC
        seen = self.self_attention(query, query, normed)
        x_BNC = x_BNC + self.dropout(self.self_norm(seen))
        query = self.norms[1](x_BNC) + cell_NC
        seen = self.cross_attention(query, words_BLE + place_LE, words_BLE, pad_BL)
        x_BNC = x_BNC + self.dropout(self.cross_norm(seen))
        return x_BNC + self.dropout(self.ffn(self.norms[2](x_BNC)))


class GlobalAlignment(nn.Module):
    """Map (B, C, H, W) and words (B, L, E) -> map of the same shape, after `layers` of attention."""

    def __init__(self, width: int, word_width: int, layers: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GlobalAlignmentLayer(width, word_width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BCHW: Tensor, words_BLE: Tensor, pad_BL: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        cell_NC = cell_positions(x_BCHW.shape[1], height, width, x_BCHW.dtype, x_BCHW.device)
        place_LE = word_positions(*words_BLE.shape[1:], words_BLE.dtype, words_BLE.device)
        x_BNC = x_BCHW.flatten(2).mT
        for layer in self.layers:
            x_BNC = layer(x_BNC, words_BLE, cell_NC, place_LE, pad_BL)
        return self.norm(x_BNC).mT.unflatten(2, (height, width))


def sinusoids(length: int, width: int) -> Tensor:
    """Sine and cosine position encodings, interleaved: (length, width)."""
    rate = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def word_positions(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return sinusoids(length, width).to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def cell_positions(channels: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Half of the channels encode the column, half the row: (height * width, channels)."""
    column = sinusoids(width, channels // 2).expand(height, width, -1)
    row = sinusoids(height, channels // 2)[:, None].expand(height, width, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).to(device, dtype)


class Projector(TwoWays, Region):
    """Map (B, C, H, W) -> logits (B, 1, 4H, 4W): a 3x3 convolution whose kernel the sentence writes."""

    compiles = False  # matrices that are made once and kept are nothing that a compiler sees

    def __init__(self, width: int, sentence_width: int) -> None:
        super().__init__()
        half = width // 2
        self.refine = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv(width, width, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv(width, half, 3, padding=1),
            nn.Conv2d(half, half, 1),
        )
        self.kernel = nn.Linear(sentence_width, half * 9 + 1)

    def forward(self, x_BCHW: Tensor, sentence_BE: Tensor) -> Tensor:
        kernel = self.kernel(sentence_BE)
        weight_BC9, bias_B1 = kernel[:, :-1].unflatten(1, (-1, 9)), kernel[:, -1:]
        if not self.fast:
            x_BCHW = self.refine(x_BCHW)
            groups = x_BCHW.flatten(0, 1)[None]
            weight = weight_BC9.unflatten(2, (3, 3))
            return F.conv2d(groups, weight, bias_B1[:, 0], padding=1, groups=len(x_BCHW))[0][:, None]
        _, first, _, second, mix = self.refine
        for name, layers in (("first", first), ("second", second)):
            layer, norm, activation = layers
            if foldable(layer, norm):
                weight, bias_O = layers.folded(0)
                x_BCHW = activation(doubled_convolution(x_BCHW, weight, bias_O, self.kept(name)))
            else:
                x_BCHW = activation(norm(doubled_convolution(x_BCHW, layer.weight, kept=self.kept(name))))
        # The 1x1 convolution goes into the kernels; and a grouped convolution, one group per expression, takes five
        # times as long as a product and a shift-add.
        taps_B9C = weight_BC9.flip(2).mT
        taps_B9N = taps_B9C @ mix.weight.flatten(1) @ x_BCHW.flatten(2) + (taps_B9C @ mix.bias)[:, :, None]
        return F.fold(taps_B9N, x_BCHW.shape[-2:], 3, padding=1) + bias_B1[:, :, None, None]


@HEADS("etris")
class ETRISHead(nn.Module):
    """Features -> logits (B, 1, h, w) at a quarter of the input for a grid of stride 16.

    Defaults are those of config/refcoco/bridge_r101.yaml: 24,244,225 parameters on CLIP R101. With `layers: 0` there is
    no global alignment: the projector receives the map that the hierarchical alignment makes.
    """

    aligned, residual = True, False
    """Of `HierarchicalAlignment`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        width: int = 512,
        layers: int = 3,
        heads: int = 8,
        ffn: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise UserError(f"the head has width {width}: it must be a multiple of 4 and of its {heads} heads")
        if layers < 0:
            raise UserError(f"the head has {layers} layers: give 0, for no global alignment, or more")
        self.hierarchical_alignment = HierarchicalAlignment(backbone, width, heads, self.aligned, self.residual)
        self.global_alignment = None
        if layers:
            self.global_alignment = GlobalAlignment(width, backbone.word_width, layers, heads, ffn, dropout)
        self.projector = Projector(width, backbone.sentence_width)

    def forward(self, features: Features) -> Tensor:
        return self.decode(features._replace(maps_BCHW=self.prepare(features.maps_BCHW)))

    def prepare(self, maps_BCHW: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.hierarchical_alignment.prepare(maps_BCHW)

    def decode(self, features: Features) -> Tensor:
        x_BCHW = self.hierarchical_alignment.fuse(features.maps_BCHW, features.sentence_BE)
        if self.global_alignment is not None:
            x_BCHW = self.global_alignment(x_BCHW, features.words_BLE, features.pad_BL)
        return self.projector(x_BCHW, features.sentence_BE)


@HEADS("etris-without-ha")
class HeadWithoutHA(ETRISHead):
    """The same without hierarchical alignment, for the paper's ablation of its modules: the maps are fused as they are.

    The paper does not say what stands in its place; here the same convolutions do, and the sentence has no part in it.
    """

    aligned = False


@HEADS("detris")
class DETRISHead(ETRISHead):
    """The same with one more residual connection and no more parameters (DETRIS model/layers.py:112-115)."""

    residual = True
