"""Where pretrained weights come from, and how their files are read: as numbers, never as programs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import pickle
import sys
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import safetensors.torch
import timm
import torch
from huggingface_hub import constants, hf_hub_download
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from ris_bench.errors import UserError

HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer at all."""


class Source(NamedTuple):
    """A published model: its name in the library that builds it, and the file that its authors released."""

    model: str
    file: str

    @property
    def is_clip(self) -> bool:
        """Whether the library is open_clip; else it is timm."""
        return open_clip.is_pretrained_cfg(self.model, "openai")

    @property
    def url(self) -> str:
        """Where the authors published the file."""
        return open_clip.get_pretrained_url(self.model, "openai") or timm.models.get_pretrained_cfg(self.model).url

    @property
    def hub(self) -> tuple[str, str]:
        """Repository and file of the same weights on the Hugging Face hub, as the library knows them."""
        if self.is_clip:
            repository = open_clip.get_pretrained_cfg(self.model, "openai")["hf_hub"]
            return repository.rstrip("/"), "open_clip_model.safetensors"
        return timm.models.get_pretrained_cfg(self.model).hf_hub_id, "model.safetensors"


SOURCES = {
    "clip-r50": Source("RN50-quickgelu", "RN50.pt"),
    "clip-r101": Source("RN101-quickgelu", "RN101.pt"),
    "clip-vit-b16": Source("ViT-B-16-quickgelu", "ViT-B-16.pt"),
    "dinov2-b": Source("vit_base_patch14_reg4_dinov2", "dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2-l": Source("vit_large_patch14_reg4_dinov2", "dinov2_vitl14_reg4_pretrain.pth"),
}
"""By kind. Any other kind is `tiny/<kind>.safetensors` of this package."""

KINDS = {name: (name,) for name in (*SOURCES, "tiny-clip-rn", "tiny-clip-vit")} | {
    "dinov2-b": ("dinov2-b", "clip-vit-b16"),
    "dinov2-l": ("dinov2-l", "clip-vit-b16"),
    "tiny-dino": ("tiny-dino", "tiny-clip-vit"),
}
"""What each backbone loads: to be located before a long run starts."""


class Weights:
    """Loads pretrained weights, from a folder or else from the libraries' caches and hub, and remembers the files."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.sha256: dict[str, str] = {}
        """Of every file loaded, by its name."""

    def load(self, kind: str) -> tuple[dict[str, Tensor], str]:
        """The weights of a kind, floats as fp32 and named as open_clip or timm name them, and the file they are from.

        The position grid is as published: 7 x 7 (ResNets), 14 x 14 (ViT-B/16), 37 x 37 (DINOv2). Raises UserError
        where there is no file and where it cannot be read.
        """
        path = locate(kind, self.folder)
        state = read(path)
        source = SOURCES.get(kind)
        if source and source.is_clip:
            for setting in ("input_resolution", "context_length", "vocab_size"):
                state.pop(setting, None)
        elif source:
            with torch.device("meta"):
                model = timm.create_model(source.model, num_classes=0)
            # Meta's names to timm's: mask_token is dropped, the class token's position is added to it. The library
            # takes names and shapes on trust, so a wrong file can fail anywhere in it.
            try:
                state = checkpoint_filter_fn(state, model)
            except Exception as error:
                raise UserError(f"{path} does not hold the weights of {kind} ({_brief(error)})") from None
        self.sha256[path.name] = sha256(path)
        return state, str(path)


def locate(kind: str, folder: Path | None) -> Path:
    """The weight file of a kind; shipped ones come with the package.

    In a folder it is the released file or `<kind>.safetensors`. Without one it is what the caches of CLIP, torch and
    Hugging Face hold, else it is downloaded from the hub. Raises UserError where there is none.
    """
    if kind not in SOURCES:
        return Path(__file__).parent / "tiny" / f"{kind}.safetensors"
    source = SOURCES[kind]
    repository, name = source.hub
    advice = (
        f"put {source.file} from {source.url}, or {name} from {constants.ENDPOINT}/{repository} as {kind}.safetensors, "
        f"into a folder and name it by --weights"
    )
    if folder is not None:
        for path in (folder / source.file, folder / f"{kind}.safetensors"):
            if path.is_file():
                return path
        raise UserError(f"{kind} needs {source.file} or {kind}.safetensors, and {folder} has neither: {advice}")
    caches = (Path("~/.cache/clip").expanduser(), Path(torch.hub.get_dir(), "checkpoints"))
    for cache in caches:
        if (cache / source.file).is_file():
            return cache / source.file
    # Whatever goes wrong on the way to the hub, the user's way out is the same.
    try:
        return _from_hub(repository, name)
    except Exception as error:
        raise UserError(
            f"no weights for {kind}: {source.file} is not in {' or '.join(map(str, caches))}, {name} of {repository} "
            f"is not in {constants.HF_HUB_CACHE}, and the hub gives none ({_brief(error)}): {advice}"
        ) from None


def _from_hub(repository: str, name: str) -> Path:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Path(hf_hub_download(repository, name, local_files_only=True))
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    # The client asks a hub that does not answer again and again: one short question first. Any answer will do.
    with contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    return Path(hf_hub_download(repository, name))


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    new: Collection[str] = (),
    unused: Collection[str] = (),
    file: str,
) -> None:
    """Load a state dict strictly, but for named exceptions.

    `new` are exactly the tensors of the module that the file lacks: they stay as they are. `unused` may be in the file
    and is not in the module. Raises UserError for any other difference of names or shapes.
    """
    own = module.state_dict()
    check(own, state, new=new, unused=unused, file=file)
    module.load_state_dict({key: state[key] for key in own.keys() & state.keys()}, strict=False)


def check(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    new: Collection[str] = (),
    unused: Collection[str] = (),
    file: str,
) -> None:
    """Compare the names and shapes of a file's state with a model's own, as `fit` does: UserError if they differ."""
    both = own.keys() & state.keys()
    differences = {
        "lacks": own.keys() - both - set(new),
        "has besides": (state.keys() - both - set(unused)) | (both & set(new)),
        "has in another shape": {key for key in both if own[key].shape != state[key].shape},
    }
    if any(differences.values()):
        found = "; ".join(f"it {what} {_some(keys)}" for what, keys in differences.items() if keys)
        raise UserError(f"{file} holds the weights of another model: {found}")


def _some(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """A flat state dict, floats as fp32, from safetensors or from what `torch.save` or `torch.jit.save` wrote.

    Of a TorchScript module it is every tensor attribute of the tree of modules; of a dictionary that has the `entry`,
    what that holds. Nothing in the file is executed, whoever made it. Raises UserError where it cannot be read.
    """
    # A file that is broken, or made to break things, can fail in as many ways as there are lines in its readers.
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            state = _read_archive(path, entry)
        elif path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            raise ValueError("it is neither safetensors nor a zip archive written by torch 1.6 or newer")
    except Exception as error:
        raise UserError(f"{path} cannot be read as weights ({_brief(error)}): get it again") from None
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# Archives of torch: a zip of `<root>/data.pkl`, whose tensors refer to the raw numbers in `<root>/data/<key>`. For a
# TorchScript module (the form of OpenAI's files) the pickle holds the tree of modules beside `<root>/code/`, which
# `torch.jit.load` would compile and `torch.load` refuses.

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _View(NamedTuple):
    """A tensor as the pickle describes it: nothing in it is trusted yet."""

    storage: Any
    """("storage", dtype, key, location, number of elements)"""
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Admits what torch's pickles are made of, as inert values: modules are namespaces and tensors are `_View`s.

    A pickle can call and change whatever `find_class` gives it; so that is only builtin types, which cannot be
    changed, and functions made for this one call.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return SimpleNamespace
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # In the state of a learning rate's schedule, beside the weights of a checkpoint.
        if (module, name) == ("collections", "Counter"):
            return dict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _View(storage, offset, size, stride)
        # A parameter is its tensor, a list with a type is the list.
        if (module, name) == ("torch._utils", "_rebuild_parameter") or module == "torch.jit._pickle":
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which weights have no need of")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_archive(path: Path, entry: str | None) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        roots = [name.split("/")[0] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise ValueError("torch did not write this archive")
        root = roots[0]

        def member(name: str) -> bytearray:
            info = archive.getinfo(f"{root}/{name}")
            if info.compress_type != zipfile.ZIP_STORED:  # torch stores numbers as they are; a bomb would not
                raise ValueError(f"{info.filename} is compressed")
            return bytearray(archive.read(info))

        swapped = f"{root}/byteorder" in names and member("byteorder").decode() != sys.byteorder
        storages: dict[tuple[str, torch.dtype], Tensor] = {}
        state = {}
        tree = _Unpickler(io.BytesIO(member("data.pkl"))).load()
        if isinstance(tree, dict) and entry in tree:
            tree = tree[entry]
        for name, view in _views(tree):
            _, dtype, key, _, numel = view.storage
            if (key, dtype) not in storages:
                storages[key, dtype] = _numbers(member(f"data/{key}"), dtype, swapped)
            state[name] = _tensor(storages[key, dtype], numel, view)
    if not state:
        raise ValueError("it holds no tensors")
    return state


def _views(tree: Any) -> Iterator[tuple[str, _View]]:
    """Every tensor of a state dict or of a tree of modules, with its dotted name."""
    nodes = [("", tree)]
    visited = 0
    while nodes:
        prefix, node = nodes.pop()
        for name, value in (node if isinstance(node, dict) else vars(node)).items():
            visited += 1
            if visited > 100_000 or len(prefix) > 1000:
                raise ValueError("its modules contain one another")
            if isinstance(value, _View):
                yield f"{prefix}{name}", value
            elif isinstance(value, SimpleNamespace):
                nodes.append((f"{prefix}{name}.", value))


def _numbers(raw: bytearray, dtype: torch.dtype, swapped: bool) -> Tensor:
    if not raw:
        return torch.empty(0, dtype=dtype)
    numbers = torch.frombuffer(raw, dtype=torch.uint8)
    if swapped:
        numbers = numbers.view(-1, dtype.itemsize).flip(1).flatten()
    return numbers.view(dtype)


def _tensor(storage: Tensor, numel: int, view: _View) -> Tensor:
    # The file may say anything: a view that reaches beyond its numbers would read other memory, and one that repeats
    # them could fill it.
    size, stride = view.size, view.stride
    whole = all(type(n) is int and n >= 0 for n in (view.offset, *size, *stride)) and len(size) == len(stride)
    if not whole or numel != len(storage) or math.prod(size) > numel:
        raise ValueError(f"a tensor of size {size} does not fit its {len(storage)} numbers")
    last = view.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= numel:
        raise ValueError(f"a tensor of size {size} reaches beyond its {numel} numbers")
    return storage.as_strided(size, stride, view.offset)
