"""The fast way computes what the plain way does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import inputs, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ris_bench import evaluation, speed
from ris_bench.attention import MultiheadAttention
from ris_bench.backbones.base import BACKBONES
from ris_bench.data.dataset import DATASETS
from ris_bench.head import HEADS
from ris_bench.loading import Batch, ReferentBatches, Tokenizer
from ris_bench.methods.base import METHODS, Method
from ris_bench.model import Encoded, RISModel
from ris_bench.records import Training
from ris_bench.speed import Layers, doubled_convolution
from ris_bench.training import Loop, train

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 2), (7, 6), (9, 13)])
def test_a_convolution_of_a_doubled_map(height, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), weight, padding=1)
    fast = doubled_convolution(x, weight)
    torch.testing.assert_close(fast, plain)
    with torch.no_grad():
        torch.testing.assert_close(doubled_convolution(x, weight), plain)
    seen = torch.randn(plain.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad((y * seen).sum(), (x, weight)) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)


def outcome(model, way: speed.Speed, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients in one vector."""
    images, tokens = inputs(model, batch)
    speed.choose(model, way)
    model.zero_grad()
    torch.manual_seed(0)
    to = next(model.head.parameters()).dtype
    logits = model(model.known(images.to(to)), tokens)
    seen = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * seen.to(to)).mean().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, in standard deviations of what is expected."""
    return ((found.double() - expected).abs().max() / expected.std()).item()


def test_fast_and_plain_agree(model):
    """In evaluation mode: against float64 the fast way errs at most 1.5 times as much as the plain way, or by what
    are a tiny model's last bits; and no pixel flips."""
    unsettle(model)
    model.eval()
    exact = copy.deepcopy(model).double()
    expected, expected_gradients = outcome(exact, "plain")
    (fast, fast_gradients), (plain, plain_gradients) = (outcome(model, way) for way in ("fast", "plain"))
    assert off(fast, expected) <= max(1.5 * off(plain, expected), 5e-5)
    wrong = [
        (g.double() - expected_gradients).norm() / expected_gradients.norm() for g in (fast_gradients, plain_gradients)
    ]
    assert wrong[0] <= max(1.5 * wrong[1], 1e-5)
    assert torch.equal(fast > 0, plain > 0)

    # As an evaluation does it: without gradients, and what no sentence has a part in once per image.
    images, tokens = inputs(model)
    speed.choose(model, "fast")
    rows = torch.tensor([0, 1, 2])
    with torch.inference_mode():
        shared = model.known(images)
        assert isinstance(shared, Encoded) == (type(model.method).forward is Method.forward)
        for known in (shared[rows], images):
            assert off(model(known, tokens), expected) <= max(1.5 * off(plain, expected), 5e-5)


class Asked(TorchDispatchMode):
    """Which operations of oneDNN's with packed weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "pointwise" in str(function):
            self.names.add(str(function).split(".")[1])
        return function(*args, **kwargs or {})


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here")
@pytest.mark.parametrize("backbone", ["tiny-clip-rn", "tiny-dino"])
def test_an_evaluation_asks_onednn(backbone):
    """But not for a text tower, nor where a gradient is wanted, in another precision, or the plain way."""
    model = tiny_model(backbone, "bridger").eval()
    images, tokens = inputs(model)

    def asked(run) -> set[str]:
        with Asked() as those:
            run()
        return those.names

    def logits() -> torch.Tensor:
        return model(images, tokens)

    speed.choose(model, "fast")
    assert asked(logits) == set()
    with torch.no_grad():
        assert asked(logits) == {"_linear_pointwise", "_convolution_pointwise"}
        assert asked(lambda: model.backbone.encode_text(tokens)) == set()
        with torch.autocast("cpu", torch.bfloat16):
            assert asked(logits) == set()
        speed.choose(model, "plain")
        assert asked(logits) == set()


def test_what_is_made_of_weights_is_made_anew_after_a_step(model):
    torch.manual_seed(0)
    model.eval()
    images, tokens = inputs(model)
    masks, rows = torch.rand(3, 1, *images.shape[2:]).round(), torch.arange(3)
    training = Training(epochs=1, batch_size=3, lr=0.01, milestones=(), gamma=0.1, precision="fp32")
    loop = Loop(model, training, torch.device("cpu"))

    def logits(way: speed.Speed) -> torch.Tensor:
        speed.choose(model, way)
        with torch.inference_mode():
            return model(images, tokens)

    before = logits("fast")
    loop.step(Batch(images, rows, tokens, masks, rows, 3))
    after = logits("fast")
    assert off(after, before) > 0.01
    torch.testing.assert_close(after, logits("plain"), rtol=1e-3, atol=1e-3)


def unsettle(model) -> None:
    """Norms with statistics and parameters of their own, as after a training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in model.backbone.fixed_norms:
                for tensor in (module.running_mean, module.bias):
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
                for tensor in (module.running_var, module.weight):
                    tensor *= 0.5 + torch.rand(tensor.shape, generator=generator)


