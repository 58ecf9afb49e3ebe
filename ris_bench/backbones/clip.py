"""CLIP (Radford et al., ICML 2021, arXiv:2103.00020) through open_clip, with the image map that RIS needs.

The released RIS code keeps the map of the attention pool and adds a random, frozen branch `connect` beside it
(CRIS model/clip.py:76-78, kept by ETRIS); it is here too, drawn from a fixed seed and saved with every result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, resize_pos_embed
from open_clip.transformer import VisionTransformer
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
from ris_bench.backbones.weights import Weights, fit
from ris_bench.errors import UserError

NUM_STAGES = 3
"""Image and text towers are cut into as many stages, so that a method can pair them."""


class Blocks(nn.Module):
    """Consecutive transformer blocks on tokens (B, N, C)."""

    def __init__(self, blocks: list[nn.Module]) -> None:
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
        length = x_BLE.shape[1]
        # A float mask, as CLIP's own; built for the length at hand, which a method may have changed.
        mask_LL = torch.full((length, length), -torch.inf, device=x_BLE.device).triu(1)
        for block in self.blocks:
            x_BLE = block(x_BLE, attn_mask=mask_LL)
        return state._replace(x_BLE=x_BLE)


def split(blocks: nn.Module, stage: type[Blocks]) -> list[Blocks]:
    """The blocks of a transformer in NUM_STAGES equal stages."""
    blocks = list(blocks)
    size = len(blocks) // NUM_STAGES
    assert size * NUM_STAGES == len(blocks)
    return [stage(blocks[i * size : (i + 1) * size]) for i in range(NUM_STAGES)]


def block_sites(tower: Tower, width: int, qkv: Callable[[nn.Module], tuple[nn.Module, str]]) -> Iterator[Site]:
    """The sites of a tower made of `Blocks`; `qkv(block)` says where the packed projection weight is."""
    depth = 0
    for i, stage in enumerate(tower.stages):
        for block in stage.blocks:
            place: dict[str, Any] = {"tower": tower, "step": i + 1, "depth": depth, "width": width}
            parent, attr = qkv(block)
            for part, kind in enumerate("qkv"):
                yield Site(kind=kind, parent=parent, attr=attr, first_row=part * width, **place)
            yield Site(kind="ffn", parent=block, attr="mlp", **place)
            depth += 1
    yield from tower.stage_sites()


def packed(block: nn.Module) -> tuple[nn.Module, str]:
    return block.attn, "in_proj_weight"


class CLIPText(Tower):
    """Tokens (B, L) -> words (B, L, E) after the last LayerNorm, and the projected end-of-text token (B, D)."""

    def __init__(self, clip: CLIP) -> None:
        width = clip.token_embedding.embedding_dim
        super().__init__(split(clip.transformer.resblocks, CausalBlocks), (width,) * NUM_STAGES)
        self.token_embedding, self.ln_final = clip.token_embedding, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection

    def stem(self, tokens_BL: Tensor) -> TextState:
        x_BLE = self.token_embedding(tokens_BL) + self.positional_embedding[: tokens_BL.shape[1]]
        # Token 0 is CLIP's "!", which the released code takes for padding as well (ETRIS model/segmenter.py:50).
        return TextState(x_BLE, tokens_BL.argmax(dim=1), tokens_BL == 0)

    def head(self, state: TextState) -> tuple[Tensor, Tensor]:
        words_BLE = self.ln_final(state.x_BLE)
        last_BE = words_BLE[torch.arange(len(words_BLE), device=words_BLE.device), state.eot_B]
        return words_BLE, last_BE @ self.text_projection

    def sites(self) -> Iterator[Site]:
        return block_sites(self, self.widths[0], packed)


class MapAttentionPool(nn.Module):
    """The attention pool of CLIP's ResNets without the pooled query: every cell asks (CRIS model/clip.py:60-145).

    (B, C, H, W) -> (B, D, H, W).
    """

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj
        self.positional_embedding, self.num_heads = pool.positional_embedding, pool.num_heads
        width, out_width = pool.c_proj.in_features, pool.c_proj.out_features
        self.connect = seeded(
            lambda: nn.Sequential(nn.Conv2d(width, out_width, 1, bias=False), nn.BatchNorm2d(out_width))
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        x_BNC = x_BCHW.flatten(2).mT + resize_positions(self.positional_embedding[1:], height, width)
        q, k, v = (
            projection(x_BNC).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        pooled_BND = self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return F.relu(pooled_BND.mT.unflatten(2, (height, width)) + self.connect(x_BCHW))


class CLIPResNet(ImageTower):
    """Image (B, 3, H, W) -> C3, C4 and the map of the attention pool, at strides 8, 16, 32."""

    strides = (8, 16, 32)
    convolutional = True

    def __init__(self, visual: nn.Module) -> None:
        width = visual.conv1.out_channels * 2
        stages = [nn.Sequential(visual.layer1, visual.layer2), visual.layer3, visual.layer4]
        super().__init__(stages, (width * 8, width * 16, width * 32))
        self.attnpool = MapAttentionPool(visual.attnpool)
        self.out_channels = (width * 8, width * 16, visual.output_dim)
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "avgpool")
        self.stem_layers = nn.ModuleDict({name: getattr(visual, name) for name in names})

    def stem(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW = image_B3HW
        for layer in self.stem_layers.values():
            x_BCHW = layer(x_BCHW)
        return x_BCHW

    def head(self, x_BCHW: Tensor) -> Tensor:
        return self.attnpool(x_BCHW)

    def to_map(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW

    def add_map(self, x_BCHW: Tensor, delta_BCHW: Tensor) -> Tensor:
        return x_BCHW + delta_BCHW

    def sites(self) -> Iterator[Site]:
        depth = 0
        for i, stage in enumerate(self.stages):
            for bottleneck in (m for m in stage.modules() if hasattr(m, "conv3")):
                width = bottleneck.conv2.out_channels
                yield Site(
                    tower=self, kind="conv", step=i + 1, depth=depth, width=width, parent=bottleneck, attr="conv2"
                )
                depth += 1
        for kind in "qkv":
            projection = getattr(self.attnpool, f"{kind}_proj")
            yield Site(
                tower=self,
                kind=kind,
                step=len(self.stages) + 1,
                depth=0,
                width=projection.out_features,
                parent=projection,
                attr="weight",
            )
        yield from self.stage_sites()


class CLIPViT(ImageTower):
    """Image -> maps at the patch's stride: tokens after each third of the blocks, the last normalised and projected."""

    convolutional = False

    def __init__(self, visual: nn.Module) -> None:
        width = visual.conv1.out_channels
        super().__init__(split(visual.transformer.resblocks, Blocks), (width,) * NUM_STAGES)
        self.strides = (visual.patch_size[0],) * NUM_STAGES
        self.out_channels = (width, width, visual.output_dim)
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

    def to_map(self, x_BNC: Tensor) -> Tensor:
        side = round((x_BNC.shape[1] - 1) ** 0.5)
        return x_BNC[:, 1:].mT.unflatten(2, (side, side))

    def add_map(self, x_BNC: Tensor, delta_BCHW: Tensor) -> Tensor:
        return x_BNC + F.pad(delta_BCHW.flatten(2).mT, (0, 0, 1, 0))

    def sites(self) -> Iterator[Site]:
        return block_sites(self, self.widths[0], packed)


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
        # A ResNet's attention pool resizes its positions in every forward pass instead.
        resize_pos_embed(state, clip)
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
    check_patches(image_size, 16)
    clip = openai_clip("ViT-B-16", image_size)
    if weights is not None:
        load_clip(clip, *weights.load("clip-vit-b16"))
    return transformer(clip, image_size)


def check_patches(image_size: int, patch: int) -> None:
    if image_size % patch:
        raise UserError(f"image_size is {image_size}; it must be a multiple of the backbone's patch of {patch} pixels")
