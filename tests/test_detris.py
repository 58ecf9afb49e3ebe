"""What DETRIS's adapters compute and where they stand, against its formulas written out."""

from __future__ import annotations

from contextvars import copy_context

import pytest
import torch
from conftest import OPTIONS, inputs, tiny_model
from torch import nn
from torch.nn import functional as F

from ris_bench.backbones.base import BACKBONES, resize_positions
from ris_bench.backbones.clip import load_clip
from ris_bench.backbones.dinov2 import pair
from ris_bench.backbones.tiny import tiny_dino_vit, tiny_vit
from ris_bench.backbones.weights import Weights
from ris_bench.errors import UserError
from ris_bench.methods.base import METHODS, Parallel
from ris_bench.methods.detris import WORDS


def detris(backbone_name: str = "tiny-dino", **options):
    backbone = BACKBONES[backbone_name](Weights(None))
    torch.manual_seed(0)
    return backbone, METHODS["detris"](backbone, **{**OPTIONS["detris"], **options})


def blocks(tower) -> list:
    return [block for stage in tower.stages for block in stage.blocks]


def adapted(backbone) -> tuple[list[int], list[int]]:
    """The layers of both towers that have an adapter."""
    return (
        [i for i, block in enumerate(blocks(backbone.image)) if isinstance(block.ffn, Parallel)],
        [i for i, block in enumerate(blocks(backbone.text)) if isinstance(block.shortcut, Parallel)],
    )


@torch.no_grad()
def shuffle_statistics(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)


def dense(convs, x, conv, norms):
    """The dense convolutions with the layers taken one by one, in the order in which they are listed."""

    def layer(x, i):
        i = 2 * i
        weight, norm = norms[i], norms[i + 1]
        x = conv(x, weight.weight, weight.bias, padding=weight.weight.shape[-1] // 2)
        return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3))

    one = layer(x, 0)
    three = layer(layer(torch.cat([x, one], 1), 1), 2)
    five = layer(layer(torch.cat([x, one, three], 1), 3), 4)
    return torch.cat([one, three, five], 1)


def layers_of(convs) -> list:
    return [m for m in convs.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d))]


