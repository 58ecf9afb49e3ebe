"""Weight files in their real formats, made here with random numbers: found, read without being executed, fitted."""

import hashlib
import http.server
import os
import pickle
import socket
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from open_clip.model import CLIP, build_model_from_openai_state_dict, convert_weights_to_fp16
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ris_bench.backbones import clip, dinov2, tiny, weights
from ris_bench.backbones.base import BACKBONES
from ris_bench.backbones.weights import KINDS, SOURCES, Weights, fit, locate, read, sha256
from ris_bench.errors import UserError
from ris_bench.records import Choice

# TorchScript is deprecated; OpenAI's files are what they are.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


class Node(nn.Module):
    def forward(self, x):
        return x


def save_traced(state, path):
    """A TorchScript archive whose modules are the dotted names of a state dict."""
    root = Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        if tensor.is_floating_point():
            node.register_parameter(leaf, nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)


def openai_state(model):
    """What OpenAI released of a CLIP: partly fp16, with three settings among the tensors."""
    convert_weights_to_fp16(model)
    settings = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    return model.state_dict() | {name: torch.tensor(value) for name, value in settings.items()}


def small_clip(vision):
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True)


RESNET = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64}
VIT = {"layers": 2, "width": 64, "image_size": 32, "patch_size": 8}


def small_dino():
    """The class of timm's reg4 models with their 37 x 37 positions, 8 channels wide."""
    return VisionTransformer(
        img_size=518, patch_size=14, embed_dim=8, depth=1, num_heads=2, reg_tokens=4, no_embed_class=True,
        init_values=1.0, num_classes=0, global_pool="",
    )  # fmt: skip


def meta_state(vit):
    """The weights of one of timm's reg4 models under facebookresearch/dinov2's names.

    There the class token has a position of its own, which the model given receives into its class token.
    """
    class_position_11C = torch.randn_like(vit.cls_token)
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    vit.cls_token.data += class_position_11C
    return {
        "cls_token": state.pop("cls_token"),
        "pos_embed": torch.cat([class_position_11C, state.pop("pos_embed")], dim=1),
        "register_tokens": state.pop("reg_token"),
        "mask_token": torch.zeros(1, vit.embed_dim),
        **state,
    }


# Where files are found.


def test_sources_are_what_the_libraries_know():
    for kind, source in SOURCES.items():
        repository, _ = source.hub
        assert source.url.endswith("/" + source.file)
        assert repository.startswith("timm/")
        assert source.is_clip == kind.startswith("clip-")
        assert source.model in (open_clip.list_models() if source.is_clip else timm.list_models())


def test_kinds_say_what_each_backbone_loads(monkeypatch):
    class Recorder(Weights):
        def load(self, kind):
            self.sha256[kind] = ""
            return {}, kind

    for module in (clip, dinov2, tiny):
        monkeypatch.setattr(module, "fit", lambda *_, **__: None)
    loaded = {}
    for name in BACKBONES:
        recorder = Recorder(None)
        with torch.device("meta"):
            BACKBONES.build(Choice(name=name), recorder)
        loaded[name] = tuple(recorder.sha256)
    assert loaded == KINDS


@pytest.mark.parametrize("kind", SOURCES)
def test_a_folder_gives_the_released_file_or_one_named_by_kind(kind, tmp_path):
    renamed = tmp_path / f"{kind}.safetensors"
    renamed.touch()
    assert locate(kind, tmp_path) == renamed
    released = tmp_path / SOURCES[kind].file
    released.touch()
    assert locate(kind, tmp_path) == released


@pytest.mark.parametrize("kind", SOURCES)
def test_a_file_missing_from_the_folder_is_one_line_of_what_and_where_and_how(kind, tmp_path):
    with pytest.raises(UserError) as error:
        locate(kind, tmp_path)
    line = str(error.value)
    assert "\n" not in line
    for part in (SOURCES[kind].file, SOURCES[kind].url, f"{kind}.safetensors", str(tmp_path), "--weights"):
        assert part in line


