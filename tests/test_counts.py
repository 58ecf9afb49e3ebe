"""The papers' parameter counts, to the integer, on the meta device."""

from __future__ import annotations

import pytest
import torch

from ris_bench.backbones.base import BACKBONES
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel

MIXED = {
    "image_layers": tuple(range(1, 24)),
    "image_width": 384,
    "text_layers": tuple(range(1, 12)),
    "text_width": 384,
}

VISUAL_ADAPTER = {"text_hidden": 0, "image_hidden": 1 / 32, "pool_hidden": 16, "bias": False}
SEPARABLE = {"design": "separable", "hidden": 1 / 8, "bias": True}
RULE_PER_LAYER = {"placement": "ffn", "shared_rule": False, "text_hidden": 64, "norms": "frozen"}
FULL_RANK = {"placement": "ffn", "rank": None, "norms": "frozen"}
INNER_NORM = FULL_RANK | {"inner_norm": True}
RANK_16 = {"rank": 16, "text_hidden": 384, "image_hidden": 384, "norms": "frozen"}


def built(backbone: str, method: str, options: dict | None = None) -> RISModel:
    with torch.device("meta"):
        body = BACKBONES[backbone](None)
        return RISModel(body, METHODS[method](body, **(options or {})), HEADS["etris"](body))


@pytest.mark.parametrize(
    "backbone, method, options, expected",
    [
        # ETRIS table "Comparison with previous PET methods using ResNet101": 120.74M with CLIP's logit_scale, which no
        # segmentation model uses; 0.00M; 0.03M; 1.94M.
        ("clip-r101", "full", {}, 120_737_633 - 1),
        ("clip-r101", "frozen", {}, 0),
        ("clip-r101", "lora", {}, 32_768),
        ("clip-r101", "bridger", {}, 1_942_080),
        # The same table: 2.39M, 1.20M, 0.19M, 4.10K. The papers say neither places nor widths: the defaults and these
        # alternatives are consistent with what they print.
        ("clip-r101", "adapter", {}, 2_387_224),
        ("clip-r101", "adapter", {"text_hidden": 32, "placement": "both"}, 2_393_368),
        ("clip-r101", "adapter", VISUAL_ADAPTER, 2_387_968),
        ("clip-r101", "conv-adapter", {}, 1_204_080),
        ("clip-r101", "conv-adapter", {"hidden": 24, "bias": True, "text_hidden": 64}, 1_200_328),
        ("clip-r101", "conv-adapter", SEPARABLE | {"text_hidden": 32}, 1_198_648),
        ("clip-r101", "compacter", {}, 190_992),
        ("clip-r101", "compacter", {"text_hidden": 16, "image_hidden": 16}, 188_832),
        ("clip-r101", "compacter", {"text_hidden": 32, "image_hidden": 32}, 193_152),
        ("clip-r101", "compacter", RULE_PER_LAYER | {"num_products": 8, "norms": "blocks"}, 191_304),
        ("clip-r101", "compacter", FULL_RANK | {"text_hidden": 8, "image_hidden": 8}, 193_768),
        ("clip-r101", "coop", {}, 4_096),
        # Near misses: what else the code of these methods offers.
        ("clip-r101", "conv-adapter", SEPARABLE, 386_872),
        ("clip-r101", "conv-adapter", SEPARABLE | {"hidden": 0.25}, 684_336),
        ("clip-r101", "conv-adapter", SEPARABLE | {"hidden": 0.5}, 1_279_264),
        ("clip-r101", "conv-adapter", SEPARABLE | {"pool_hidden": 256}, 1_043_512),
        ("clip-r101", "compacter", {"norms": "frozen"}, 165_392),
        ("clip-r101", "coop", {"num_tokens": 4}, 2_048),
        ("clip-r101", "coop", {"num_tokens": 16}, 8_192),
        # ETRIS main table: 1.68M and 1.39M, which need these widths.
        ("clip-r50", "bridger", {"width": 56}, 1_678_104),
        ("clip-vit-b16", "bridger", {"width": 128}, 1_387_648),
        ("clip-vit-b16", "bridger", {}, 598_592),
        # DETRIS table "Comparison with other PET methods using DINOv2": 1.38M.
        ("dinov2-b", "bridger", {"width": 128}, 1_387_648),
        # The same table: 1.98M, 1.62M, with near misses.
        ("dinov2-b", "adapter", {}, 1_982_976),
        ("dinov2-b", "adapter", {"text_hidden": 40, "image_hidden": 80}, 1_982_880),
        ("dinov2-b", "adapter", {"text_hidden": 32, "image_hidden": 32, "placement": "both"}, 1_998_336),
        ("dinov2-b", "compacter", RANK_16, 1_622_144),
        ("dinov2-b", "compacter", RANK_16 | {"num_products": 2}, 1_622_032),
        ("dinov2-b", "compacter", RANK_16 | {"num_products": 8}, 1_623_040),
        ("dinov2-b", "compacter", INNER_NORM | {"num_products": 2, "text_hidden": 64, "image_hidden": 128}, 1_621_264),
        ("dinov2-b", "compacter", INNER_NORM | {"text_hidden": 128, "image_hidden": 256}, 1_623_680),
        ("dinov2-b", "compacter", RULE_PER_LAYER | {"num_products": 32, "image_hidden": 64}, 1_623_552),
        ("dinov2-b", "compacter", {"norms": "frozen"}, 95_744),
        # The same table: 2.71M, with half the adapters 1.36M, and its two modules; DETRIS-L; DETRIS-L on mixed data.
        ("dinov2-b", "detris", {}, 2_715_696),
        ("dinov2-b", "detris", {"image_layers": (1, 5, 9), "text_layers": (1, 5, 9)}, 1_357_848),
        ("dinov2-b", "detris", {"text_layers": ()}, 6 * 382_896),
        ("dinov2-b", "detris", {"image_layers": ()}, 6 * 69_720),
        ("dinov2-l", "detris", {}, 3_110_448),
        ("dinov2-l", "detris", MIXED, 33_331_360),
        # ETRIS table "Effect of Bridger's number and position".
        ("clip-r101", "bridger", {"stages": (0,)}, 428_736),
        ("clip-r101", "bridger", {"stages": (1,)}, 297_664),
        ("clip-r101", "bridger", {"stages": (2,)}, 1_215_168),
        ("clip-r101", "bridger", {"stages": (0, 1)}, 726_656),
        ("clip-r101", "bridger", {"stages": (1, 2)}, 1_513_088),
    ],
)
def test_tuned_in_the_backbone(backbone, method, options, expected):
    assert built(backbone, method, options).count().tunable_backbone == expected


