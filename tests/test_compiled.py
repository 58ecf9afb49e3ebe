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


@pytest.mark.parametrize(
    "backbone, method, shape", [("tiny-clip-rn", "conv-adapter", (2, 8, 32, 32)), ("tiny-dino", "lora", (2, 69, 64))]
)
def test_a_block_is_in_one_piece_and_chosen_anew(backbone, method, shape, monkeypatch):
    """Without the last part of the way, which makes machine code."""
    model = tiny_model(backbone, method)
    stage = model.backbone.image.stages[0]
    block = stage[0] if backbone == "tiny-clip-rn" else stage.blocks[0]
    x = torch.randn(shape)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        speed.choose(block, "compiled")
    found = passes(model, block, x)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
    before = dict(counters["stats"])
    speed.choose(block, "fast")
    for one, other in zip(found, passes(model, block, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert counters["stats"] == before


@pytest.mark.compile
def test_a_compiled_model_agrees():
    if why := speed.missing_compiler(CPU):
        pytest.skip(why)
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
    for fast, compiled in zip(results["fast"], results["compiled"], strict=True):
        torch.testing.assert_close(compiled, fast, rtol=1e-3, atol=1e-4 * fast.abs().max().item())


def test_without_a_compiler_a_model_is_not_loaded_to_be_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "missing_compiler", lambda device: "no compiler")
    store = Store(tmp_path)
    _, result = trained(store, "tiny-clip-vit", "frozen")
    with pytest.raises(UserError, match="nothing can be compiled here .no compiler."):
        load(store.folder(result.trial), way="compiled")
