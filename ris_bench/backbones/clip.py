"""CLIP (Radford et al., ICML 2021, arXiv:2103.00020) through open_clip, with the image map that RIS needs.

The released RIS code keeps the map of the attention pool and adds a random, frozen branch `connect` beside it
(CRIS model/clip.py:76-78, kept by ETRIS); it is here too, drawn from a fixed seed and saved with every result.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import open_clip
import torch
from open_clip.model import CLIP, resize_pos_embed
from open_clip.transformer import Transformer, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.base import (
    BACKBONES,
    Backbone,
    ImageTower,
    NormStats,
    Site,
    TextState,
    Tower,
    resize_positions,
    seeded,
)
from ris_bench.backbones.transformer import (
    NUM_STAGES,
    Attention,
    Block,
    CausalBlocks,
    TokenTower,
    block_sites,
    layer_site,
    split,
)
from ris_bench.backbones.weights import Weights, fit
from ris_bench.errors import UserError
from ris_bench.speed import Kept, Layers, Precise, Region


def blocks(transformer: Transformer) -> list[Block]:
    """The blocks of an open_clip transformer."""
    return [
        Block(
            block.ln_1,
            Attention(block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj, block.attn.num_heads),
            block.ls_1,
            block.ln_2,
            tuple(block.mlp),
            block.ls_2,
        )
        for block in transformer.resblocks
    ]


class CLIPText(Tower, Precise):
    """Tokens (B, L) -> words (B, L, E) after the last LayerNorm, and the projected end-of-text token (B, D)."""

    def __init__(self, clip: CLIP) -> None:
        width = clip.token_embedding.embedding_dim
        super().__init__(split(blocks(clip.transformer), CausalBlocks), (width,) * NUM_STAGES)
        self.prompt = nn.Identity()
        self.token_embedding, self.ln_final = clip.token_embedding, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection

    def stem(self, tokens_BL: Tensor) -> TextState:
        # Token 0 is CLIP's "!", which the released code takes for padding as well (ETRIS model/segmenter.py:50).
        state = TextState(self.token_embedding(tokens_BL), tokens_BL.argmax(dim=1), tokens_BL == 0)
        state = self.prompt(state)
        length, positions = state.x_BLE.shape[1], len(self.positional_embedding)
        if length > positions:
            raise UserError(
                f"sentences are {length} tokens long, those of the method included, and the text tower has {positions} "
                "positions; use a method that adds fewer tokens"
            )
        return state._replace(x_BLE=state.x_BLE + self.positional_embedding[:length])

    def head(self, state: TextState) -> tuple[Tensor, Tensor]:
        words_BLE = self.ln_final(state.x_BLE)
        last_BE = words_BLE[torch.arange(len(words_BLE), device=words_BLE.device), state.eot_B]
        return words_BLE, last_BE @ self.text_projection

    def sites(self) -> Iterator[Site]:
        yield Site(tower=self, kind="prompt", step=0, depth=0, width=self.widths[0], parent=self, attr="prompt")
        yield from block_sites(self, (self, "ln_final"))


class MapAttentionPool(Region):
    """The attention pool of CLIP's ResNets without the pooled query: every cell asks (CRIS model/clip.py:60-145).

    (B, C, H, W) -> (B, D, H, W).
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj
        self.positional_embedding, self.num_heads = pool.positional_embedding, pool.num_heads
        width, out_width = pool.c_proj.in_features, pool.c_proj.out_features
        self.connect = seeded(lambda: Layers(nn.Conv2d(width, out_width, 1, bias=False), nn.BatchNorm2d(out_width)))
        self._positions = Kept()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        positions_NC = self._positions(
            lambda: resize_positions(self.positional_embedding[1:], height, width),
            self.positional_embedding,
            given=(height, width),
        )
        x_BNC = x_BCHW.flatten(2).mT + positions_NC
        q, k, v = (
            projection(x_BNC).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        pooled_BND = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return F.relu(pooled_BND.mT.unflatten(2, (height, width)) + self.connect(x_BCHW))


class Bottleneck(Region):
    """The bottleneck of an open_clip ResNet, with what belongs together in one module."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.reduce = Layers(block.conv1, block.bn1, block.act1)
        self.conv = Layers(block.conv2, block.bn2, block.act2)
        self.avgpool = block.avgpool
        self.expand = Layers(block.conv3, block.bn3)
        self.shortcut = Layers(OrderedDict(block.downsample.named_children())) if block.downsample else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu_(self.expand(self.avgpool(self.conv(self.reduce(x_BCHW)))) + self.shortcut(x_BCHW))


class CLIPResNet(ImageTower):
    """Image (B, 3, H, W) -> C3, C4 and the map of the attention pool, at strides 8, 16, 32."""

    strides = (8, 16, 32)
    convolutional = True

    def __init__(self, visual: nn.Module) -> None:
        width = visual.conv1.out_channels * 2
        layers = ([*visual.layer1, *visual.layer2], visual.layer3, visual.layer4)
        stages = [nn.Sequential(*(Bottleneck(block) for block in layer)) for layer in layers]
        super().__init__(stages, (width * 8, width * 16, width * 32))
        self.attnpool = MapAttentionPool(visual.attnpool)
        self.out_channels = (width * 8, width * 16, visual.output_dim)
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "avgpool")
        self.stem_layers = Layers(OrderedDict((name, getattr(visual, name)) for name in names))

    def stem(self, image_B3HW: Tensor) -> Tensor:
        return self.stem_layers(image_B3HW)

    def head(self, x_BCHW: Tensor) -> Tensor:
        return self.attnpool(x_BCHW)

    def to_map(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def add_map(self, x_BCHW: Tensor, delta_BCHW: Tensor) -> Tensor:
        return x_BCHW + delta_BCHW

    def sites(self) -> Iterator[Site]:
        depth = 0
        for i, stage in enumerate(self.stages):
            for bottleneck in stage:
                at = {"tower": self, "step": i + 1, "depth": depth}
                kernel = layer_site("kernel", bottleneck.conv, "0", **at)
                yield kernel
                yield Site(kind="conv", parent=bottleneck, attr="conv", width=kernel.width, **at)
                yield Site(kind="bottleneck", parent=bottleneck, attr="expand", width=4 * kernel.width, **at)
                depth += 1
        at = {"tower": self, "step": len(self.stages) + 1, "depth": 0}
        for kind, attr in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "c_proj")):
            yield layer_site(kind, self.attnpool, attr, **at)
        yield Site(kind="pool", parent=self, attr="attnpool", width=self.out_channels[-1], **at)
        yield from self.stage_sites()


class CLIPViT(TokenTower):
    """Image -> maps at the patch's stride: tokens after each third of the blocks, the last normalised and projected."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__(blocks(visual.transformer), visual.patch_size[0], num_prefix_tokens=1)
        self.out_channels = (*self.widths[:-1], visual.output_dim)
        self.conv1, self.ln_pre, self.ln_post = visual.conv1, visual.ln_pre, visual.ln_post
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding
        self.proj = visual.proj

    def stem(self, image_B3HW: Tensor) -> Tensor:
        patches_BCHW = self.conv1(image_B3HW)
        class_B1C = self.class_embedding.expand(len(image_B3HW), 1, -1)
        x_BNC = torch.cat([class_B1C, patches_BCHW.flatten(2).mT], dim=1)
        return self.ln_pre(x_BNC + self.positional_embedding)

    def head(self, x_BNC: Tensor) -> Tensor:
        return self.to_map(self.ln_post(x_BNC) @ self.proj)

    def sites(self) -> Iterator[Site]:
        yield from block_sites(self, (self, "ln_post"))


def openai_clip(name: str, image_size: int | None = None) -> CLIP:
    """A CLIP of OpenAI's without its weights; they were trained with QuickGELU, as open_clip's configuration says."""
    config = copy.deepcopy(open_clip.get_model_config(f"{name}-quickgelu"))
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    return CLIP(**config)


def load_clip(clip: CLIP, state: Mapping[str, Tensor], file: str) -> None:
    """Fill the model with weights at any size of the position grid."""
    state = dict(state)
    if isinstance(clip.visual, VisionTransformer):
        # As ETRIS model/clip.py:514; a ResNet's attention pool resizes its positions in every forward pass instead.
        resize_pos_embed(state, clip, antialias=False)
    fit(clip, state, file=file)


def residual(clip: CLIP, image_size: int, norm_stats: NormStats) -> Backbone:
    """The towers of a CLIP with a ResNet."""
    return Backbone(
        CLIPResNet(clip.visual),
        CLIPText(clip),
        image_size=image_size,
        vocab_size=clip.vocab_size,
        sentence_width=clip.text_projection.shape[1],
        norm_stats=norm_stats,
        not_pretrained=("image.attnpool.connect.",),
    )


def transformer(clip: CLIP, image_size: int) -> Backbone:
    """The towers of a CLIP with a ViT."""
    return Backbone(
        CLIPViT(clip.visual),
        CLIPText(clip),
        image_size=image_size,
        vocab_size=clip.vocab_size,
        sentence_width=clip.text_projection.shape[1],
    )


@BACKBONES("clip-r50")
def clip_r50(weights: Weights | None, *, image_size: int = 416, norm_stats: NormStats = "frozen") -> Backbone:
    clip = openai_clip("RN50")
    if weights is not None:
        load_clip(clip, *weights.load("clip-r50"))
    return residual(clip, image_size, norm_stats)


@BACKBONES("clip-r101")
def clip_r101(weights: Weights | None, *, image_size: int = 416, norm_stats: NormStats = "frozen") -> Backbone:
    clip = openai_clip("RN101")
    if weights is not None:
        load_clip(clip, *weights.load("clip-r101"))
    return residual(clip, image_size, norm_stats)


@BACKBONES("clip-vit-b16")
def clip_vit_b16(weights: Weights | None, *, image_size: int = 416) -> Backbone:
    clip = openai_clip("ViT-B-16", image_size)
    if weights is not None:
        load_clip(clip, *weights.load("clip-vit-b16"))
    return transformer(clip, image_size)