@pytest.mark.parametrize("backbone, method", [("tiny-clip-rn", "bridger"), ("tiny-dino", "detris")])
def test_both_draw_the_same_dropout(backbone, method):
    model = tiny_model(backbone, method).double().train()
    (fast, fast_gradients), (plain, plain_gradients) = (outcome(model, way) for way in ("fast", "plain"))
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(fast_gradients, plain_gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(6, 8, 1, bias=False),
        nn.ConvTranspose2d(6, 8, 2, 2, bias=False),
        nn.ConvTranspose2d(6, 8, 3, 2, padding=1, output_padding=1),
        nn.ConvTranspose2d(6, 8, 2, 2, groups=2),
        nn.Conv1d(6, 8, 5, padding=2),
    ],
    ids=str,
)
def test_a_norm_goes_into_the_convolution_before_it(layer):
    one_d = isinstance(layer, nn.Conv1d)
    norm = (nn.BatchNorm1d if one_d else nn.BatchNorm2d)(8, eps=1e-3)
    layers = Layers(layer, norm, nn.ReLU()).double()
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 6, 9, dtype=torch.float64) if one_d else torch.randn(2, 6, 5, 7, dtype=torch.float64)
    norm.requires_grad_(False)
    norm.eval()
    for _ in range(2):  # made, and found
        torch.testing.assert_close(layers(x), nn.Sequential.forward(layers, x))
    # The weight is trained although the norm is not.
    for run in (layers, lambda x: nn.Sequential.forward(layers, x)):
        layer.weight.grad, kept = None, layer.weight.grad
        run(x).square().sum().backward()
    torch.testing.assert_close(kept, layer.weight.grad)
    # Statistics of the batch cannot be folded.
    norm.train()
    torch.testing.assert_close(layers(x), nn.Sequential.forward(layers, x))
    assert norm.num_batches_tracked == 2


@torch.no_grad()
def test_what_was_folded_is_forgotten_when_it_changes():
    layers = Layers(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(1, 3, 2, 2)

    def check() -> None:
        torch.testing.assert_close(layers(x), nn.Sequential.forward(layers, x))

    check()
    layers[0].weight += 1
    check()
    layers[1].running_mean += 1
    check()
    layers[1].bias = nn.Parameter(torch.randn(4))
    check()
    layers.load_state_dict({name: 2 * tensor for name, tensor in layers.state_dict().items()})
    check()
    layers[0].weight.data = torch.randn(4, 3, 1, 1)
    check()
    layers[0].weight.data.mul_(3)  # not counted, but no evaluation begins without this
    layers.eval()
    check()
    layers.double()
    x = x.double()
    check()
    heard = []
    layers[0].register_forward_hook(lambda *given: heard.append(given))
    check()
    assert len(heard) == 2


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), None], ids=repr)
@pytest.mark.parametrize("product", ["linear", "convolution"])
def test_an_activation_goes_into_the_product_before_it(product, activation):
    """Unless somebody listens to what is between the two, or it is one that oneDNN does not know."""
    torch.manual_seed(0)
    if product == "linear":
        layers, x = [nn.Linear(5, 8), activation, nn.Linear(8, 3, bias=False)], torch.randn(2, 7, 5)
    else:
        layers, x = [nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), activation], torch.randn(2, 5, 6, 4)
    layers = Layers(*(layer for layer in layers if layer is not None)).eval()
    expected = nn.Sequential.forward(layers, x)
    speed.choose(layers, "fast")
    heard = []
    for _ in range(2):  # made, and found
        torch.testing.assert_close(layers(x), expected)
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, seen: heard.append(layer))
    torch.testing.assert_close(layers(x), expected)
    assert heard == list(layers)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2, 0)])
def test_a_convolution_of_any_padding(padding):
    layers = Layers(nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 4)
    torch.testing.assert_close(layers(x), nn.Sequential.forward(layers, x))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 5)])
def test_a_linear_layer_of_any_input(shape):
    layers = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 1, bias=False)])
    speed.choose(layers, "fast")
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 10)[..., ::2], torch.randn(5, *shape[:-1]).movedim(0, -1)):
        for layer in layers:
            with torch.no_grad():
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
            assert layer(x).requires_grad


