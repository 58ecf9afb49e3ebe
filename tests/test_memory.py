"""What a training step keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import inputs
from torch import Tensor

from ris_bench import speed
from ris_bench.model import RISModel


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps of what is computed meanwhile."""
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def step(model: RISModel) -> tuple[Tensor, list[Tensor]]:
    """A forward and a backward pass as in training: the loss, and what was kept between the two."""
    images, tokens = inputs(model)
    torch.manual_seed(0)
    with kept() as tensors:
        logits = model(model.known(images), tokens)
    loss = logits.square().mean()
    loss.backward()
    return loss.detach(), tensors


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_nothing_is_kept_of_steps_that_depend_on_nothing_tuned(model, way):
    model.train()
    speed.choose(model, way)
    inside: list[Tensor] = []

    def watch(call: Callable) -> Callable:
        def watched(*args):
            with kept() as tensors:
                found = call(*args)
            inside.extend(tensors)
            return found

        return watched

    for tower in (model.backbone.image, model.backbone.text):
        steps = [(tower, "stem"), *((stage, "forward") for stage in tower.stages), (tower, "head")]
        for owner, name in steps[: tower.untouched]:
            setattr(owner, name, watch(getattr(owner, name)))
    _, others = step(model)
    assert others and not inside
