"""Compiled, a model computes what it computes without, each block in one piece."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from conftest import inputs, tiny_model, trained
from torch import nn
from torch._dynamo.utils import counters

from ris_bench import speed
from ris_bench.errors import UserError
from ris_bench.predict import load
from ris_bench.results import Store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def passes(model: nn.Module, part: nn.Module, *given: torch.Tensor) -> list[torch.Tensor]:
    """What comes out of a part, in training and in evaluation, and the gradients."""
    model.train()
    torch.manual_seed(0)
    out = part(*given)
    out.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.eval()
    with torch.inference_mode():
        return [out.detach(), *gradients, part(*given)]


def by(backend: str, monkeypatch) -> None:
    """Without the last part of the way, which makes machine code."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))


def block_of(backbone: str, method: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the first block of its image tower."""
    model = tiny_model(backbone, method)
    stage = model.backbone.image.stages[0]
    return model, stage[0] if backbone == "tiny-clip-rn" else stage.blocks[0]


@pytest.mark.parametrize(
    "backbone, method, shape", [("tiny-clip-rn", "conv-adapter", (2, 8, 32, 32)), ("tiny-dino", "lora", (2, 69, 64))]
)
def test_a_block_is_in_one_piece_and_chosen_anew(backbone, method, shape, monkeypatch):
    model, block = block_of(backbone, method)
    x = torch.randn(shape)
    with monkeypatch.context() as patch:
        by("eager", patch)
        speed.choose(block, "compiled")
    found = passes(model, block, x)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    before = dict(counters["stats"])
    speed.choose(block, "fast")
    same(passes(model, block, x), found)
    assert counters["stats"] == before


def test_a_model_agrees_with_itself_compiled(monkeypatch):
    by("aot_eager", monkeypatch)
    model = tiny_model("tiny-clip-vit", "bridger", head={"dropout": 0.0})
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    given = inputs(model)
    results = {}
    for way in ("fast", "compiled"):
        statistics = {name: tensor.clone() for name, tensor in model.moving_statistics().items()}
        speed.choose(model, way)
        results[way] = [*passes(model, model, *given), *(t.clone() for t in model.moving_statistics().values())]
        for name, tensor in model.moving_statistics().items():
            tensor.copy_(statistics[name])
    assert counters["stats"]["unique_graphs"] > 2 and not counters["graph_break"]
    same(results["fast"], results["compiled"])


@pytest.mark.compile
def test_machine_code_agrees():
    if why := speed.missing_compiler(CPU):
        pytest.skip(why)
    model, block = block_of("tiny-dino", "lora")
    x = torch.randn(2, 69, 64)
    found = {}
    for way in ("fast", "compiled"):
        speed.choose(block, way)
        found[way] = passes(model, block, x)
    same(found["fast"], found["compiled"])


def same(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_without_a_compiler_a_model_is_not_loaded_to_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "missing_compiler", lambda device: "no compiler")
    store = Store(tmp_path)
    _, result = trained(store, "tiny-clip-vit", "frozen")
    with pytest.raises(UserError, match="nothing can be compiled here .no compiler."):
        load(store.folder(result.trial), way="compiled")
