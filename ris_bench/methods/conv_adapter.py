"""Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", arXiv:2208.07463.

CVPR 2024 Workshop on Prompting in Vision.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ris_bench.backbones.base import Backbone
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Hidden, Method, Parallel, Residual, Serial, bottleneck, hidden_channels


@METHODS("conv-adapter")
class ConvAdapter(Method):
    """A small stack of convolutions beside the 3x3 convolution of every bottleneck of a ResNet ("Conv. Parallel").

    It sees what that convolution sees and is added after its norm and ReLU, before average pool and last convolution
    (Hhhhhhao/Conv-Adapter models/backbones/resnet_clip.py:90-117). `design`:

    - "bottleneck": 1x1, ReLU, 3x3 per channel, 1x1; the `ConvAdapterDesign1` of models/tuning_modules/
      conv_adapter.py:47-86 without its norms, its last ReLU and, by default, its biases.
    - "separable": the paper's `alpha * W_pw f(W_dw h)` (section 3): 3x3 in as many groups as there are hidden channels,
      ReLU, 1x1, a learned factor per channel. It is the released `ConvAdapter` (:89-126) with `{hidden: 0.125, bias:
      true}`; a hidden width must divide the convolution's.

    The paper ends with the image. `text_hidden` gives the text tower what is akin: in "bottleneck" the adapter of
    Houlsby et al. after every MLP, but with ReLU; in "separable" the released `LinearAdapter` (:129-147) beside every
    attention and MLP. `pool_hidden` (released: 256) puts such a module beside the attention pool too, where it sees
    cells before their positions are added and comes after the pool's ReLU. A hidden width of 0 means none there.

    Initialisation: Kaiming normal by fan-out and zero biases as released (resnet_clip.py:217-222), but zero for the
    last layer. Started at random, the released module changes features by several times their own size from step 0.

    The published count (1.20M, CLIP R101) says nothing about places and widths; these are consistent with it, not
    proved by it: the defaults, 1,204,080; `{hidden: 24, bias: true, text_hidden: 64}`, 1,200,328; `{design: separable,
    hidden: 0.125, bias: true, text_hidden: 32}`, 1,198,648. The released modules alone have 386,872, or 1,043,512 with
    the pool's.
    """

    identity_at_start = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        design: Literal["bottleneck", "separable"] = "bottleneck",
        hidden: Hidden = 0.25,
        bias: bool = False,
        text_hidden: Hidden = 0,
        pool_hidden: Hidden = 0,
    ) -> None:
        super().__init__(backbone)
        separable = design == "separable"
        convolutions = grouped_first if separable else pointwise_first
        for site in backbone.sites("conv", ("image",)):
            layers = convolutions(site.width, hidden_channels(hidden, site), bias)
            site.wrap(partial(Parallel, beside=initialised(layers)))
        for site in backbone.sites("pool", ("image",)) if pool_hidden else ():
            width, channels = backbone.image.widths[-1], hidden_channels(pool_hidden, site)
            layers = pointwise(width, channels, site.width, bias, on_maps=True, scaled=separable)
            site.wrap(partial(Parallel, beside=initialised(layers)))
        kinds = ("attention", "ffn") if separable else ("ffn",)
        for site in (site for kind in kinds if text_hidden for site in backbone.sites(kind, ("text",))):
            channels = hidden_channels(text_hidden, site)
            layers = initialised(pointwise(site.width, channels, site.width, bias, on_maps=False, scaled=separable))
            site.wrap(partial(Parallel, beside=layers) if separable else partial(Serial, after=Residual(layers)))


def pointwise_first(width: int, hidden: int, bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias),
        nn.Conv2d(hidden, width, 1, bias=bias),
    )


def grouped_first(width: int, hidden: int, bias: bool) -> nn.Sequential:
    if width % hidden:
        raise UserError(
            f"method 'conv-adapter' has {hidden} hidden channels beside a convolution of {width}: the design "
            "'separable' needs a divisor"
        )
    return nn.Sequential(
        nn.Conv2d(width, hidden, 3, padding=1, groups=hidden, bias=bias),
        nn.ReLU(),
        nn.Conv2d(hidden, width, 1, bias=bias),
        Scale((width, 1, 1)),
    )


def pointwise(width: int, hidden: int, out_width: int, bias: bool, *, on_maps: bool, scaled: bool) -> nn.Sequential:
    layers = bottleneck(width, hidden, out_width, nn.ReLU(), on_maps=on_maps, bias=bias)
    return layers.append(Scale((out_width, 1, 1) if on_maps else (out_width,))) if scaled else layers


class Scale(nn.Module):
    """A learned factor per channel, 1 at the start."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x


def initialised(layers: nn.Sequential) -> nn.Sequential:
    weighted = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in weighted:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(weighted[-1].weight)
    return layers
