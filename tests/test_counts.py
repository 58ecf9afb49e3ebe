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
        # ETRIS main table: 1.68M and 1.39M, which need these widths.
        ("clip-r50", "bridger", {"width": 56}, 1_678_104),
        ("clip-vit-b16", "bridger", {"width": 128}, 1_387_648),
        ("clip-vit-b16", "bridger", {}, 598_592),
        # DETRIS table "Comparison with other PET methods using DINOv2": 1.38M.
        ("dinov2-b", "bridger", {"width": 128}, 1_387_648),
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