@pytest.mark.parametrize("words", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("word_width", [None, 24])
def test_attention_is_that_of_pytorch(words, word_width):
    torch.manual_seed(0)
    attention = MultiheadAttention(32, 4, 0.3, word_width).double().eval()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    query, key, value = (
        torch.randn(3, number, width, dtype=torch.float64, requires_grad=True)
        for number, width in ((9, 32), (words, word_width or 32), (words, word_width or 32))
    )
    pad = torch.arange(words) >= torch.tensor([[words], [1], [2]])
    for mask in (None, pad):
        found = {}
        for way in ("fast", "plain"):
            speed.choose(attention, way)
            seen = attention(query, key, value, mask)
            gradients = torch.autograd.grad(seen.square().sum(), (query, key, value, *attention.parameters()))
            found[way] = (seen, *gradients)
        torch.testing.assert_close(found["fast"], found["plain"])


def test_what_an_evaluation_keeps_serves_in_training():
    x = torch.randn(1, 2, 11, 13, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        doubled_convolution(x, weight)
    doubled_convolution(x, weight).sum().backward()


@pytest.mark.parametrize("head", ["etris", "etris-without-ha", "detris"])
def test_every_head_agrees_in_training_mode_too(head):
    model = tiny_model("tiny-clip-rn", "frozen").double().train()
    torch.manual_seed(0)
    model.head = HEADS[head](model.backbone, width=16, layers=2, heads=2, ffn=16, dropout=0.0).double()
    (fast, fast_gradients), (plain, plain_gradients) = (outcome(model, way) for way in ("fast", "plain"))
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(fast_gradients, plain_gradients, rtol=1e-6, atol=1e-9)


FULL_SIZE = {
    "clip-r101": ("bridger", {}, "etris"),
    "clip-vit-b16": ("bridger", {"width": 128, "heads": 8}, "etris"),
    "dinov2-b": ("detris", {}, "detris"),
}
"""The papers' models."""


@pytest.mark.full_size
@pytest.mark.parametrize("backbone_name", FULL_SIZE)
def test_full_size_models_agree(backbone_name):
    """With random weights, and photos of half the size, which take a quarter of the time."""
    method, options, head = FULL_SIZE[backbone_name]
    torch.manual_seed(0)
    backbone = BACKBONES[backbone_name](None, image_size=224)
    model = RISModel(backbone, METHODS[method](backbone, **options), HEADS[head](backbone)).eval()
    fast, fast_gradients = outcome(model, "fast", batch=1)
    with torch.inference_mode():  # as an evaluation does it, in another way yet
        evaluated = model(*inputs(model, 1))
    plain, plain_gradients = outcome(model, "plain", batch=1)
    expected, expected_gradients = outcome(model.double(), "plain", batch=1)
    *errors, allowed = off(fast, expected), off(evaluated, expected), 1.5 * off(plain, expected)
    assert max(errors) <= max(allowed, 1e-6) and max(errors) <= 5e-4, (errors, allowed)
    wrong = [
        ((found - expected_gradients).norm() / expected_gradients.norm()).item()
        for found in (fast_gradients.double(), plain_gradients.double())
    ]
    assert wrong[0] <= max(1.5 * wrong[1], 1e-5) and wrong[0] <= 2e-3, wrong
    for found in (fast, evaluated):
        assert ((found > 0) != (plain > 0)).double().mean() <= 1e-5


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
@pytest.mark.parametrize(
    "backbone, method", [("tiny-clip-rn", "bridger"), ("tiny-clip-vit", "lora"), ("tiny-dino", "detris")]
)
def test_masks_of_photos_are_the_same(backbone, method):
    model = tiny_model(backbone, method)
    samples = DATASETS["refcocog-google"]().read(SLICE, "val")
    tokenizer, device = Tokenizer(20, model.backbone.vocab_size), torch.device("cpu")
    # For as long as it takes to be sure of something: a model that has seen nothing is at its threshold everywhere.
    batches = ReferentBatches(samples, tokenizer, model.backbone.image_size, batch_size=6, seed=0)
    training = Training(epochs=10, batch_size=6, lr=1e-3, milestones=(), gamma=0.1, precision="fp32")
    for _ in train(Loop(model, training, device), batches, lambda loss: None):
        pass
    found = {}
    for way in ("fast", "plain"):
        speed.choose(model, way)
        settings = {"tokenizer": tokenizer, "batch_size": 8, "device": device, "threshold": 0.35}
        with evaluation.inference(model):
            found[way] = list(evaluation.masks(model, samples, **settings))
    flipped = pixels = covered = 0
    for (index, fast_BHW), (same, plain_BHW) in zip(found["fast"], found["plain"], strict=True):
        assert index == same
        flipped += (fast_BHW != plain_BHW).sum().item()
        pixels, covered = pixels + plain_BHW.numel(), covered + plain_BHW.sum().item()
    assert 0.002 * pixels < covered < 0.998 * pixels and flipped <= 1e-5 * pixels, (flipped, covered, pixels)