@pytest.fixture
def no_caches(tmp_path, monkeypatch):
    """A machine that has loaded nothing yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.mark.parametrize("folder", [".cache/clip", "torch/hub/checkpoints"])
def test_files_in_the_caches_of_clip_and_torch_are_used(folder, no_caches):
    (no_caches / folder).mkdir(parents=True)
    for kind in ("clip-r101", "dinov2-l"):
        file = no_caches / folder / SOURCES[kind].file
        file.touch()
        assert locate(kind, None) == file


@pytest.mark.parametrize("kind", ["clip-vit-b16", "dinov2-b"])
@pytest.mark.parametrize("offline", [True, False])
def test_files_in_the_cache_of_the_hub_are_used_without_asking_it(kind, offline, no_caches, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    repository, name = SOURCES[kind].hub
    folder = no_caches / "hub" / f"models--{repository.replace('/', '--')}"
    file = folder / "snapshots" / ("0" * 40) / name
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file({"x": torch.ones(1)}, file)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert locate(kind, None) == file


def test_offline_without_files_says_so_at_once(no_caches, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="RN50.pt is not in .*HF_HUB_OFFLINE is set.*--weights") as error:
        locate("clip-r50", None)
    assert "\n" not in str(error.value)


def test_a_hub_that_never_answers_is_not_waited_for(no_caches, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(weights, "HUB_TIMEOUT", 0.2)
        start = time.monotonic()
        with pytest.raises(UserError, match="the hub gives none .*timed out"):
            locate("clip-r50", None)
        assert time.monotonic() - start < 3


def test_what_no_cache_holds_is_downloaded_from_the_hub(no_caches, monkeypatch):
    repository, name = SOURCES["clip-r50"].hub
    content = safetensors.torch.save({"x": torch.arange(3.0)})

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == f"/{repository}/resolve/main/{name}" else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        path = locate("clip-r50", None)
        server.shutdown()
    assert path.read_bytes() == content
    assert path.is_relative_to(no_caches / "hub")


# How files are read.


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).half()
        self.register_buffer("count", torch.tensor(5))
        self.register_parameter("absent", None)
        self.sizes = [1, 2]

    def forward(self, x):
        return x


class Outer(nn.Module):
    """All that a module can hold: nesting, numbered children, tied, half, integer, empty and strided tensors."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.blocks = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False))
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)
        self.right.weight = self.left.weight
        self.register_buffer("strided", torch.randn(3, 4).t()[1:3])
        self.register_buffer("empty", torch.ones(0, 3))
        self.register_buffer("narrow", torch.randn(3).bfloat16())

    def forward(self, x):
        return self.blocks(x)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        expected_dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        assert state[name].dtype == expected_dtype
        assert torch.equal(state[name], tensor.detach().to(expected_dtype)), name


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 3, 2, 2))])
def test_a_torchscript_archive_reads_as_torch_would_load_it(compile_, tmp_path):
    torch.jit.save(compile_(Outer().eval()), tmp_path / "x.pt")
    assert_same(read(tmp_path / "x.pt"), torch.jit.load(tmp_path / "x.pt").state_dict())


def test_the_code_of_a_torchscript_archive_is_not_even_parsed(tmp_path):
    torch.jit.save(torch.jit.script(Outer()), tmp_path / "x.pt")
    expected = torch.jit.load(tmp_path / "x.pt").state_dict()
    edit(tmp_path / "x.pt", lambda name, data: b"this is not Python" if "/code/" in name else data)
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / "x.pt")
    assert_same(read(tmp_path / "x.pt"), expected)


