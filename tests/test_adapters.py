"""What single methods promise beyond the contract of all: where they stand, what they compute, what they refuse."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from conftest import TINY, TINY_HEAD, inputs, tiny_model
from torch.nn import functional as F

from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import Weights
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.loading import Tokenizer
from ris_bench.methods.base import METHODS, Parallel, Serial
from ris_bench.methods.compacter import PHM
from ris_bench.model import RISModel, count_parameters
from ris_bench.records import Choice, Evaluation, Training, Trial


def adapted(backbone_name: str, method_name: str, **options) -> RISModel:
    backbone = BACKBONES[backbone_name](Weights(None))
    method = METHODS[method_name](backbone, **options)
    return RISModel(backbone, method, HEADS["etris"](backbone, **TINY_HEAD)).eval()


def stirred(model: RISModel) -> RISModel:
    """With tuned parameters away from where they start, zero for some."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# CoOp
@pytest.mark.parametrize("backbone_name", TINY)
def test_coop_is_the_placeholder_route_of_the_reference(backbone_name):
    """Tokenise "X X X X red square", replace the embeddings of the placeholders, read at the end of that string."""
    model, frozen = adapted(backbone_name, "coop", num_tokens=4), adapted(backbone_name, "frozen").backbone.text
    context_ME = stirred(model).backbone.text.prompt.after.words_ME
    expressions, vocabulary = ["red square", "the small blue circle on the left", ""], model.backbone.vocab_size
    tokens_BL = Tokenizer(12, vocabulary)(expressions)
    placeholders_BL = Tokenizer(16, vocabulary)(["X X X X " + expression for expression in expressions])

    x_BLE = frozen.token_embedding(placeholders_BL)
    x_BLE[:, 1:5] = context_ME
    state = frozen.stem(placeholders_BL)
    state = state._replace(x_BLE=x_BLE + frozen.positional_embedding[:16])
    for stage in frozen.stages:
        state = stage(state)
    words_BLE, sentence_BE = frozen.head(state)

    images, _ = inputs(model)
    features = model.method(model.backbone, images, tokens_BL)
    assert torch.allclose(features.words_BLE, words_BLE, atol=1e-5)
    assert torch.allclose(features.sentence_BE, sentence_BE, atol=1e-5)
    assert torch.equal(features.pad_BL, placeholders_BL == 0)


def test_coop_that_does_not_fit_the_positions_is_refused_before_anything_runs():
    def trial(num_tokens: int) -> Trial:
        return Trial(
            dataset=Choice(name="refcoco", options={}),
            backbone=Choice(name="tiny-clip-rn", options={}),
            method=Choice(name="coop", options={"num_tokens": num_tokens}),
            head=Choice(name="etris", options=TINY_HEAD),
            train=Training(epochs=1, batch_size=2, lr=1e-3, milestones=(), gamma=0.1, precision="fp32"),
            eval=Evaluation(select_on="val"),
            seed=0,
        )

    assert count_parameters(trial(15)).tunable_backbone == 15 * 64
    with pytest.raises(UserError, match="33 tokens long.* 32 positions"):
        count_parameters(trial(16))


# Compacter
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_phm_is_the_sum_of_kronecker_products(rank):
    rule = torch.nn.Parameter(torch.randn(4, 4, 4))
    layer = PHM(24, 8, rule, rank, on_maps=False)
    torch.nn.init.normal_(layer.bias)
    products = (layer.factors[0] if rank is None else layer.factors[0] @ layer.factors[1]).unbind()
    assert products[0].shape == (6, 2)
    H = sum(torch.kron(a, b) for a, b in zip(rule, products, strict=True))
    x_BNC = torch.randn(2, 5, 24)
    assert torch.allclose(layer(x_BNC), x_BNC @ H + layer.bias, atol=1e-5)
    layer.on_maps = True
    x_BCHW = torch.randn(2, 24, 3, 5)
    expected = (x_BCHW.movedim(1, 3) @ H + layer.bias).movedim(3, 1)
    assert torch.allclose(layer(x_BCHW), expected, atol=1e-5)


def phm_layers(model: RISModel, tower: str) -> list[PHM]:
    return [module for module in getattr(model.backbone, tower).modules() if isinstance(module, PHM)]


@pytest.mark.parametrize("shared", [True, False])
def test_the_rule_is_kept_once(shared, tmp_path):
    model = adapted("tiny-clip-rn", "compacter", shared_rule=shared)
    layers = {tower: phm_layers(model, tower) for tower in ("image", "text")}
    rules = {tower: {id(layer.rule[0]) for layer in found} for tower, found in layers.items()}
    assert {len(found) for found in rules.values()} == {1} if shared else {len(layers["image"]), len(layers["text"])}
    names = [name for name in model.state_dict() if name.startswith("method.rules.")]
    assert len(names) == sum(len(found) for found in rules.values())
    assert {id(p) for p in model.method.rules} == rules["image"] | rules["text"]
    assert set(names) < set(model.tuned_tensors())


def test_a_copy_of_compacter_has_rules_of_its_own():
    model = stirred(adapted("tiny-clip-rn", "compacter"))
    images, tokens = inputs(model)
    other = copy.deepcopy(model)
    before = model(images, tokens)
    assert torch.equal(other(images, tokens), before)
    with torch.no_grad():
        for rule in other.method.rules:
            rule.zero_()
    assert torch.equal(model(images, tokens), before)
    assert not torch.allclose(other(images, tokens), before)


