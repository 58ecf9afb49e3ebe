"""Released checkpoints of ETRIS and DETRIS -> `RISModel`, which computes the logits that the released code computes.

Their files are what train.py of kkakkkka/ETRIS and jiaqihuang01/DETRIS saves: a dictionary whose "state_dict" is that
of the whole model, frozen encoders included, with names under `module.`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ris_bench.backbones.base import BACKBONES, Tower
from ris_bench.backbones.clip import CLIPResNet
from ris_bench.backbones.dinov2 import DINOv2
from ris_bench.backbones.weights import check, read, sha256
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.methods.bridger import Bridger
from ris_bench.model import RISModel
from ris_bench.records import Choice

MODEL, DESCRIPTION = "model.safetensors", "model.json"
UNUSED = ("backbone.logit_scale", "txt_backbone.logit_scale", "dinov2.mask_token")
"""Tensors of the files that no segmentation model uses: CLIP's temperature, and what DINOv2 hid patches under."""


class Architecture(NamedTuple):
    """A released configuration: what no shape in a checkpoint tells."""

    backbone: Choice
    method: Choice
    head: str
    sign: tuple[str, int]
    """A tensor that tells it from the others, and that tensor's last size."""


def _etris(backbone: str, heads: int, sign: tuple[str, int], **options: Any) -> Architecture:
    method = Choice(name="bridger", options={"heads": heads})
    return Architecture(Choice(name=backbone, options=options), method, "etris", sign)


def _detris(backbone: str, width: int) -> Architecture:
    return Architecture(Choice(name=backbone), Choice(name="detris"), "detris", ("dinov2.pos_embed", width))


ARCHITECTURES = {
    # `nhead` of config/*/bridge_{r50,r101,v16}.yaml. The statistics of CLIP's norms were left to move (engine.py:29).
    "etris-r50": _etris("clip-r50", 4, ("backbone.visual.attnpool.c_proj.bias", 1024), norm_stats="batch"),
    "etris-r101": _etris("clip-r101", 4, ("backbone.visual.attnpool.c_proj.bias", 512), norm_stats="batch"),
    "etris-vit-b16": _etris("clip-vit-b16", 8, ("backbone.visual.proj", 512)),
    "detris-b": _detris("dinov2-b", 768),
    "detris-l": _detris("dinov2-l", 1024),
}


class Choices(NamedTuple):
    """What a model is built from."""

    backbone: Choice
    method: Choice
    head: Choice


def load(path: Path | str, arch: str | None = None) -> RISModel:
    """The model of a released checkpoint, in evaluation mode.

    `arch` is one of `ARCHITECTURES`, inferred where None. Widths, layers and stages are read off the names and shapes;
    numbers of heads are those of the released configurations. Images are normalised with CLIP's mean and deviation, for
    DETRIS too (its utils/dataset.py:110-112). Nothing in the file is executed. Raises UserError where it cannot be read
    or holds another model: every tensor of the file must be used or be one of `UNUSED`.
    """
    return _load(Path(path), arch)[0]


def import_official(path: Path, folder: Path, arch: str | None = None) -> dict[str, Any]:
    """Write the model of a released checkpoint to a folder, from which `restore` takes it. Raises as `load` does.

    Returns what stands in its model.json: the choices of which the model is built, the file that it is from, and the
    tensors of that file which it has no use for.
    """
    with new_folder(folder) as partial:
        model, choices, unused = _load(path, arch)
        description = {part: {"name": c.name, "options": dict(c.options)} for part, c in choices._asdict().items()}
        description["source"] = {"file": path.name, "sha256": sha256(path), "unused": unused}
        write(partial, description, model.state_dict())
    return description


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name, and appears, if nothing went wrong. UserError where it exists."""
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> None:
    """What a model is built from and, where given, all its tensors."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    if state is not None:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / MODEL)


def describe(folder: Path) -> tuple[Choices, dict[str, Any]]:
    """What the description in a folder says, its choices checked. Raises UserError where there is none."""
    file = folder / DESCRIPTION
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return _resolved(*(Choice(**record[part]) for part in Choices._fields)), record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not describe a model ({type(error).__name__}: {error})") from None


