"""Huang et al., "Densely Connected Parameter-Efficient Tuning for Referring Image Segmentation" (DETRIS), AAAI 2025.
arXiv:2501.08580; github.com/jiaqihuang01/DETRIS.

The sentence is read first. Then adapters beside the MLPs of the image tower, the dense aligners, look at all its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.attention import MultiheadAttention
from ris_bench.backbones.base import Backbone, Features, Known, Site
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method, Parallel
from ris_bench.speed import Layers


class DenseConvolutions(nn.Module):
    """Kernels of 1, 3 and 5, each on the input and all results before it (DETRIS model/adapter.py:34-44, 128-138).

    (B, C, ...) -> (B, C, ...): the results have C/2, C/4 and C/4 channels, the last two through C/16.
    """

    def __init__(self, width: int, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()

        def layer(inside: int, outside: int, kernel: int) -> Layers:
            # The biases are without effect, since a norm follows; the released counts contain them.
            return Layers(conv(inside, outside, kernel, padding=kernel // 2), norm(outside, eps=1e-3), nn.ReLU())

        half, quarter, thin = width // 2, width // 4, width // 16
        self.branches = nn.ModuleList(
            [
                layer(width, half, 1),
                nn.Sequential(layer(width + half, thin, 1), layer(thin, quarter, 3)),
                nn.Sequential(layer(width + half + quarter, thin, 1), layer(thin, quarter, 5)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        known = [x]
        for branch in self.branches:
            known.append(branch(torch.cat(known, dim=1)))
        return torch.cat(known[1:], dim=1)


class TextAdapter(nn.Module):
    """Words (B, L, E) -> what is added to them, `scale` times (DETRIS model/adapter.py:19-70, model/clip.py:276-284).

    The convolutions see later words and padding too, so that a tower with adapters is not causal; the first token
    passes them by and is doubled instead. Initialised as PyTorch does, which is not the identity; the released code
    also rounds these first weights to half precision (model/clip.py:601).
    """

    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.convs = DenseConvolutions(width, nn.Conv1d, nn.BatchNorm1d)

    def forward(self, x_BLE: Tensor) -> Tensor:
        x_BLC = F.relu(self.down(x_BLE))
        mixed_BLC = torch.cat([x_BLC[:, :1], self.convs(x_BLC[:, 1:].mT).mT], dim=1)
        return self.scale * self.up(x_BLC + mixed_BLC)


WORDS: ContextVar[Tensor] = ContextVar("detris_words")
"""What aligners attend to, (B, L, E), in the course of one forward pass."""


class DenseAligner(nn.Module):
    """Tokens (B, N, C) -> what is added beside them, `scale` times (DETRIS model/adapter.py:83-194).

    Patches pass the convolutions and ask all words, padding included; the first tokens pass both by and are doubled.
    Linear layers start from a truncated normal of 0.02, because model/dinov2/models/vision_transformer.py:177 draws
    them again after model/adapter.py:147-159; convolutions keep their Kaiming numbers. So it is not the identity at the
    start.
    """

    def __init__(
        self,
        channels: int,
        word_width: int,
        width: int,
        attention_width: int,
        heads: int,
        num_prefix_tokens: int,
        scale: float,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens, self.scale = num_prefix_tokens, scale
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.convs = DenseConvolutions(width, nn.Conv2d, nn.BatchNorm2d)
        self.patch_in, self.patch_out = nn.Linear(width, attention_width), nn.Linear(attention_width, width)
        self.word_in = nn.Linear(word_width, attention_width)
        self.attention = MultiheadAttention(attention_width, heads, dropout=0.1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = F.relu(self.down(x_BNC))
        prefix_BPC, patches_BNC = x_BNC.tensor_split([self.num_prefix_tokens], dim=1)
        side = round(patches_BNC.shape[1] ** 0.5)
        patches_BCHW = patches_BNC.mT.unflatten(2, (side, side))
        query_BNA = self.patch_in((self.convs(patches_BCHW) + patches_BCHW).flatten(2).mT)
        words_BLA = self.word_in(WORDS.get())
        seen_BNA = self.attention(query_BNA, words_BLA, words_BLA)
        return self.scale * self.up(x_BNC + torch.cat([prefix_BPC, self.patch_out(seen_BNA)], dim=1))


@METHODS("detris")
class DETRIS(Method):
    """Dense aligners in the image tower, text adapters in the text tower.

    Defaults are the released configurations of DETRIS-B and DETRIS-L (config/refcoco/DETRIS_base.yaml, 2,715,696
    parameters; DETRIS_large.yaml, 3,110,448). Layers count from 0. Where none are given they are one in each sixth of a
    tower: with d blocks, every (d // 6)-th from the middle of the first sixth on, that is 1, 3, ..., 11 of 12 and 2, 6,
    ..., 22 of 24 as released, and every block of a tower with less than 12. An empty list leaves that kind of adapter
    out. The half model of the paper's table has layers [1, 5, 9] in both towers; the model for mixed data widths of 384
    and layers 1 to 23 and 1 to 11 (config/refcoco/DETRIS_large_mixed.yaml, 33,331,360).

    The aligner stands beside the MLP and under its layer scale (model/dinov2/layers/block.py:104-111); the text adapter
    takes the words before the norm (model/clip.py:276-284).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        image_layers: tuple[int, ...] | None = None,
        image_width: int = 128,
        text_layers: tuple[int, ...] | None = None,
        text_width: int = 64,
        attention_width: int = 128,
        heads: int = 8,
        scale: float = 0.2,
    ) -> None:
        super().__init__(backbone)
        if image_layers == text_layers == ():
            raise UserError("method 'detris' has neither image_layers nor text_layers: one must be more than []")
        for name, width in (("image_width", image_width), ("text_width", text_width)):
            if width <= 0 or width % 16:
                raise UserError(f"method 'detris' has {name} {width}: it must be a multiple of 16")
        if attention_width % heads:
            raise UserError(
                f"method 'detris' has attention_width {attention_width}, which its {heads} heads do not divide"
            )
        if image_layers != ():
            for site in chosen(backbone.sites("ffn", ("image",)), image_layers, "image_layers"):
                aligner = DenseAligner(
                    site.width,
                    backbone.word_width,
                    image_width,
                    attention_width,
                    heads,
                    backbone.image.num_prefix_tokens,
                    scale,
                )
                site.wrap(partial(Parallel, beside=aligner))
        if text_layers != ():
            for site in chosen(backbone.sites("shortcut", ("text",)), text_layers, "text_layers"):
                site.wrap(partial(Parallel, beside=TextAdapter(site.width, text_width, scale)))

    def forward(self, backbone: Backbone, image: Tensor | Known, tokens_BL: Tensor) -> Features:
        words_BLE, sentence_BE, pad_BL = backbone.encode_text(tokens_BL)
        told = WORDS.set(words_BLE)
        try:
            maps = backbone.encode_image(image)
        finally:
            WORDS.reset(told)
        return Features(maps, words_BLE, sentence_BE, pad_BL)


def chosen(sites: list[Site], layers: Sequence[int] | None, option: str) -> list[Site]:
    """The sites of the named layers; by default one in each sixth of the tower."""
    depth = len(sites)
    if layers is None:
        step = max(1, depth // 6)
        layers = range(step // 2, depth, step)
    if sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < depth:
        raise UserError(f"method 'detris' has {option} {list(layers)}; give some of 0 to {depth - 1} in order")
    return [sites[i] for i in layers]