@pytest.mark.parametrize("backbone_name", TINY)
@pytest.mark.parametrize("norms", ["frozen", "blocks", "all"])
def test_compacter_opens_the_named_norms(backbone_name, norms):
    model = adapted(backbone_name, "compacter", norms=norms)
    opened = {name for name, p in model.backbone.named_parameters() if p.requires_grad and ".after." not in name}
    every = [name for name, module in model.backbone.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    blocks = [name for name in every if name.endswith((".norm1", ".norm2"))]
    last = [name for name in every if name in ("text.ln_final", "image.ln_post", "image.vit.norm")]
    assert (len(blocks), len(last)) == ((6, 1) if backbone_name == "tiny-clip-rn" else (18, 2))
    named = {"frozen": [], "blocks": blocks, "all": blocks + last}[norms]
    assert opened == {f"{name}.{kind}" for name in named for kind in ("weight", "bias")}


def test_compacter_on_the_maps_alone_has_no_norms_to_open():
    model = adapted("tiny-clip-rn", "compacter", text_hidden=0)
    assert not any(p.requires_grad for p in model.backbone.text.parameters())
    assert model.count().tunable_backbone > 0


# Conv-Adapter
@pytest.mark.parametrize("design", ["bottleneck", "separable"])
def test_conv_adapter_is_parallel_to_the_convolution(design):
    """Added after the convolution's ReLU, to what average pool and last convolution see."""
    model = stirred(adapted("tiny-clip-rn", "conv-adapter", design=design))
    bottlenecks = [bottleneck for stage in model.backbone.image.stages for bottleneck in stage]
    for conv in (bottleneck.conv for bottleneck in bottlenecks):
        assert isinstance(conv, Parallel)
        convolution, norm, _ = conv.inner
        x_BCHW = torch.randn(1, convolution.in_channels, 4, 4)
        beside = conv.beside(x_BCHW)
        assert beside.abs().max() > 0
        assert torch.allclose(conv(x_BCHW), F.relu(norm(convolution(x_BCHW))) + beside, atol=1e-6)


@pytest.mark.parametrize("design", ["bottleneck", "separable"])
def test_conv_adapter_starts_as_the_identity_everywhere(design):
    frozen = tiny_model("tiny-clip-rn", "frozen").eval().backbone
    model = adapted("tiny-clip-rn", "conv-adapter", design=design, bias=True, text_hidden=8, pool_hidden=8)
    images, tokens = inputs(model)
    features, expected = model.backbone(images, tokens), frozen(images, tokens)
    for a, b in zip((*features.maps_BCHW, *features[1:]), (*expected.maps_BCHW, *expected[1:]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# Adapter
def adapters(tower: torch.nn.Module) -> Counter[str]:
    return Counter(name.split(".")[-1] for name, module in tower.named_modules() if isinstance(module, Serial))


@pytest.mark.parametrize(
    "backbone_name, options, image, text",
    [
        ("tiny-clip-rn", {}, {"expand": 4}, {"ffn": 3}),
        ("tiny-clip-rn", {"placement": "both"}, {"expand": 4}, {"attention": 3, "ffn": 3}),
        ("tiny-clip-rn", {"text_hidden": 0, "pool_hidden": 4}, {"expand": 4, "attnpool": 1}, {}),
        ("tiny-dino", {}, {"ffn": 6}, {"ffn": 3}),
        ("tiny-dino", {"placement": "both", "text_hidden": 0}, {"attention": 6, "ffn": 6}, {}),
    ],
)
def test_adapters_stand_where_the_options_say(backbone_name, options, image, text):
    backbone = adapted(backbone_name, "adapter", **options).backbone
    assert (adapters(backbone.image), adapters(backbone.text)) == (image, text)


@pytest.mark.parametrize(
    "backbone_name, method_name, options, message",
    [
        ("tiny-clip-rn", "adapter", {"text_hidden": 0, "image_hidden": 0}, "must be positive"),
        ("tiny-clip-rn", "adapter", {"text_hidden": -1}, "hidden width of -1"),
        ("tiny-clip-rn", "adapter", {"image_hidden": 0.001}, "that leaves one"),
        ("tiny-clip-rn", "adapter", {"image_hidden": 24.0}, "hidden width of 24.0"),
        ("tiny-clip-vit", "adapter", {"pool_hidden": 4}, "no 'pool' site"),
        ("tiny-clip-rn", "conv-adapter", {"hidden": 0}, "hidden width of 0"),
        ("tiny-clip-rn", "conv-adapter", {"design": "separable", "hidden": 3}, "a divisor"),
        ("tiny-clip-rn", "compacter", {"text_hidden": 0, "image_hidden": 0}, "must be positive"),
        ("tiny-clip-rn", "compacter", {"num_products": 0}, "must be positive"),
        ("tiny-clip-rn", "compacter", {"rank": 0}, "must be positive"),
        ("tiny-clip-rn", "compacter", {"num_products": 5}, "must divide"),
        ("tiny-clip-rn", "compacter", {"image_hidden": 6}, "must divide"),
        ("tiny-clip-rn", "compacter", {"inner_norm": True}, "inner_norm"),
        ("tiny-clip-rn", "coop", {"num_tokens": 0}, "must be positive"),
    ],
)
def test_impossible_options_are_refused(backbone_name, method_name, options, message):
    with pytest.raises(UserError, match=message):
        METHODS[method_name](BACKBONES[backbone_name](None), **options)
