"""Released checkpoints: their layout, written down by hand, and what becomes of small ones in that layout."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import inputs
from torch import nn

from ris_bench import official
from ris_bench.backbones.base import BACKBONES
from ris_bench.cli import main
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel
from ris_bench.official import Architecture
from ris_bench.records import Choice

HEAD = {"width": 16, "layers": 2, "ffn": 24}
SMALL = {
    "etris-rn": ("tiny-clip-rn", "bridger", {"width": 16, "heads": 2, "stages": (1, 2)}, "etris"),
    "etris-vit": ("tiny-clip-vit", "bridger", {"width": 8, "heads": 2}, "etris"),
    "detris": (
        "tiny-dino",
        "detris",
        {"image_layers": (1, 4), "image_width": 32, "text_layers": (2,), "text_width": 16, "attention_width": 24},
        "detris",
    ),
}
"""Architectures of tiny backbones, which no shape tells from another."""


def sign_of(arch: str) -> tuple[str, int]:
    return {
        "etris-rn": ("backbone.visual.attnpool.c_proj.bias", 64),
        "etris-vit": ("backbone.visual.proj", 64),
        "detris": ("dinov2.pos_embed", 64),
    }[arch]


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch):
    for arch, (backbone, method, options, head) in SMALL.items():
        heads = {"heads": options["heads"]} if "heads" in options else {}
        architecture = Architecture(Choice(name=backbone), Choice(name=method, options=heads), head, sign_of(arch))
        monkeypatch.setitem(official.ARCHITECTURES, arch, architecture)


@torch.no_grad()
def small(arch: str) -> RISModel:
    """A model with random numbers everywhere, statistics included."""
    backbone_name, method, options, head = SMALL[arch]
    torch.manual_seed(0)
    backbone = BACKBONES[backbone_name](None)
    model = RISModel(backbone, METHODS[method](backbone, **options), HEADS[head](backbone, **HEAD))
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.ndim:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model.eval()


def checkpoint(state: dict) -> dict:
    """What train.py of both repositories saves."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([{"params": [weight], "initial_lr": 1e-4}], lr=1e-4)
    weight.grad = torch.ones(3)
    optimizer.step()
    return {
        "epoch": 50,
        "cur_iou": 0.7,
        "best_iou": 0.7,
        "prec": {"Pr@50": 0.8},
        "state_dict": OrderedDict((f"module.{name}", tensor) for name, tensor in state.items()),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [35, 35]).state_dict(),
    }


def unused(arch: str) -> dict:
    if arch != "detris":
        return {"backbone.logit_scale": torch.tensor(4.6)}
    return {"txt_backbone.logit_scale": torch.tensor(4.6), "dinov2.mask_token": torch.zeros(1, 64)}


def saved(arch: str, folder: Path, **changes) -> tuple[RISModel, Path]:
    model, path = small(arch), folder / "best_model.pth"
    state = official.to_official(model) | unused(arch) | changes
    torch.save(checkpoint({name: t for name, t in state.items() if t is not None}), path)
    return model, path


@pytest.mark.parametrize("arch", SMALL)
@torch.inference_mode()
def test_a_checkpoint_gives_the_logits_of_the_model_it_was_made_of(arch, tmp_path):
    model, path = saved(arch, tmp_path)
    loaded = official.load(path)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.state_dict().items())
    images, tokens = inputs(model)
    assert torch.equal(loaded(images, tokens), model(images, tokens))
    assert loaded.count() == model.count()
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_the_position_of_dinov2s_class_token_is_added_to_it(tmp_path):
    model = small("detris")
    state = official.to_official(model)
    positions = state["dinov2.pos_embed"].clone()
    positions[:, 0] = 1.5
    _, path = saved("detris", tmp_path, **{"dinov2.pos_embed": positions})
    vit = official.load(path).backbone.image.vit
    assert torch.equal(vit.cls_token, model.backbone.image.vit.cls_token + 1.5)
    assert torch.equal(vit.pos_embed, model.backbone.image.vit.pos_embed)


# The layout of the released models, written down from their modules.


def weights(*names: str) -> list[str]:
    return [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]


def batch_norms(*names: str) -> list[str]:
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{name}.{leaf}" for name in names for leaf in leaves]


def attentions(*names: str) -> list[str]:
    return [
        f"{name}.{leaf}"
        for name in names
        for leaf in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    ]


def under(prefix: str, names: list[str]) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


def convolutions(*names: str) -> list[str]:
    """Sequences of a convolution without bias and a norm."""
    return [*(f"{name}.0.weight" for name in names), *batch_norms(*(f"{name}.1" for name in names))]


