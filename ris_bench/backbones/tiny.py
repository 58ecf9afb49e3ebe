"""The same towers at small widths with shipped weights: the quickstart and the tests run on these.

`python -m ris_bench.pretrain` made the weights, on generated scenes that no experiment sees.
"""

from __future__ import annotations

from open_clip.model import CLIP
from timm.models.vision_transformer import VisionTransformer

from ris_bench.backbones.base import BACKBONES, Backbone, NormStats
from ris_bench.backbones.clip import load_clip, residual, transformer
from ris_bench.backbones.dinov2 import pair
from ris_bench.backbones.weights import Weights, fit

TEXT = {"context_length": 32, "vocab_size": 8192, "width": 64, "heads": 4, "layers": 3}
"""The vocabulary is the first 8192 - 514 merges of CLIP's byte-pair encoding: 0.5 of 3.2 million embedding weights."""


def tiny_rn() -> CLIP:
    vision = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 32, "image_size": 128}
    return CLIP(embed_dim=64, vision_cfg=vision, text_cfg=dict(TEXT))


def tiny_vit(image_size: int = 64) -> CLIP:
    vision = {"layers": 6, "width": 64, "head_width": 16, "patch_size": 8, "image_size": image_size}
    return CLIP(embed_dim=64, vision_cfg=vision, text_cfg=dict(TEXT))


def tiny_dino_vit() -> VisionTransformer:
    return VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=64,
        depth=6,
        num_heads=4,
        reg_tokens=4,
        no_embed_class=True,
        init_values=1.0,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )


@BACKBONES("tiny-clip-rn")
def tiny_clip_rn(weights: Weights | None, *, image_size: int = 128, norm_stats: NormStats = "frozen") -> Backbone:
    clip = tiny_rn()
    if weights is not None:
        load_clip(clip, *weights.load("tiny-clip-rn"))
    return residual(clip, image_size, norm_stats)


@BACKBONES("tiny-clip-vit")
def tiny_clip_vit(weights: Weights | None, *, image_size: int = 64) -> Backbone:
    clip = tiny_vit(image_size)
    if weights is not None:
        load_clip(clip, *weights.load("tiny-clip-vit"))
    return transformer(clip, image_size)


@BACKBONES("tiny-dino")
def tiny_dino(weights: Weights | None, *, image_size: int = 64) -> Backbone:
    vit, clip = tiny_dino_vit(), tiny_vit()
    if weights is not None:
        state, file = weights.load("tiny-dino")
        fit(vit, state, file=file)
        load_clip(clip, *weights.load("tiny-clip-vit"))
    return pair(vit, clip, image_size)
