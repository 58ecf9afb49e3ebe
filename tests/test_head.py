"""The decoder without each of its modules, as in the paper's ablation, and with the residual connection of DETRIS."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY_HEAD, inputs

from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel

ABLATION = [(name, layers) for name in ("etris", "etris-without-ha") for layers in (1, 0)]


def built(head: str, layers: int = 1) -> RISModel:
    backbone = BACKBONES["tiny-clip-rn"](Weights(None))
    method = METHODS["frozen"](backbone)
    torch.manual_seed(0)
    return RISModel(backbone, method, HEADS[head](backbone, **TINY_HEAD | {"layers": layers})).eval()


def parts(head: str, layers: int = 1) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in built(head, layers).head.state_dict()}


def test_each_module_can_be_left_out():
    whole = parts("etris")
    assert whole - parts("etris-without-ha") == {"hierarchical_alignment.sentence", "hierarchical_alignment.attention"}
    assert whole - parts("etris", 0) == {"global_alignment.layers", "global_alignment.norm"}
    with pytest.raises(UserError, match="-1 layers"):
        built("etris", -1)


@torch.no_grad()
def test_without_hierarchical_alignment_the_map_does_not_depend_on_the_sentence():
    maps = [torch.randn(2, channels, side, side) for channels, side in ((64, 16), (128, 8), (64, 4))]
    for head, depends in (("etris", True), ("etris-without-ha", False)):
        fuse = built(head).head.hierarchical_alignment
        one, other = (fuse(maps, torch.randn(2, 64)) for _ in range(2))
        assert one.shape == (2, 16, 8, 8)
        assert torch.equal(one, other) != depends


@torch.no_grad()
def test_without_global_alignment_the_projector_receives_the_fused_map():
    model = built("etris", 0)
    features = model.method(model.backbone, *inputs(model))
    fused = model.head.hierarchical_alignment(features.maps_BCHW, features.sentence_BE)
    assert torch.equal(model.head(features), model.head.projector(fused, features.sentence_BE))


@torch.no_grad()
@pytest.mark.parametrize("head, layers", ABLATION)
def test_every_row_of_the_ablation_answers_the_expression(head, layers):
    model = built(head, layers)
    images, tokens = inputs(model, batch=2)
    one, other = model(images, tokens), model(images, tokens.flip(0))
    assert one.shape == (2, 1, 32, 32)
    assert not torch.allclose(one, other)


@torch.no_grad()
def test_the_head_of_detris_adds_what_enters_its_last_convolutions():
    heads = {name: built(name).head for name in ("etris", "detris")}
    assert heads["detris"].state_dict().keys() == heads["etris"].state_dict().keys()
    aligned = {name: head.hierarchical_alignment for name, head in heads.items()}
    fused = []
    aligned["etris"].aggregate.register_forward_hook(lambda module, given, result: fused.append(result))
    maps = [torch.randn(2, channels, side, side) for channels, side in ((64, 16), (128, 8), (64, 4))]
    sentence = torch.randn(2, 64)
    torch.testing.assert_close(aligned["detris"](maps, sentence), aligned["etris"](maps, sentence) + fused[0])