@pytest.mark.parametrize("wrap", [lambda tensor: tensor, nn.Parameter])
def test_a_state_dict_reads_as_it_was_saved(wrap, tmp_path):
    state = {name: wrap(x) if x.is_floating_point() else x for name, x in Outer().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    assert_same(read(tmp_path / "x.pth"), state)


def test_safetensors_read_as_fp32(tmp_path):
    state = {"a": torch.randn(3).half(), "b.c": torch.arange(3)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    assert_same(read(tmp_path / "x.safetensors"), state)


def test_numbers_of_the_other_byte_order_are_turned(tmp_path):
    state = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.randn(2).half(), "d": torch.ones(1).byte()}
    torch.save(state, tmp_path / "x.pth")
    widths = {f"x/data/{key}": width for key, width in enumerate((4, 8, 2, 1))}

    def turn(name, data):
        if name == "x/byteorder":
            return b"big" if sys.byteorder == "little" else b"little"
        width = widths.get(name, len(data))
        return b"".join(data[i : i + width][::-1] for i in range(0, len(data), width)) if name in widths else data

    edit(tmp_path / "x.pth", turn)
    assert_same(read(tmp_path / "x.pth"), state)


def edit(path, change, compression=zipfile.ZIP_STORED):
    """Rewrite the members of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))


# Files that are broken, or made to do harm.


class Storage:
    """Stands for four fp32 numbers in the member `data/0`."""

    def __init__(self, key="0", numel=4):
        self.key, self.numel = key, numel


class View:
    def __init__(self, offset, size, stride, storage=None):
        self.arguments = (storage or Storage(), offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.numel)
        return None


def save_pickle(tree, path):
    """An archive of torch with four numbers and any tree."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("x/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(tree)
        archive.writestr("x/data/0", torch.arange(4.0).numpy().tobytes())


def assert_refused(path, reason):
    with pytest.raises(UserError, match=reason) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_views_within_their_numbers_are_read(tmp_path):
    save_pickle({"a": View(1, (3,), (1,)), "b": View(0, (2, 2), (1, 2)), "c": View(4, (0,), (1,))}, tmp_path / "x.pt")
    expected = {"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([[0.0, 2], [1, 3]]), "c": torch.empty(0)}
    assert_same(read(tmp_path / "x.pt"), expected)


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (View(2, (3,), (1,)), "reaches beyond"),
        (View(0, (2, 2), (1, 3)), "reaches beyond"),
        (View(-1, (2,), (1,)), "does not fit"),
        (View(3, (2,), (-1,)), "does not fit"),
        (View(0, (1 << 40,), (0,)), "does not fit"),
        (View(0, (2,), (1, 1)), "does not fit"),
        (View(0, (2.0,), (1,)), "does not fit"),
        (View(0, (4,), (1,), Storage(numel=1 << 40)), "does not fit"),
        (View(0, (4,), (1,), Storage(key="1")), "no item"),
        (View(0, (4,), (1,), Storage(key="../data.pkl")), "no item"),
    ],
)
def test_a_tensor_that_lies_about_its_numbers_is_refused(view, reason, tmp_path):
    save_pickle({"a": view}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", reason)


def harm(path):
    path.touch()


@pytest.mark.parametrize(
    "function", [harm, os.system, eval, getattr, __import__, torch.load, torch.jit.load, Path.touch]
)
def test_a_pickle_cannot_call_what_weights_do_not_need(function, tmp_path):
    target = tmp_path / "harmed"
    argument = {os.system: f"touch {target}", eval: f"open({str(target)!r}, 'w')"}.get(function, target)
    save_pickle({"a": View(0, (4,), (1,)), "b": Call(function, argument)}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", "it asks for")
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("collections OrderedDict", OrderedDict),
        ("collections Counter", dict),
        ("__torch__.any Module", SimpleNamespace),
        ("torch FloatStorage", torch.float32),
        ("torch._utils _rebuild_tensor_v2", torch._utils._rebuild_tensor_v2),
    ],
)
def test_a_pickle_cannot_change_what_it_is_given(name, given, tmp_path):
    # BUILD with such a pair sets attributes of whatever it is applied to.
    pair = pickle.dumps((None, {"poisoned": True}), protocol=2)[2:-1]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + pair + b"b.")
    assert_refused(tmp_path / "x.pt", "cannot be read")
    assert not hasattr(given, "poisoned")


