"""Promises that every method keeps on every tiny backbone: a new method is tested by being there."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import IMPOSSIBLE, PAIRS, TINY, inputs, tiny_model

from ris_bench.backbones.base import Known
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Method
from ris_bench.training import segmentation_loss


def methods_on(backbone: str) -> list[str]:
    """The methods that a backbone has a place for."""
    return [method for name, method in PAIRS if name == backbone]


def step(model, seed: int = 0) -> None:
    """One optimizer step; gradients are kept."""
    images, tokens = inputs(model, seed=seed)
    masks = (torch.rand(len(images), 1, *images.shape[2:], generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.zero_grad()
    segmentation_loss(model(images, tokens), masks, dice=0.5).backward()
    optimizer.step()


def test_logits_are_four_times_as_fine_as_the_middle_stage(model):
    """A quarter of the input where that has stride 16, as in every full-size CLIP."""
    images, tokens = inputs(model)
    side = 4 * images.shape[2] // model.backbone.image.strides[1]
    assert model(images, tokens).shape == (len(images), 1, side, side)


def test_frozen_tensors_and_statistics_do_not_move(model):
    tuned = {name for name, p in model.named_parameters() if p.requires_grad} | set(model.moving_statistics())
    before = copy.deepcopy(model.state_dict())
    model.train()
    step(model)
    step(model, seed=1)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= tuned
    assert changed, "nothing was trained"


def test_every_tuned_tensor_gets_a_gradient(model):
    model.train()
    # After one step, because LoRA's A has none at the first: it is multiplied by B, which is zero.
    step(model)
    step(model, seed=1)
    # Rows of an embedding table that no token asked for are zero; the tensor as a whole must not be.
    dead = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0) and not re.search(UNUSED, name)
    ]
    assert dead == []


UNUSED = "|".join(
    [
        r"attnpool\.k_proj\.bias$",  # softmax does not see what is added to every key
        r"\.convs\.branches\..*\.0\.bias$",  # of DETRIS: the batch norm behind takes every constant away
    ]
)


@pytest.mark.parametrize("backbone", TINY)
def test_identity_at_the_start(backbone):
    reference = tiny_model(backbone, "frozen").eval()
    images, tokens = inputs(reference)
    with torch.inference_mode():
        expected = reference(images, tokens)
        for name in (name for name in methods_on(backbone) if METHODS[name].identity_at_start):
            assert torch.allclose(tiny_model(backbone, name).eval()(images, tokens), expected, atol=1e-5), name


@pytest.mark.parametrize("backbone", TINY)
def test_every_method_meets_the_same_head(backbone):
    heads = [tiny_model(backbone, name).head.state_dict() for name in methods_on(backbone)]
    for head in heads[1:]:
        assert all(torch.equal(head[key], heads[0][key]) for key in head)


@pytest.mark.parametrize("backbone", TINY)
def test_no_two_names_tune_the_same_parameters(backbone):
    signatures = {}
    for name in methods_on(backbone):
        model = tiny_model(backbone, name)
        tuned = {(n, p.shape) for n, p in model.named_parameters() if p.requires_grad}
        signatures[name] = frozenset(tuned)
    assert len(set(signatures.values())) == len(signatures)


def test_counts_are_the_sum_of_numel(model):
    params = model.count()
    parts = {"backbone": 0, "method": 0, "head": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts[name.split(".")[0]] += p.numel()
    assert params.tunable_backbone == parts["backbone"] + parts["method"]
    assert params.tunable_head == parts["head"] > 0
    assert params.total == sum(p.numel() for p in model.parameters())


def test_save_and_load_give_the_same_logits(model, backbone_name, method_name, tmp_path):
    model.train()
    step(model)
    model.eval()
    images, tokens = inputs(model, seed=3)
    model.save_tuned(tmp_path / "tuned.safetensors")
    other = tiny_model(backbone_name, method_name, seed=5).eval()
    other.load_tuned(tmp_path / "tuned.safetensors")
    with torch.inference_mode():
        assert torch.equal(other(images, tokens), model(images, tokens))


def test_only_what_was_tuned_is_saved(backbone_name, method_name):
    model = tiny_model(backbone_name, method_name)
    saved = sum(t.numel() for t in model.tuned_tensors().values())
    everything = sum(t.numel() for t in model.state_dict().values())
    assert saved < everything / 2 or method_name == "full"


def test_tuned_tensors_of_another_model_are_refused(tmp_path):
    tiny_model("tiny-clip-rn", "lora").save_tuned(tmp_path / "tuned.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        tiny_model("tiny-clip-rn", "bridger").load_tuned(tmp_path / "tuned.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "tuned.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        tiny_model("tiny-clip-rn", "lora").load_tuned(tmp_path / "torn.safetensors")


ODD = {"tiny-clip-rn": 96, "tiny-clip-vit": 72, "tiny-dino": 72}
"""Image sizes of which the coarsest map is a square of odd side, as it is at 416 on a ResNet."""


@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
def test_a_batch_is_its_samples_in_evaluation(backbone_name, method_name, odd):
    model = tiny_model(backbone_name, method_name, **({"image_size": ODD[backbone_name]} if odd else {})).eval()
    images, tokens = inputs(model)
    with torch.inference_mode():
        together = model(images, tokens)
        order = torch.tensor([2, 0, 1])
        assert torch.allclose(model(images[order], tokens[order]), together[order], atol=1e-4)
        alone = torch.cat([model(images[i : i + 1], tokens[i : i + 1]) for i in range(len(images))])
    assert torch.allclose(alone, together, atol=1e-4)


def test_untouched_steps_are_untouched(model):
    """What a tower computes up to `untouched` does not depend on tuned parameters or on the other tower."""
    images, tokens = inputs(model)
    for tower, given in ((model.backbone.image, images), (model.backbone.text, tokens)):
        steps = [tower.stem, *tower.stages, tower.head]
        owned = []
        if tower.untouched:
            # What comes out of an untouched step carries no gradient.
            state = given
            for run in steps[: tower.untouched]:
                state = run(state)
                owned += [t for t in (state if isinstance(state, tuple) else (state,)) if t.is_floating_point()]
        assert all(not t.requires_grad for t in owned)
        if tower.untouched < len(steps) and type(model.method).forward is Method.forward:
            state = given
            for run in steps:
                state = run(state)
            last = state if isinstance(state, torch.Tensor) else state[0]
            assert last.requires_grad


@pytest.mark.parametrize("method", methods_on("tiny-clip-rn"))
def test_norm_statistics_are_a_choice(method):
    for norm_stats in ("frozen", "batch"):
        model = tiny_model("tiny-clip-rn", method, norm_stats=norm_stats).train()
        name = "backbone.image.stem_layers.bn1.running_mean"
        before = model.state_dict()[name].clone()
        step(model)
        assert torch.equal(before, model.state_dict()[name]) == (norm_stats == "frozen")
        assert (name in model.tuned_tensors()) == (norm_stats == "batch")
        assert (model.count().moving_statistics > 0) == (norm_stats == "batch")
        if norm_stats == "batch":
            assert model.backbone.image.untouched == 0


@pytest.mark.parametrize("backbone", TINY)
def test_features_of_the_frozen_backbone_do_not_depend_on_the_seed(backbone):
    images, tokens = inputs(tiny_model(backbone, "frozen"))
    first, second = (tiny_model(backbone, "frozen", seed=seed).eval() for seed in (0, 1))
    with torch.inference_mode():
        maps = [model.backbone(images, tokens).maps_BCHW for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))


@pytest.mark.parametrize(
    "backbone, size, unit",
    [("tiny-clip-rn", 80, 32), ("tiny-clip-vit", 70, 8), ("tiny-dino", 70, 8), ("tiny-dino", 0, 8)],
)
def test_image_sizes_that_no_grid_fits_are_refused(backbone, size, unit):
    with pytest.raises(UserError, match=f"image_size is {size}; it must be a multiple of {unit}"):
        tiny_model(backbone, "frozen", image_size=size)


@pytest.mark.parametrize("backbone, method", sorted(IMPOSSIBLE))
def test_impossible_pairs_are_refused(backbone, method):
    with pytest.raises(UserError, match="has no .* site"):
        tiny_model(backbone, method)


def test_lora_changes_query_and_value_only():
    frozen, lora = tiny_model("tiny-clip-vit", "frozen"), tiny_model("tiny-clip-vit", "lora")
    lora.train()
    step(lora)
    for tower in ("image", "text"):
        for a, b in zip(getattr(frozen.backbone, tower).stages, getattr(lora.backbone, tower).stages, strict=True):
            for one, other in zip(a.blocks, b.blocks, strict=True):
                one, other = (dict(block.attention.named_children()) for block in (one, other))
                changed = {name for name in one if not torch.equal(one[name].weight, other[name].weight)}
                assert changed == {"q", "v"}


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("bridger", {"stages": (2, 0)}, "stages"),
        ("bridger", {"stages": (3,)}, "stages"),
        ("bridger", {"stages": ()}, "stages"),
        ("bridger", {"width": 30}, "heads"),
        ("lora", {"text_rank": 0, "image_rank": 0}, "positive"),
        ("lora", {"text_rank": -1}, "positive"),
    ],
)
def test_impossible_options_are_refused(method, options, message):
    from ris_bench.backbones.base import BACKBONES

    with pytest.raises(UserError, match=message):
        METHODS[method](BACKBONES["tiny-clip-rn"](None), **options)


def test_what_is_known_of_an_image_serves_all_its_expressions(model):
    images, tokens = inputs(model)
    rows = torch.tensor([1, 0, 1])
    model.eval()
    known = model.known(images[:2])
    assert isinstance(known, Known) == (model.backbone.image.untouched > 0)
    with torch.inference_mode():
        assert torch.allclose(model(known[rows], tokens), model(images[rows], tokens), atol=1e-5)
    model.double().train()
    images, gradients = images.double(), []
    for given in (images[rows], model.known(images[:2])[rows]):
        torch.manual_seed(0)
        model.zero_grad()
        model(given, tokens).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for live, shared in zip(*gradients, strict=True):
        assert torch.allclose(live, shared, rtol=1e-6, atol=1e-9 * max(1, live.abs().max().item()))
