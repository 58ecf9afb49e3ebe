"""DINOv2 with registers (Oquab et al., arXiv:2304.07193; Darcet et al., arXiv:2309.16588) beside CLIP's text tower.

The image tower never saw language: this is the pair that DETRIS (AAAI 2025) calls misaligned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import timm
import torch
from open_clip.model import CLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ris_bench.backbones.base import BACKBONES, Backbone, Site, resize_positions
from ris_bench.backbones.clip import CLIPText, load_clip, openai_clip
from ris_bench.backbones.transformer import Attention, Block, TokenTower, block_sites
from ris_bench.backbones.weights import Weights, fit
from ris_bench.errors import UserError
from ris_bench.speed import Kept, TwoWays


class WrittenOutAttention(Attention, TwoWays):
    """As DETRIS has it where there is no xformers (model/dinov2/layers/attention.py:56-69)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask_NN: Tensor | None) -> Tensor:
        if self.fast:
            return super().attend(q, k, v, mask_NN)
        assert mask_NN is None
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def blocks(vit: VisionTransformer) -> list[Block]:
    """The blocks of a timm transformer."""
    return [
        Block(
            block.norm1,
            WrittenOutAttention(block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj, block.attn.num_heads),
            block.ls1,
            block.norm2,
            (block.mlp.fc1, block.mlp.act, block.mlp.fc2),
            block.ls2,
        )
        for block in vit.blocks
    ]


class DINOv2(TokenTower):
    """Image (B, 3, H, W) -> maps at the patch's stride: tokens after each stage, the last normalised.

    All but the last stage end after so many blocks as `ends` says (default: equal). Positions are resized as DETRIS
    does (model/dinov2/models/vision_transformer.py:186-218): with an offset of 0.1 cells and without antialiasing.
    Meta's own models with registers, and timm, have it the other way round.
    """

    def __init__(self, vit: VisionTransformer, ends: Sequence[int] = ()) -> None:
        super().__init__(blocks(vit), vit.patch_embed.patch_size[0], vit.num_prefix_tokens, ends)
        self.out_channels = self.widths
        # The blocks live in the stages.
        vit.blocks = nn.Sequential()
        self.vit = vit
        self._positions = Kept()

    def stem(self, image_B3HW: Tensor) -> Tensor:
        vit = self.vit
        patches_BHWC = vit.patch_embed(image_B3HW)
        grid = tuple(patches_BHWC.shape[1:3])
        positions_NC = self._positions(
            lambda: resize_positions(vit.pos_embed[0], *grid, offset=0.1), vit.pos_embed, given=grid
        )
        prefix_1PC = torch.cat([vit.cls_token, vit.reg_token], dim=1)
        patches_BNC = patches_BHWC.flatten(1, 2) + positions_NC
        return torch.cat([prefix_1PC.expand(len(image_B3HW), -1, -1), patches_BNC], dim=1)

    def head(self, x_BNC: Tensor) -> Tensor:
        return self.to_map(self.vit.norm(x_BNC))

    def sites(self) -> Iterator[Site]:
        yield from block_sites(self, (self.vit, "norm"))


def pair(vit: VisionTransformer, clip: CLIP, image_size: int, stage_ends: Sequence[int] = ()) -> Backbone:
    """The image tower of one model beside the text tower of another."""
    return Backbone(
        DINOv2(vit, stage_ends),
        CLIPText(clip),
        image_size=image_size,
        vocab_size=clip.vocab_size,
        sentence_width=clip.text_projection.shape[1],
    )


def dinov2(name: str, kind: str, weights: Weights | None, image_size: int, stage_ends: tuple[int, int]) -> Backbone:
    # Built at its native 518 pixels, so that the position grid is the pretrained one and is resized to each input.
    vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    depth = len(vit.blocks)
    if not 0 < stage_ends[0] < stage_ends[1] < depth:
        raise UserError(
            f"backbone {kind!r} has stage_ends {list(stage_ends)}: give two numbers of its {depth} blocks in order, "
            f"as [{depth // 3}, {2 * depth // 3}] for thirds"
        )
    clip = openai_clip("ViT-B-16")
    if weights is not None:
        state, file = weights.load(kind)
        fit(vit, state, file=file)
        load_clip(clip, *weights.load("clip-vit-b16"))
    return pair(vit, clip, image_size, stage_ends)


# The first two stages end where DETRIS takes its features, after blocks 4 and 8 (8 and 16) as its configurations count,
# from 0 (`output_dinov2`; model/fusion.py:91-94). ETRIS cuts a transformer into thirds: [4, 8] and [8, 16] here.


@BACKBONES("dinov2-b")
def dinov2_b(weights: Weights | None, *, image_size: int = 448, stage_ends: tuple[int, int] = (5, 9)) -> Backbone:
    return dinov2("vit_base_patch14_reg4_dinov2", "dinov2-b", weights, image_size, stage_ends)


@BACKBONES("dinov2-l")
def dinov2_l(weights: Weights | None, *, image_size: int = 448, stage_ends: tuple[int, int] = (9, 17)) -> Backbone:
    return dinov2("vit_large_patch14_reg4_dinov2", "dinov2-l", weights, image_size, stage_ends)