def test_modules_within_themselves_are_refused_in_time(tmp_path):
    # Each level holds the next one twice: 2 ** 60 names.
    level = b"c__torch__\nX\n)\x81}(X\x01\x00\x00\x00a"
    bomb = b"\x80\x02N"
    for _ in range(60):
        bomb = bomb[:2] + level + bomb[2:] + b"q\x00X\x01\x00\x00\x00bh\x00ub"
    loop = b"\x80\x02c__torch__\nX\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    for body in (bomb + b".", loop):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("x/data.pkl", body)
        assert_refused(tmp_path / "x.pt", "contain one another")


def test_broken_files_are_refused(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(1000.0)}, whole)
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[data.index(torch.arange(1000.0).numpy().tobytes()) + 1000] ^= 1
    cases = {
        "truncated.pt": (data[: len(data) // 2], "not a zip file"),
        "flipped.pt": (bytes(flipped), "Bad CRC-32"),
        "empty.pt": (b"", "neither safetensors nor"),
        "text.pth": (b"<html>404</html>", "neither safetensors nor"),
        "bare.pt": (pickle.dumps(Call(harm, tmp_path / "harmed")), "neither safetensors nor"),
        "truncated.safetensors": (safetensors.torch.save({"a": torch.ones(9)})[:-4], "Safetensor"),
        "text.safetensors": (b"<html>404</html>", "Safetensor"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, reason)
    assert not (tmp_path / "harmed").exists()
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("photos/1.jpg", b"")
    assert_refused(tmp_path / "photos.pt", "torch did not write")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    assert_refused(tmp_path / "nothing.pt", "no tensors")
    edit(whole, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert_refused(whole, "is compressed")


# From the released formats to the libraries' names.


@pytest.mark.parametrize("vision", [RESNET, VIT])
@pytest.mark.parametrize("form", ["RN50.pt", "clip-r50.safetensors"])
def test_openai_weights_fit_open_clip_and_compute_the_same(vision, form, tmp_path):
    torch.manual_seed(0)
    released = openai_state(small_clip(vision))
    if form.endswith(".pt"):
        save_traced(released, tmp_path / form)
    else:
        safetensors.torch.save_file(released, tmp_path / form)
    source = Weights(tmp_path)
    state, file = source.load("clip-r50")
    assert file == str(tmp_path / form)
    assert source.sha256 == {form: hashlib.sha256((tmp_path / form).read_bytes()).hexdigest()}
    ours = small_clip(vision).eval()
    fit(ours, state, file=file)
    expected = build_model_from_openai_state_dict(dict(released), cast_dtype=torch.float32).float()
    image = torch.randn(1, 3, vision["image_size"], vision["image_size"])
    tokens = torch.randint(100, (1, 8))
    assert torch.equal(ours.encode_image(image), expected.encode_image(image))
    assert torch.equal(ours.encode_text(tokens), expected.encode_text(tokens))


@pytest.mark.parametrize("form", ["meta", "timm"])
def test_dinov2_weights_fit_timm_and_place_tokens_as_meta_does(form, tmp_path):
    released, vit = small_dino(), small_dino()
    theirs = meta_state(released)
    if form == "meta":
        torch.save(theirs, tmp_path / SOURCES["dinov2-b"].file)
    else:
        safetensors.torch.save_file(released.state_dict(), tmp_path / "dinov2-b.safetensors")
    state, file = Weights(tmp_path).load("dinov2-b")
    fit(vit, state, file=file)
    patches_BNC = torch.randn(1, 37 * 37, 8)
    # facebookresearch/dinov2: class token and patches get their positions, then the registers go between them.
    x_BNC = torch.cat([theirs["cls_token"], patches_BNC], dim=1) + theirs["pos_embed"]
    x_BNC = torch.cat([x_BNC[:, :1], theirs["register_tokens"], x_BNC[:, 1:]], dim=1)
    torch.testing.assert_close(vit._pos_embed(patches_BNC), x_BNC)
    unchanged = [name for name in theirs if name.startswith(("blocks", "norm", "patch_embed"))]
    assert all(torch.equal(vit.state_dict()[name], theirs[name]) for name in unchanged)
    assert len(unchanged) == 18


def test_meta_names_are_those_of_dinov2():
    linear = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = {f"blocks.0.{part}.{what}" for part in linear for what in ("weight", "bias")}
    block |= {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    outside = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    tokens = {"cls_token", "register_tokens", "mask_token", "pos_embed"}
    state = meta_state(small_dino())
    assert state.keys() == block | outside | tokens
    assert state["pos_embed"].shape == (1, 1370, 8)


@pytest.mark.parametrize("names", [["mask_token", "register_tokens"], ["model"], ["encoder"], ["pos_embed"]])
def test_a_file_of_another_family_is_refused(names, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / SOURCES["dinov2-b"].file)
    with pytest.raises(UserError, match="does not hold the weights of dinov2-b"):
        Weights(tmp_path).load("dinov2-b")


@pytest.fixture
def module():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_fit_is_strict_but_for_what_is_named(module):
    state = {name: torch.full_like(tensor, 7) for name, tensor in module.state_dict().items()}
    old = module[0].bias.detach().clone()
    del state["0.bias"]
    fit(module, state | {"extra": torch.ones(1)}, new=["0.bias"], unused=["extra", "not in the file either"], file="x")
    assert torch.equal(module[0].bias, old)
    for name, tensor in module.state_dict().items():
        assert name == "0.bias" or (tensor == 7).all()


@pytest.mark.parametrize(
    ("change", "new", "reason"),
    [
        ({"0.bias": None}, [], "it lacks 0.bias"),
        ({"1.running_mean": None, "1.running_var": None}, ["1.running_mean"], "it lacks 1.running_var"),
        ({"extra": torch.ones(1)}, [], "it has besides extra"),
        ({}, ["0.bias"], "it has besides 0.bias"),
        ({"0.weight": torch.ones(2, 2)}, [], "it has in another shape 0.weight"),
        ({f"layer{i}": torch.ones(1) for i in range(9)}, [], "besides layer0, layer1, layer2 and 6 more"),
    ],
)
def test_fit_names_what_differs_and_changes_nothing(change, new, reason, module):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {name: torch.full_like(tensor, 7) for name, tensor in before.items()} | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(UserError, match=f"^x.pt holds the weights of another model: .*{reason}") as error:
        fit(module, state, new=new, file="x.pt")
    assert "\n" not in str(error.value)
    assert_same(module.state_dict(), before)


def test_sha256_is_that_of_the_whole_file(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


# The full models, from files of their real size to the towers.


@pytest.mark.full_size
@pytest.mark.parametrize("name", ["clip-r50", "clip-vit-b16", "dinov2-b"])
def test_a_backbone_holds_the_numbers_of_its_files(name, tmp_path):
    released = []
    for kind in KINDS[name]:
        source = SOURCES[kind]
        if source.is_clip:
            state = openai_state(CLIP(**open_clip.get_model_config(source.model)))
            save_traced(state, tmp_path / source.file)
        else:
            vit = timm.create_model(source.model, num_classes=0)
            torch.save(meta_state(vit), tmp_path / source.file)
            state = vit.state_dict()
        # The projections of an attention, packed in the file, are layers of their own in the backbone.
        released += [part for tensor in state.values() for part in (tensor, *torch.atleast_1d(tensor).chunk(3))]
    loaded = Weights(tmp_path)
    backbone = BACKBONES.build(Choice(name=name, options={"image_size": 224}), loaded)
    assert loaded.sha256.keys() == {SOURCES[kind].file for kind in KINDS[name]}
    known = {fingerprint(tensor) for tensor in released}
    unknown = [key for key, tensor in backbone.state_dict().items() if fingerprint(tensor) not in known]
    assert all(key.startswith(backbone.not_pretrained) for key in unknown), unknown


def fingerprint(tensor):
    """Equal for the same numbers, whatever the precision they are kept in."""
    values = tensor.detach().float().flatten()
    return tensor.shape, values.double().sum().item(), tuple(values[:8].tolist())