def clip_blocks(number: int) -> list[str]:
    block = attentions("attn") + weights("ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    return [name for i in range(number) for name in under(f"transformer.resblocks.{i}", block)]


TEXT = ["positional_embedding", "text_projection", "token_embedding.weight", *weights("ln_final"), *clip_blocks(12)]
VIT = ["class_embedding", "positional_embedding", "proj", "conv1.weight", *weights("ln_pre", "ln_post")]
VIT += clip_blocks(12)


def resnet(layers: tuple[int, ...]) -> list[str]:
    names = [f"conv{i}.weight" for i in (1, 2, 3)] + batch_norms("bn1", "bn2", "bn3")
    for layer, blocks in enumerate(layers, 1):
        for i in range(blocks):
            block = [f"conv{j}.weight" for j in (1, 2, 3)] + batch_norms("bn1", "bn2", "bn3")
            if i == 0:
                block += convolutions("downsample")
            names += under(f"layer{layer}.{i}", block)
    pool = ["positional_embedding", *weights("k_proj", "q_proj", "v_proj", "c_proj"), *convolutions("connect")]
    return names + under("attnpool", pool)


def adapter() -> list[str]:
    names = weights("dense_branch1.conv", "D_fc1", "D_fc2") + batch_norms("dense_branch1.bn")
    for branch in ("dense_branch2", "dense_branch3"):
        names += weights(f"{branch}.0.conv", f"{branch}.1.conv") + batch_norms(f"{branch}.0.bn", f"{branch}.1.bn")
    return names


def dinov2(blocks: int, aligned: list[int]) -> list[str]:
    names = ["cls_token", "pos_embed", "register_tokens", *weights("patch_embed.proj", "norm")]
    for i in range(blocks):
        block = weights("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") + ["ls1.gamma", "ls2.gamma"]
        if i in aligned:
            cross = weights("image_proj", "text_proj", "back_proj") + attentions("multihead_attn")
            block += under("adapter", adapter() + under("cross", cross))
        names += under(f"blocks.{i}", block)
    return names


def bridger(full: bool) -> list[str]:
    names = [name for i in range(3) for name in weights(f"linear1.{i}", f"linear2.{i}")]
    names += [name for i in range(2) for name in weights(f"ln_v.{i}", f"ln_t.{i}")]
    for i in range(3):
        names += (
            [f"zoom_in.{i}.weight", f"zoom_out.{i}.weight"] if full else convolutions(f"zoom_in.{i}", f"zoom_out.{i}")
        )
        for fusion in (f"fusion_v.{i}", f"fusion_t.{i}"):
            names += attentions(f"{fusion}.multihead_attn")
            if full:
                more = attentions("self_attn") + weights("linear1", "linear2", "norm1", "norm2", "norm3")
                names += under(fusion, more)
    return names


DECODER_LAYER = attentions("self_attn", "multihead_attn")
DECODER_LAYER += weights("self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn.0", "ffn.3", "ffn.4")
NECK = attentions("fusion3.multihead_attn", "fusion4.multihead_attn", "fusion5.multihead_attn") + weights("txt_proj")
NECK += convolutions("f3_proj", "f4_proj", "f5_proj", "aggr", "coordconv.0.conv1", "coordconv.1")
PROJECTOR = convolutions("vis.1", "vis.3") + weights("vis.4", "txt")
DECODER = [name for i in range(3) for name in under(f"layers.{i}", DECODER_LAYER)] + weights("norm")
ENDS = under("neck", NECK) + under("decoder", DECODER) + under("proj", PROJECTOR)


def etris(image: list[str], full: bool) -> list[str]:
    return under("backbone", TEXT + under("visual", image)) + under("bridger", bridger(full)) + ENDS


def detris(blocks: int, aligned: list[int]) -> list[str]:
    words = [name for i in (1, 3, 5, 7, 9, 11) for name in under(f"transformer.resblocks.{i}.adapter", adapter())]
    return under("txt_backbone", TEXT + words) + under("dinov2", dinov2(blocks, aligned)) + ENDS


RELEASED = {
    # The names that are used; of all, the number of tensors and of parameters, counted in the official modules.
    "etris-r50": (etris(resnet((3, 4, 6, 3)), full=True), 769, 132_783_522),
    "etris-r101": (etris(resnet((3, 4, 23, 3)), full=True), 1075, 146_923_938),
    "etris-vit-b16": (etris(VIT, full=False), 522, 173_259_330),
    "detris-b": (detris(12, [1, 3, 5, 7, 9, 11]), 994, 175_529_778),
    "detris-l": (detris(24, [2, 6, 10, 14, 18, 22]), 1162, 394_106_930),
}


def released(arch: str) -> RISModel:
    """The released configuration, without memory."""
    architecture = official.ARCHITECTURES[arch]
    with torch.device("meta"):
        backbone = BACKBONES[architecture.backbone.name](None, **architecture.backbone.options)
        method = METHODS[architecture.method.name](backbone, **architecture.method.options)
        return RISModel(backbone, method, HEADS[architecture.head](backbone))


@pytest.mark.parametrize("arch", RELEASED)
def test_the_layout_is_that_of_the_released_models(arch):
    names, tensors, parameters = RELEASED[arch]
    state = official.to_official(released(arch))
    assert sorted(state) == sorted(names)
    unused = {"detris-b": (1, 768), "detris-l": (1, 1024)}.get(arch, (1,))
    assert len(names) + len(unused) == tensors
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(t.numel() for name, t in state.items() if not name.endswith(statistics)) + sum(unused) == parameters


@pytest.mark.parametrize("arch", RELEASED)
def test_the_released_models_are_recognised_with_all_their_options(arch):
    model = released(arch)
    state = official.to_official(model)
    assert official._inferred(state, Path("x")) == arch
    choices = official._choices(state, official.ARCHITECTURES[arch])
    again = official._build(choices)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert again.count() == model.count()


def test_the_size_of_a_vit_and_the_width_of_a_bridger_are_read_off_the_checkpoint():
    with torch.device("meta"):
        backbone = BACKBONES["clip-vit-b16"](None, image_size=448)
        method = METHODS["bridger"](backbone, width=128, heads=8)
        state = official.to_official(RISModel(backbone, method, HEADS["etris"](backbone)))
    choices = official._choices(state, official.ARCHITECTURES["etris-vit-b16"])
    assert choices.backbone.options["image_size"] == 448
    assert choices.method.options["width"] == 128


# What is refused, in one line.


def refused(path: Path, *parts: str, arch: str | None = None) -> None:
    with pytest.raises(UserError) as error:
        official.load(path, arch)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("arch", SMALL)
def test_a_tensor_that_is_missing_or_too_much_or_of_another_shape_is_named(arch, tmp_path):
    changes = {"neck.aggr.0.weight": None, "backbone.extra": torch.ones(1), "proj.txt.bias": torch.ones(2)}
    for name, tensor in changes.items():
        _, path = saved(arch, tmp_path, **{name: tensor})
        refused(path, name)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    _, path = saved("etris-rn", tmp_path)
    refused(path, "no checkpoint of detris", arch="detris")
    refused(path, "another model: it lacks backbone.visual.class_embedding", arch="etris-vit")
    with pytest.raises(UserError, match="there is no architecture 'etris'; there are etris-r50"):
        official.load(path, "etris")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "best_model.pth"
    refused(path, "cannot be read")
    torch.save({"epoch": 1, "state_dict": {"module.layer.weight": torch.ones(2)}}, path)
    refused(path, "is no checkpoint of etris-r50, ")
    torch.save({"epoch": 1, "state_dict": 3}, path)
    refused(path, "cannot be read")
    torch.save({"epoch": 1}, path)
    refused(path, "it holds no tensors")
    _, path = saved("etris-rn", tmp_path)
    whole = path.read_bytes()
    for size in (0, 3, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "cannot be read")


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    _, path = saved("etris-rn", tmp_path)
    target = tmp_path / "harmed"
    content = {"state_dict": {}, "optimizer": Call(os.system, f"touch {target}")}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
    refused(path, "it asks for")
    assert not target.exists()


# The folder that an imported model lies in.


@torch.inference_mode()
@pytest.mark.parametrize("arch", SMALL)
def test_an_imported_model_is_restored_from_its_folder(arch, tmp_path, capsys):
    model, path = saved(arch, tmp_path)
    folder = tmp_path / "models" / arch
    assert main(["import-official", str(path), "--out", str(folder)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((folder / "model.json").read_text())
    assert shown["source"]["file"] == "best_model.pth"
    assert shown["source"]["unused"] == list(unused(arch))
    assert {part: shown[part]["name"] for part in ("backbone", "method", "head")} == {
        "backbone": SMALL[arch][0],
        "method": SMALL[arch][1],
        "head": SMALL[arch][3],
    }
    path.unlink()
    images, tokens = inputs(model)
    assert torch.equal(official.restore(folder)(images, tokens), model(images, tokens))


def test_a_folder_is_not_written_twice(tmp_path, capsys):
    _, path = saved("etris-vit", tmp_path)
    arguments = ["import-official", str(path), "--out", str(tmp_path / "a")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path):
    _, path = saved("etris-vit", tmp_path)
    official.import_official(path, tmp_path / "a")
    whole = (tmp_path / "a" / "model.safetensors").read_bytes()
    for file, content, reason in (
        ("model.safetensors", whole[: len(whole) // 2], "cannot be read"),
        ("model.json", b"{}", "does not describe a model"),
        ("model.json", b"torn", "does not describe a model"),
    ):
        (tmp_path / "a" / file).write_bytes(content)
        with pytest.raises(UserError, match=reason):
            official.restore(tmp_path / "a")
    with pytest.raises(UserError, match="does not describe a model"):
        official.restore(tmp_path)