@pytest.mark.parametrize(
    "backbone, options, image, parts",
    [
        # What the papers take for the size of a backbone, such as 57.31M for CRIS R101; `connect` is not in OpenAI's.
        (
            "clip-r50",
            {},
            40_416_096,
            {"image.attnpool": 16_888_832, "image.attnpool.connect": 2_099_200, "text.text_projection": 524_288},
        ),
        (
            "clip-r101",
            {},
            57_309_536,
            {
                "image.attnpool": 14_790_144,
                "image.attnpool.connect": 1_049_600,
                "image.attnpool.positional_embedding": 102_400,
                "text.token_embedding": 25_296_896,
                "text.positional_embedding": 39_424,
                "text.stages": 37_828_608,
                "text.ln_final": 1_024,
                "text.text_projection": 262_144,
            },
        ),
        ("clip-vit-b16", {"image_size": 224}, 86_192_640, {"image.positional_embedding": 151_296}),
        ("clip-vit-b16", {"image_size": 416}, 86_192_640 + 368_640, {"image.positional_embedding": 519_936}),
        # Without mask_token and the position of the class token, which the released models have.
        ("dinov2-b", {}, 86_583_552 - 2 * 768, {"text": 63_428_097 - 1}),
        ("dinov2-l", {}, 304_372_736 - 2 * 1024, {"text": 63_428_097 - 1}),
    ],
)
def test_towers(backbone, options, image, parts):
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in BACKBONES[backbone](None, **options).named_parameters()}
    for part, expected in {"image": image, **parts}.items():
        assert sum(n for name, n in sizes.items() if name == part or name.startswith(f"{part}.")) == expected, part


@pytest.mark.parametrize(
    "backbone, expected, without_sentence",
    [
        ("clip-r101", 24_244_225, 23_981_569),  # printed as 23.98M for every backbone
        ("clip-vit-b16", 22_671_361, 22_408_705),
        ("clip-r50", 26_735_105, 26_210_305),
        ("dinov2-b", 22_802_433, 22_539_777),
        ("dinov2-l", 23_195_649, 22_932_993),
    ],
)
def test_head(backbone, expected, without_sentence):
    model = built(backbone, "frozen")
    assert model.count().tunable_head == expected
    sentence = sum(p.numel() for p in model.head.hierarchical_alignment.sentence.parameters())
    assert expected - sentence == without_sentence


def test_parts_of_the_head():
    parts = built("clip-r101", "frozen").head.named_children()
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts} == {
        "hierarchical_alignment": 11_556_352,
        "global_alignment": 7_899_136,
        "projector": 4_788_737,
    }


@pytest.mark.parametrize(
    "head, options, without",
    [
        ("detris", {}, 0),
        ("etris", {"layers": 0}, 7_899_136),  # global alignment
        ("etris-without-ha", {}, 262_656 + 3 * 1_050_624),  # the sentence's layer, and its attentions with the maps
    ],
)
def test_head_without_a_module(head, options, without):
    with torch.device("meta"):
        module = HEADS[head](BACKBONES["clip-r101"](None), **options)
    assert sum(p.numel() for p in module.parameters()) == 24_244_225 - without