@torch.no_grad()
def test_text_adapter():
    backbone, _ = detris(image_layers=(), text_layers=(1,))
    block = blocks(backbone.text)[1].eval()
    adapter = block.shortcut.beside
    shuffle_statistics(adapter)
    x = torch.randn(2, 9, 64)
    mask = torch.full((9, 9), -torch.inf).triu(1)
    # Beside norm and MLP, on what attention left behind; 0.2 times; the first token is added to itself.
    h = x + block.attention(block.norm1(x), mask)
    low = F.relu(adapter.down(h))
    words = dense(adapter.convs, low[:, 1:].transpose(1, 2), F.conv1d, layers_of(adapter.convs)).transpose(1, 2)
    out = low + torch.cat([low[:, :1], words], 1)
    expected = h + block.ffn(block.norm2(h)) + 0.2 * adapter.up(out)
    torch.testing.assert_close(block(x, mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("name, prefix", [("tiny-dino", 5), ("tiny-clip-vit", 1)])
def test_dense_aligner(name, prefix):
    backbone, method = detris(name, image_layers=(2,), text_layers=())
    block = blocks(backbone.image)[2].eval()
    aligner = block.ffn.beside
    shuffle_statistics(aligner)
    if isinstance(block.scale2, nn.Identity):
        block.scale2 = nn.Softplus()  # any elementwise function will do
    x, words = torch.randn(2, prefix + 16, 64), torch.randn(2, 7, 64)
    # Beside the MLP: after its norm, under its layer scale; 0.2 times.
    h = x + block.scale1(block.attention(block.norm1(x)))
    normed = block.norm2(h)
    low = F.relu(aligner.down(normed))
    grid = low[:, prefix:].transpose(1, 2).reshape(2, 32, 4, 4)
    dense_map = dense(aligner.convs, grid, F.conv2d, layers_of(aligner.convs)) + grid
    query = aligner.patch_in(dense_map.flatten(2).transpose(1, 2))
    keys = aligner.word_in(words)
    seen = aligner.patch_out(aligner.attention(query, keys, keys))
    beside = aligner.up(low + torch.cat([low[:, :prefix], seen], 1))
    expected = h + block.scale2(block.ffn.inner(normed) + 0.2 * beside)
    context = copy_context()
    context.run(WORDS.set, words)
    torch.testing.assert_close(context.run(block, x), expected)


@torch.no_grad()
def test_linear_layers_of_the_aligner_start_small_and_those_of_the_text_adapter_do_not():
    backbone, _ = detris(image_layers=(0,), text_layers=(0,))
    aligner, adapter = blocks(backbone.image)[0].ffn.beside, blocks(backbone.text)[0].shortcut.beside
    for layer in (aligner.down, aligner.up, aligner.patch_in, aligner.word_in, aligner.attention.out_proj):
        assert 0.018 < layer.weight.std() < 0.022
        assert not layer.bias.any()
    convolution = aligner.convs.branches[0][0]
    assert convolution.weight.std() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert adapter.down.weight.abs().max() <= 64**-0.5
    assert adapter.down.weight.std() == pytest.approx((3 * 64) ** -0.5, rel=0.1)


@torch.no_grad()
def test_the_image_sees_every_word_and_the_padding():
    model = tiny_model("tiny-dino", "detris").eval()
    images, tokens = inputs(model, batch=1)
    tokens[0, 10:] = 0
    longer = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
    maps = [model.method(model.backbone, images, t).maps_BCHW[0] for t in (tokens, tokens.clamp(max=77), longer)]
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    assert WORDS not in copy_context()  # nothing of an expression stays behind


def test_only_what_meets_a_word_depends_on_text():
    backbone, _ = detris(image_layers=(3, 5), text_layers=(1,))
    assert (backbone.image.untouched, backbone.text.untouched) == (2, 2)
    backbone, _ = detris(image_layers=(), text_layers=(0,))
    assert (backbone.image.untouched, backbone.text.untouched) == (5, 1)


@pytest.mark.parametrize("depth, layers", [(3, [0, 1, 2]), (12, [1, 3, 5, 7, 9, 11]), (24, [2, 6, 10, 14, 18, 22])])
def test_default_layers(depth, layers):
    with torch.device("meta"):
        name = {3: "tiny-clip-vit", 12: "dinov2-b", 24: "dinov2-l"}[depth]
        backbone = BACKBONES[name](None)
        METHODS["detris"](backbone)
    image, text = adapted(backbone)
    assert layers in (image, text)
    assert adapted(detris(image_layers=(1, 4), text_layers=())[0]) == ([1, 4], [])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_layers": (), "text_layers": ()}, "neither"),
        ({"image_layers": (6,)}, "image_layers .* 0 to 5"),
        ({"text_layers": (2, 1)}, "text_layers .* in order"),
        ({"text_layers": (-1,)}, "text_layers"),
        ({"image_width": 40}, "image_width 40.* 16"),
        ({"attention_width": 30}, "heads"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        detris(**options)


def test_without_aligners_a_resnet_will_do():
    with pytest.raises(UserError, match="'ffn' site in its image tower"):
        detris("tiny-clip-rn")
    detris("tiny-clip-rn", image_layers=())


@torch.no_grad()
def test_stages_of_dinov2_end_where_they_are_told_to():
    """By default after the 5th and 9th block of 12, where DETRIS takes its maps."""
    backbone = pair(tiny_dino_vit(), tiny_vit(), 64, stage_ends=(1, 5)).eval()
    assert [len(stage.blocks) for stage in backbone.image.stages] == [1, 4, 1]
    image = torch.randn(1, 3, 64, 64)
    x = blocks(backbone.image)[0](backbone.image.stem(image))
    torch.testing.assert_close(backbone.encode_image(image)[0], x[:, 5:].transpose(1, 2).reshape(1, 64, 8, 8))
    with torch.device("meta"):
        for name, lengths in (("dinov2-b", [5, 4, 3]), ("dinov2-l", [9, 8, 7])):
            assert [len(stage.blocks) for stage in BACKBONES[name](None).image.stages] == lengths
        with pytest.raises(UserError, match=r"stage_ends \[8, 4\].* \[4, 8\] for thirds"):
            BACKBONES["dinov2-b"](None, stage_ends=(8, 4))


def test_positions_of_dinov2_are_resized_with_an_offset():
    positions = torch.arange(49.0)[:, None].expand(49, 2)
    plain, shifted = resize_positions(positions, 5, 5), resize_positions(positions, 5, 5, offset=0.1)
    assert plain.shape == shifted.shape == (25, 2)
    # Cell centres are 7 / 5.1 old cells apart instead of 7 / 5; bicubic interpolation bends a plane a little.
    assert plain[12, 0].item() == pytest.approx(24)
    assert shifted[12, 0].item() == pytest.approx(8 * (2.5 * 7 / 5.1 - 0.5), abs=0.3)
    assert resize_positions(positions, 7, 7, offset=0.1) is positions


def test_position_embeddings_of_clip_are_resized_as_etris_does():
    """Bicubic without antialiasing (ETRIS model/clip.py:514)."""
    released, clip = tiny_vit(64), tiny_vit(104)
    load_clip(clip, released.state_dict(), "x")
    old, new = released.visual.positional_embedding, clip.visual.positional_embedding
    torch.testing.assert_close(new[0], old[0])
    torch.testing.assert_close(new[1:], resize_positions(old[1:], 13, 13))
