"""DINOv2 with registers (Oquab et al., arXiv:2304.07193; Darcet et al., arXiv:2309.16588) beside CLIP's text tower.

The image tower never saw language: this is the pair that DETRIS (AAAI 2025) calls misaligned.
"""

from __future__ import annotations

from collections.abc import Iterator

import timm
from open_clip.model import CLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ris_bench.backbones.base import BACKBONES, Backbone, ImageTower, Site
from ris_bench.backbones.clip import CLIPText, check_patches, load_clip, openai_clip
from ris_bench.backbones.transformer import NUM_STAGES, Attention, Block, Blocks, block_sites, split
from ris_bench.backbones.weights import Weights, fit


def blocks(vit: VisionTransformer) -> list[Block]:
    """The blocks of a timm transformer."""
    return [
        Block(
            block.norm1,
            Attention(block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj, block.attn.num_heads),
            block.ls1,
            block.norm2,
            (block.mlp.fc1, block.mlp.act, block.mlp.fc2),
            block.ls2,
        )
        for block in vit.blocks
    ]


class DINOv2(ImageTower):
    """Image (B, 3, H, W) -> maps at the patch's stride: tokens after each third of the blocks, the last normalised."""

    convolutional = False

    def __init__(self, vit: VisionTransformer) -> None:
        width = vit.embed_dim
        super().__init__(split(blocks(vit), Blocks), (width,) * NUM_STAGES)
        self.strides = (vit.patch_embed.patch_size[0],) * NUM_STAGES
        self.out_channels = (width,) * NUM_STAGES
        self.num_prefix_tokens = vit.num_prefix_tokens
        # The library lays out class, register and position tokens; its blocks live in the stages.
        vit.blocks = nn.Sequential()
        self.vit = vit

    def stem(self, image_B3HW: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(image_B3HW)))

    def head(self, x_BNC: Tensor) -> Tensor:
        return self.to_map(self.vit.norm(x_BNC))

    def to_map(self, x_BNC: Tensor) -> Tensor:
        side = round((x_BNC.shape[1] - self.num_prefix_tokens) ** 0.5)
        return x_BNC[:, self.num_prefix_tokens :].mT.unflatten(2, (side, side))

    def add_map(self, x_BNC: Tensor, delta_BCHW: Tensor) -> Tensor:
        return x_BNC + F.pad(delta_BCHW.flatten(2).mT, (0, 0, self.num_prefix_tokens, 0))

    def sites(self) -> Iterator[Site]:
        yield from block_sites(self, (self.vit, "norm"))


def pair(vit: VisionTransformer, clip: CLIP, image_size: int) -> Backbone:
    """The image tower of one model beside the text tower of another."""
    check_patches(image_size, vit.patch_embed.patch_size[0])
    return Backbone(
        DINOv2(vit),
        CLIPText(clip),
        image_size=image_size,
        vocab_size=clip.vocab_size,
        sentence_width=clip.text_projection.shape[1],
    )


def dinov2(name: str, kind: str, weights: Weights | None, image_size: int) -> Backbone:
    # Built at its native 518 pixels, so that the position grid is the pretrained one and is resized to each input.
    vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    clip = openai_clip("ViT-B-16")
    if weights is not None:
        state, file = weights.load(kind)
        fit(vit, state, file=file)
        load_clip(clip, *weights.load("clip-vit-b16"))
    return pair(vit, clip, image_size)


@BACKBONES("dinov2-b")
def dinov2_b(weights: Weights | None, *, image_size: int = 448) -> Backbone:
    return dinov2("vit_base_patch14_reg4_dinov2", "dinov2-b", weights, image_size)


@BACKBONES("dinov2-l")
def dinov2_l(weights: Weights | None, *, image_size: int = 448) -> Backbone:
    return dinov2("vit_large_patch14_reg4_dinov2", "dinov2-l", weights, image_size)