def restore(folder: Path) -> RISModel:
    """The model in a folder that `import_official` wrote, in evaluation mode. Raises UserError where there is none."""
    model = _build(describe(folder)[0])
    state = read(folder / MODEL)
    check(model.state_dict(), state, file=str(folder / MODEL))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _load(path: Path, arch: str | None) -> tuple[RISModel, Choices, list[str]]:
    state = {name.removeprefix("module."): tensor for name, tensor in read(path, "state_dict").items()}
    arch = arch or _inferred(state, path)
    if arch not in ARCHITECTURES:
        raise UserError(f"there is no architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
    # Options are read off the names and shapes on trust, so a wrong file can fail anywhere in it.
    try:
        choices = _choices(state, ARCHITECTURES[arch])
        model = _build(choices)
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of {arch} ({type(error).__name__}: {error})") from None
    check(to_official(model), state, unused=UNUSED, file=str(path))
    model.load_state_dict(_from_official(model, state), assign=True)
    return model.eval(), choices, [name for name in UNUSED if name in state]


def _inferred(state: Mapping[str, Tensor], path: Path) -> str:
    for arch, architecture in ARCHITECTURES.items():
        name, size = architecture.sign
        if name in state and state[name].shape[-1:] == (size,):
            return arch
    raise UserError(f"{path} is no checkpoint of {', '.join(ARCHITECTURES)}, to judge by its tensors")


def _choices(state: Mapping[str, Tensor], architecture: Architecture) -> Choices:
    def layers(pattern: str) -> tuple[int, ...]:
        matches = (re.match(pattern, name) for name in state)
        return tuple(sorted({int(match[1]) for match in matches if match}))

    def rows(name: str) -> int:
        return len(state[name])

    backbone, method = (dict(choice.options) for choice in (architecture.backbone, architecture.method))
    if architecture.method.name == "bridger":
        method["stages"] = layers(r"bridger\.fusion_v\.(\d+)\.")
        method["width"] = rows(f"bridger.linear1.{method['stages'][0]}.weight")
        if "backbone.visual.positional_embedding" in state:  # a ViT's, made for one size
            side = round((rows("backbone.visual.positional_embedding") - 1) ** 0.5)
            backbone["image_size"] = side * state["backbone.visual.conv1.weight"].shape[-1]
    else:
        image, text = "dinov2.blocks", "txt_backbone.transformer.resblocks"
        method["image_layers"] = layers(rf"{image}\.(\d+)\.adapter\.")
        method["text_layers"] = layers(rf"{text}\.(\d+)\.adapter\.")
        for layer in method["image_layers"][:1]:
            method["image_width"] = rows(f"{image}.{layer}.adapter.D_fc1.weight")
            method["attention_width"] = rows(f"{image}.{layer}.adapter.cross.image_proj.weight")
        for layer in method["text_layers"][:1]:
            method["text_width"] = rows(f"{text}.{layer}.adapter.D_fc1.weight")
    head = {
        "width": rows("neck.aggr.0.weight"),
        "layers": len(layers(r"decoder\.layers\.(\d+)\.")),
        "ffn": rows("decoder.layers.0.ffn.0.weight"),
    }
    return _resolved(
        Choice(name=architecture.backbone.name, options=backbone),
        Choice(name=architecture.method.name, options=method),
        Choice(name=architecture.head, options=head),
    )


def _resolved(*choices: Choice) -> Choices:
    registries = (BACKBONES, METHODS, HEADS)
    pairs = zip(registries, choices, strict=True)
    return Choices(*(replace(r.resolve(c.name, c.options), code=c.code) for r, c in pairs))


def _build(choices: Choices) -> RISModel:
    # Without memory, since every tensor comes from a file.
    with torch.device("meta"):
        backbone = BACKBONES.build(choices.backbone, None)
        return RISModel(backbone, METHODS.build(choices.method, backbone), HEADS.build(choices.head, backbone))


def to_official(model: RISModel) -> dict[str, Tensor]:
    """The state of an ETRIS or DETRIS model under the names that its released code has, without `module.`."""
    parts: dict[str, list[Tensor]] = {}
    places = _places(model)
    for name, tensor in model.state_dict().items():
        parts.setdefault(places[name].name, []).append(tensor)
    state = {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}
    if "dinov2.pos_embed" in state:
        # The class token's position, which timm has added to the token.
        state["dinov2.pos_embed"] = F.pad(state["dinov2.pos_embed"], (0, 0, 1, 0))
    return state


def _from_official(model: RISModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {}
    for name, place in _places(model).items():
        tensor = state[place.name]
        ours[name] = tensor if place.third is None else tensor.chunk(3)[place.third].clone()
    if "dinov2.pos_embed" in state:
        positions_1NC = state["dinov2.pos_embed"]
        ours["backbone.image.vit.cls_token"] = state["dinov2.cls_token"] + positions_1NC[:, :1]
        ours["backbone.image.vit.pos_embed"] = positions_1NC[:, 1:].clone()
    return ours


# The names, ours beside theirs.

_TEXT_BLOCK = {
    "norm1": "ln_1",
    "attention.out": "attn.out_proj",
    "norm2": "ln_2",
    "ffn.0": "mlp.c_fc",
    "ffn.2": "mlp.c_proj",
}
_DINO_BLOCK = {
    "norm1": "norm1",
    "attention.out": "attn.proj",
    "scale1": "ls1",
    "norm2": "norm2",
    "ffn.0": "mlp.fc1",
    "ffn.2": "mlp.fc2",
    "ffn.inner.0": "mlp.fc1",
    "ffn.inner.2": "mlp.fc2",
    "scale2": "ls2",
}
_ADAPTER = {
    "down": "D_fc1",
    "up": "D_fc2",
    "convs.branches.0.0": "dense_branch1.conv",
    "convs.branches.0.1": "dense_branch1.bn",
    "convs.branches.1.0.0": "dense_branch2.0.conv",
    "convs.branches.1.0.1": "dense_branch2.0.bn",
    "convs.branches.1.1.0": "dense_branch2.1.conv",
    "convs.branches.1.1.1": "dense_branch2.1.bn",
    "convs.branches.2.0.0": "dense_branch3.0.conv",
    "convs.branches.2.0.1": "dense_branch3.0.bn",
    "convs.branches.2.1.0": "dense_branch3.1.conv",
    "convs.branches.2.1.1": "dense_branch3.1.bn",
    "patch_in": "cross.image_proj",
    "word_in": "cross.text_proj",
    "attention": "cross.multihead_attn",
    "patch_out": "cross.back_proj",
}
_BOTTLENECK = {
    "reduce.0": "conv1",
    "reduce.1": "bn1",
    "conv.0": "conv2",
    "conv.1": "bn2",
    "expand.0": "conv3",
    "expand.1": "bn3",
    "shortcut": "downsample",
}
_INTERACTOR = {
    "self_attention": "self_attn",
    "cross_attention": "multihead_attn",
    "attention": "multihead_attn",
    "ffn.0": "linear1",
    "ffn.3": "linear2",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "norms.2": "norm3",
}
_DECODER_LAYER = {
    "self_attention": "self_attn",
    "cross_attention": "multihead_attn",
    "ffn": "ffn",
    "norms.0": "norm1",
    "norms.1": "norm2",
    "norms.2": "norm3",
    "self_norm": "self_attn_norm",
    "cross_norm": "cross_attn_norm",
}
_HEAD = {
    "hierarchical_alignment.to_grid.0": "neck.f3_proj",
    "hierarchical_alignment.to_grid.1": "neck.f4_proj",
    "hierarchical_alignment.to_grid.2": "neck.f5_proj",
    "hierarchical_alignment.sentence": "neck.txt_proj",
    "hierarchical_alignment.attention.0": "neck.fusion3.multihead_attn",
    "hierarchical_alignment.attention.1": "neck.fusion4.multihead_attn",
    "hierarchical_alignment.attention.2": "neck.fusion5.multihead_attn",
    "hierarchical_alignment.aggregate": "neck.aggr",
    "hierarchical_alignment.coordinates.0": "neck.coordconv.0.conv1",
    "hierarchical_alignment.coordinates.1": "neck.coordconv.1",
    "global_alignment.norm": "decoder.norm",
    "projector.refine": "proj.vis",
    "projector.kernel": "proj.txt",
}


class _Place(NamedTuple):
    """Where the numbers of a tensor lie in the official state."""

    name: str
    third: int | None
    """Of query, key and value in one tensor."""


def _places(model: RISModel) -> dict[str, _Place]:
    """By the name of our tensor; what of a name is not in `_prefixes` is the same in both."""
    prefixes = dict(_prefixes(model))
    places = {}
    for name in model.state_dict():
        parts = name.split(".")
        cut = next(n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in prefixes)
        prefix, third = prefixes[".".join(parts[:cut])]
        between = "." if cut < len(parts) and not prefix.endswith("_") else ""
        places[name] = _Place(prefix + between + ".".join(parts[cut:]), third)
    return places


def _prefixes(model: RISModel) -> Iterator[tuple[str, _Place]]:
    """Beginnings of our names, up to a module or a tensor, and what stands there in the official ones."""

    def same(ours: str, theirs: str, names: Mapping[str, str]) -> Iterator[tuple[str, _Place]]:
        for name, official in names.items():
            yield f"{ours}.{name}", _Place(f"{theirs}.{official}", None)

    def blocks(ours: str, tower: Tower, theirs: str, names: Mapping[str, str], packed: str) -> Iterator:
        places = ((i, j) for i, stage in enumerate(tower.stages) for j in range(len(stage.blocks)))
        for depth, (i, j) in enumerate(places):
            block, official = f"{ours}.stages.{i}.blocks.{j}", f"{theirs}.{depth}"
            yield from same(block, official, names)
            for third, projection in enumerate("qkv"):
                yield f"{block}.attention.{projection}", _Place(f"{official}.attn.{packed}", third)
            for beside in ("ffn.beside", "shortcut.beside"):
                yield from same(f"{block}.{beside}", f"{official}.adapter", _ADAPTER)

    image, text, method = model.backbone.image, model.backbone.text, model.method
    clip = "txt_backbone" if isinstance(image, DINOv2) else "backbone"
    names = ("token_embedding", "positional_embedding", "ln_final", "text_projection")
    yield from same("backbone.text", clip, dict(zip(names, names, strict=True)))
    yield from blocks("backbone.text", text, f"{clip}.transformer.resblocks", _TEXT_BLOCK, "in_proj_")

    if isinstance(image, DINOv2):
        names = {"cls_token": "cls_token", "reg_token": "register_tokens", "pos_embed": "pos_embed"}
        names |= {"patch_embed": "patch_embed", "norm": "norm"}
        yield from same("backbone.image.vit", "dinov2", names)
        yield from blocks("backbone.image", image, "dinov2.blocks", _DINO_BLOCK, "qkv")
    elif isinstance(image, CLIPResNet):
        yield "backbone.image.stem_layers", _Place("backbone.visual", None)
        yield "backbone.image.attnpool", _Place("backbone.visual.attnpool", None)
        widths = [bottleneck.conv[0].out_channels for bottleneck in image.stages[0]]
        layer1 = widths.count(widths[0])
        for i, stage in enumerate(image.stages):
            for j in range(len(stage)):
                layer, k = (1, j) if i == 0 and j < layer1 else (i + 2, j - layer1 if i == 0 else j)
                yield from same(f"backbone.image.stages.{i}.{j}", f"backbone.visual.layer{layer}.{k}", _BOTTLENECK)
    else:
        yield "backbone.image", _Place("backbone.visual", None)
        yield from blocks("backbone.image", image, "backbone.visual.transformer.resblocks", _TEXT_BLOCK, "in_proj_")

    if isinstance(method, Bridger):
        for i in map(int, method.bridges):
            # Only the ViT's zooms are more than one layer.
            layer = ".0" if image.convolutional else ""
            names = {f"zoom_in{layer}": f"zoom_in.{i}", f"zoom_out{layer}": f"zoom_out.{i}"}
            names |= {"word_in": f"linear1.{i}", "word_out": f"linear2.{i}"}
            names |= {"norms.0": f"ln_v.{i - 1}", "norms.1": f"ln_t.{i - 1}"}
            yield from same(f"method.bridges.{i}", "bridger", names)
            for ours, theirs in (("to_image", "fusion_v"), ("to_text", "fusion_t")):
                yield from same(f"method.bridges.{i}.{ours}", f"bridger.{theirs}.{i}", _INTERACTOR)

    yield from ((f"head.{ours}", _Place(theirs, None)) for ours, theirs in _HEAD.items())
    for i in range(len(model.head.global_alignment.layers)):
        yield from same(f"head.global_alignment.layers.{i}", f"decoder.layers.{i}", _DECODER_LAYER)
