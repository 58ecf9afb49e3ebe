"""What a training step keeps for its backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import PAIRS, inputs, tiny_model
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


def step(model: RISModel) -> tuple[dict[str, Tensor], int]:
    """What two steps come to, and the bytes that are kept between forward and backward pass, parameters excluded."""
    images, tokens = inputs(model)
    torch.manual_seed(0)
    for part in (images, images.flip(3)):
        with kept() as tensors:
            logits = model(model.known(part), tokens)
        loss = logits.square().mean()
        loss.backward()
    found = {"loss": loss.detach()} | model.moving_statistics()
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}
    return found, sum(size for place, size in storages.items() if place not in own)


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
    with kept() as others:
        images, tokens = inputs(model)
        model(model.known(images), tokens)
    assert others and not inside


BATCH = {"norm_stats": "batch"}


@pytest.mark.parametrize(
    "pair, options",
    [(pair, {}) for pair in PAIRS] + [(("tiny-clip-rn", "bridger"), BATCH), (("tiny-clip-rn", "full"), BATCH)],
    ids=lambda value: "-".join(value),
)
def test_what_is_recomputed_changes_nothing_and_is_not_kept(pair, options):
    model = tiny_model(*pair, **options).train()
    again = copy.deepcopy(model)
    speed.choose(model, "fast")
    expected, whole = step(model)
    speed.choose(again, "fast", recompute=True)
    found, less = step(again)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    towers = (model.backbone.image, model.backbone.text)
    if any(tower.untouched <= len(tower.stages) for tower in towers):
        assert less < whole
