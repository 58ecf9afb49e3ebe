"""Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021, arXiv:2106.04647.

Files are those of github.com/rabeehk/compacter under seq2seq/.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.base import Backbone
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Hidden, Method, Residual, Serial, hidden_channels


class PHM(nn.Module):
    """`y = x H + b` with `H = sum_i A_i kron B_i` (in, out), i = 1 ... n (section 3; hypercomplex/layers.py:36-177).

    The rule A (n, n, n) belongs to the method: layers may share one. B is (n, in / n, out / n), of full rank or the
    product of two factors of the given rank. On tokens (B, N, C) or maps (B, C, H, W).
    """

    def __init__(self, width: int, out_width: int, rule: nn.Parameter, rank: int | None, on_maps: bool) -> None:
        super().__init__()
        # In a tuple it is not registered here a second time, under a second name.
        self.rule, self.on_maps = (rule,), on_maps
        n = len(rule)
        if width % n or out_width % n:
            raise UserError(
                f"method 'compacter' has {n} products, which must divide its layers' widths {width} and {out_width}"
            )
        rows, columns = width // n, out_width // n
        shapes = [(rows, columns)] if rank is None else [(rows, rank), (rank, columns)]
        self.factors = nn.ParameterList(nn.Parameter(torch.empty(n, *shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.zeros(out_width))
        for factor, shape in zip(self.factors, shapes, strict=True):
            # Glorot-uniform with a gain of sqrt 2, for each of the n matrices.
            bound = math.sqrt(12 / sum(shape))
            nn.init.uniform_(factor, -bound, bound)

    def weight(self) -> Tensor:
        """H transposed: (out, in)."""
        products = torch.einsum("iab,icd->bdac", self.rule[0], reduce(torch.matmul, self.factors))
        return products.flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        return F.conv2d(x, weight[..., None, None], self.bias) if self.on_maps else F.linear(x, weight, self.bias)


@METHODS("compacter")
class Compacter(Method):
    """Adapters whose layers are sums of Kronecker products: of slow A_i, one set for a tower, and fast B_i of low rank.

    `h + U(g(D(h)))` (section 3; adapters/adapter_modeling.py:51-93, adapter_controller.py:110-116) on what a branch
    returns, two per block as in configs/compacter.json: attention and MLP; in a bottleneck of a ResNet, which the paper
    does not treat, the 3x3 convolution after its ReLU, and the branch after its last norm. `placement: ffn` keeps the
    second of the two (the paper's Compacter++). A hidden width of 0 means none in that tower, `rank: null` full rank,
    `shared_rule: false` an A of its own for each layer, `inner_norm` a LayerNorm before D (as eric-ai-lab/PEViT
    evaluation/compacter_model.py:356-520). In the towers with adapters, `norms: all` trains the LayerNorms of blocks
    and the last one (utils/utils.py:101-106, "unfreeze_layer_norms"), `blocks` not the last; BatchNorms stay frozen.

    Other defaults are that configuration's too: n = 4, rank 1, GELU by tanh, 24 hidden channels (T5-base's 768 / 32).
    Initialisation as hypercomplex/layers.py:98-149: Glorot-uniform with gain sqrt 2 for B or its factors, zero biases,
    A normal with deviation 0.01. The configuration gives a shared A 0.0001, which makes the first gradients of B
    thousands of times smaller, so that half precision may lose them.

    Published counts say nothing about places and widths; these are consistent with them, not proved by them. 0.19M on
    CLIP R101: the defaults, 190,992; `{placement: ffn, num_products: 8, shared_rule: false, text_hidden: 64, norms:
    blocks}`, 191,304; `{placement: ffn, rank: null, text_hidden: 8, image_hidden: 8, norms: frozen}`, 193,768. 1.62M on
    DINOv2-B, where the defaults with frozen norms have only 95,744: `{rank: 16, text_hidden: 384, image_hidden: 384,
    norms: frozen}`, 1,622,144; `{placement: ffn, num_products: 2, rank: null, text_hidden: 64, image_hidden: 128,
    inner_norm: true, norms: frozen}`, 1,621,264; `{placement: ffn, num_products: 32, shared_rule: false, text_hidden:
    64, image_hidden: 64, norms: frozen}`, 1,623,552.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        text_hidden: Hidden = 24,
        image_hidden: Hidden = 24,
        placement: Literal["ffn", "both"] = "both",
        num_products: int = 4,
        rank: int | None = 1,
        shared_rule: bool = True,
        inner_norm: bool = False,
        norms: Literal["frozen", "blocks", "all"] = "all",
    ) -> None:
        super().__init__(backbone)
        if num_products < 1 or (rank is not None and rank < 1):
            raise UserError(f"method 'compacter' has {num_products} products of rank {rank}: both must be positive")
        hiddens = {tower: hidden for tower, hidden in (("text", text_hidden), ("image", image_hidden)) if hidden}
        if not hiddens:
            raise UserError("method 'compacter' has no hidden width but 0: one must be positive")
        self.rules = nn.ParameterList()
        for tower, hidden in hiddens.items():
            on_maps = tower == "image" and backbone.image.convolutional
            if on_maps and inner_norm:
                raise UserError("method 'compacter' has inner_norm, a norm of tokens, and this image tower has maps")
            kinds = ("conv", "bottleneck") if on_maps else ("attention", "ffn")
            kinds = kinds if placement == "both" else kinds[1:]
            sites = [site for kind in kinds for site in backbone.sites(kind, (tower,))]
            rules = [new_rule(num_products) for _ in range(1 if shared_rule else 2 * len(sites))]
            self.rules.extend(rules)
            rule = cycle(rules)
            for site in sites:
                channels = hidden_channels(hidden, site)
                layers = [nn.LayerNorm(site.width)] if inner_norm else []
                layers += [PHM(site.width, channels, next(rule), rank, on_maps), nn.GELU("tanh")]
                layers += [PHM(channels, site.width, next(rule), rank, on_maps)]
                site.wrap(partial(Serial, after=Residual(nn.Sequential(*layers))))
        # A ResNet has no LayerNorms to open.
        normed = tuple(tower for tower in hiddens if tower == "text" or not backbone.image.convolutional)
        for site in backbone.sites("norm", normed) if normed and norms != "frozen" else ():
            # The last norm belongs to the head of its tower, the step after the stages.
            if norms == "all" or site.step <= len(site.tower.stages):
                site.open()


def new_rule(n: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(n, n, n), std=0.01))
