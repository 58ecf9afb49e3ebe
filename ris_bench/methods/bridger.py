"""Xu et al., "Bridging Vision and Language Encoders" (ETRIS), ICCV 2023. arXiv:2307.11545.

A Bridger lets the two frozen towers exchange features at the end of a stage: both are brought to a small width and one
grid, attend to each other, and are added back.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ris_bench.attention import MultiheadAttention
from ris_bench.backbones.base import Backbone, Features, Known
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method
from ris_bench.speed import Layers


class FullInteractor(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer (ETRIS model/layers.py `Interactor`)."""

    def __init__(self, width: int, heads: int, ffn: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(width, heads, dropout)
        self.cross_attention = MultiheadAttention(width, heads, dropout)
        self.ffn = Layers(nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BNC: Tensor, other_BMC: Tensor) -> Tensor:
        seen = self.self_attention(x_BNC, x_BNC, x_BNC)
        x_BNC = self.norms[0](x_BNC + self.dropout(seen))
        seen = self.cross_attention(x_BNC, other_BMC, other_BMC)
        x_BNC = self.norms[1](x_BNC + self.dropout(seen))
        return self.norms[2](x_BNC + self.dropout(self.ffn(x_BNC)))


class MultiplicativeInteractor(nn.Module):
    """Cross-attention whose result multiplies the query (ETRIS model/layers.py `InteractorT`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = MultiheadAttention(width, heads)

    def forward(self, x_BNC: Tensor, other_BMC: Tensor) -> Tensor:
        return x_BNC * self.attention(x_BNC, other_BMC, other_BMC)


class Bridge(nn.Module):
    """One exchange: a map (B, C, H, W) and words (B, L, E) -> what is added to each, and what the next Bridge receives.

    The common grid has `step` times fewer cells a side than the map, or `step` times more if the map is `coarse`.
    """

    def __init__(
        self, channels: int, word_width: int, width: int, heads: int, step: int, coarse: bool, full: bool, follows: bool
    ) -> None:
        super().__init__()
        zoom_in, zoom_out = (nn.ConvTranspose2d, nn.Conv2d) if coarse else (nn.Conv2d, nn.ConvTranspose2d)
        self.zoom_in = Layers(zoom_in(channels, width, step, step, bias=False))
        self.zoom_out = Layers(zoom_out(width, channels, step, step, bias=False))
        if not full:
            # The released ViT Bridger normalises and rectifies both ways, the ResNet's neither (model/bridger.py).
            self.zoom_in.extend([nn.BatchNorm2d(width), nn.ReLU()])
            self.zoom_out.extend([nn.BatchNorm2d(channels), nn.ReLU()])
        self.word_in, self.word_out = nn.Linear(word_width, width), nn.Linear(width, word_width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) if follows else None
        interactor = FullInteractor if full else MultiplicativeInteractor
        self.to_image, self.to_text = interactor(width, heads), interactor(width, heads)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, map_BCHW: Tensor, words_BLE: Tensor, last: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        zoomed = self.zoom_in(map_BCHW)
        v_BNC, t_BLC = zoomed.flatten(2).mT, self.word_in(words_BLE)
        if self.norms is not None:
            v_BNC, t_BLC = self.norms[0](v_BNC + last[0]), self.norms[1](t_BLC + last[1])
        v_out, t_out = self.to_image(v_BNC, t_BLC), self.to_text(t_BLC, v_BNC)
        delta_BCHW = self.zoom_out(v_out.mT.unflatten(2, zoomed.shape[-2:]))
        return delta_BCHW, self.word_out(t_out), (v_BNC, t_BLC)


@METHODS("bridger")
class Bridger(Method):
    """Bridges after the chosen stages, both towers in step.

    Defaults are the released configuration for ResNets (config/refcoco/bridge_r101.yaml; 1,942,080 parameters); that
    for ViTs has 8 heads, and the paper's counts need width 56 for R50 and 128 for ViT-B/16. `interactor: released`
    means full attention for convolutional towers and the multiplicative one for ViTs, as the released code has it.
    Initialisation as in model/bridger.py:64-72; a Bridge is not the identity at the start. A map must divide into the
    common grid, that of the middle stage: image sizes that are odd multiples of the coarsest stride do.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        width: int = 64,
        heads: int = 4,
        stages: tuple[int, ...] = (0, 1, 2),
        interactor: Literal["released", "full", "multiplicative"] = "released",
    ) -> None:
        super().__init__(backbone)
        image, text = (backbone.sites("stage", (tower,)) for tower in ("image", "text"))
        if not stages or sorted(set(stages)) != list(stages) or not 0 <= stages[0] <= stages[-1] < len(image):
            raise UserError(
                f"method 'bridger' has stages {list(stages)}; give some of {list(range(len(image)))} in order"
            )
        if width % heads:
            raise UserError(f"method 'bridger' has width {width}, which its {heads} heads do not divide")
        full = backbone.image.convolutional if interactor == "released" else interactor == "full"
        strides = backbone.image.strides
        self.bridges = nn.ModuleDict()
        for i in stages:
            image[i].touch()
            text[i].touch()
            step = max(strides[i], strides[1]) // min(strides[i], strides[1])
            self.bridges[str(i)] = Bridge(
                image[i].width, text[i].width, width, heads, step, coarse=i == 2, full=full, follows=i != stages[0]
            )

    def forward(self, backbone: Backbone, image: Tensor | Known, tokens_BL: Tensor) -> Features:
        tower, text = backbone.image, backbone.text
        x, y = tower.step(0, image), text.stem(tokens_BL)
        maps: list[Tensor] = []
        last: tuple[Tensor, Tensor] | None = None
        for i, text_stage in enumerate(text.stages):
            x, y = tower.step(i + 1, x), text_stage(y)
            if str(i) in self.bridges:
                delta_BCHW, delta_BLE, last = self.bridges[str(i)](tower.to_map(x), y.x_BLE, last)
                x, y = tower.add_map(x, delta_BCHW), y._replace(x_BLE=y.x_BLE + delta_BLE)
            maps.append(tower.map_of(x))
        return Features((*maps[:-1], tower.step(len(maps) + 1, x)), *text.head(y), y.pad_BL)
