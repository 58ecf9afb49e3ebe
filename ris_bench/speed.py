"""Two ways to compute the same: as the papers' code does it, and with sums and products in a cheaper order.

Both run on the same parameters. Tests hold them equal, and `benchmarks/speed.py` says what the second one saves. The
second one can be compiled: what repeats, part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from contextvars import copy_context
from functools import lru_cache, partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from ris_bench import onednn
from ris_bench.allocator import keep_freed_memory
from ris_bench.parallel import same_batch_norms
from ris_bench.records import Speed


class TwoWays(nn.Module):
    """A module whose `forward` asks `fast`."""

    fast = True

    def kept(self, name: str) -> Kept:
        """What it has made of its weights, by name, until it is told to train or to evaluate."""
        return self.__dict__.setdefault("_kept", {}).setdefault(name, Kept())

    def train(self, mode: bool = True) -> TwoWays:
        self.__dict__.pop("_kept", None)
        return super().train(mode)


class Precise(nn.Module):
    """A part whose linear layers `choose` leaves as they are.

    Packed they err more, since oneDNN adds up a row of the weight in one go. In a map that is lost among other errors;
    in what is made of a sentence it is an error of all cells alike.
    """


class Region(nn.Module):
    """A part that repeats, such as a block of a tower: it is compiled by itself, and its work can be done again in the
    backward pass."""

    compiles = True
    recomputed = False
    """Whether the backward pass works out anew what it needs from inside, so that the forward pass keeps only what
    enters: all blocks are computed twice, in the memory of one."""

    def __call__(self, *args: Any) -> Any:
        call = super().__call__
        if not (self.recomputed and torch.is_grad_enabled()):
            return call(*args)
        # By context variables a method tells its modules what they do not receive: the second time as the first.
        again = partial(copy_context().run, call)
        return checkpoint(again, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Again(self)))


class _Again:
    """Norms in the second pass through a region: over the same rows; and running means and variances, which the first
    has moved, are moved in copies."""

    def __init__(self, region: Region) -> None:
        self._norms = [m for m in region.modules() if isinstance(m, _BatchNorm) and m.training]
        self._rows = same_batch_norms()

    def __enter__(self) -> None:
        self._moved = [dict(norm._buffers) for norm in self._norms]
        copies = [{name: b if b is None else b.clone() for name, b in moved.items()} for moved in self._moved]
        self._rows.__enter__()
        for norm, buffers in zip(self._norms, copies, strict=True):
            norm._buffers.update(buffers)

    def __exit__(self, *error: Any) -> None:
        for norm, buffers in zip(self._norms, self._moved, strict=True):
            norm._buffers.update(buffers)
        self._rows.__exit__(*error)


def choose(model: nn.Module, speed: Speed, recompute: bool = False) -> None:
    """How every module of the model computes that knows two ways, and how its convolutions lie in memory; and whether
    its regions are recomputed, which those that are compiled are not.

    With channels last, a training step on a CPU takes 0.8 of the time where the tower is a ResNet. Compiled regions
    draw their dropout otherwise. On a CPU, where it is not "plain", the process keeps its memory from then on, and
    evaluation a second copy of the weights, packed.
    """
    assert speed in get_args(Speed)
    compiled = speed == "compiled"
    # In the second pass a compiler might choose code for other sizes than in the first, which keeps other things.
    assert not (compiled and recompute)
    model.to(memory_format=torch.contiguous_format if speed == "plain" else torch.channels_last)
    if speed != "plain" and all(p.device.type == "cpu" for p in model.parameters()):
        keep_freed_memory()
    precise = {part for module in model.modules() if isinstance(module, Precise) for part in module.modules()}
    for module in model.modules():
        # The second is that of PyTorch's attention.
        if type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and module not in precise:
            module.__class__ = Linear
        if isinstance(module, TwoWays):
            module.fast = speed != "plain"
        if isinstance(module, Region):
            module.recomputed = recompute
            module._compiled_call_impl = None
            if compiled and module.compiles:
                module.compile()
    if compiled:
        # Code for each kind of block, in training and in evaluation, for the first batch and for those of other sizes;
        # of a layer whose weight a method changes there is a class for every block.
        torch._dynamo.config.cache_size_limit = max(MOST_CODE, torch._dynamo.config.cache_size_limit)


MOST_CODE = 256
"""Versions of a function that are compiled before it is left as it is; PyTorch's default is 8."""


def missing_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, in a line; None where it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds: no C++ compiler, no Triton, no headers of Python
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


class Kept:
    """What was computed from some tensors, kept until one of them is another.

    They are compared by place and version, which every change counts up but one through `Tensor.data`. Where a gradient
    is wanted, and of tensors that are themselves computed, nothing is kept.
    """

    def __init__(self) -> None:
        self._seen: tuple[Hashable, ...] = ()
        self._sources: tuple[Tensor, ...] = ()
        self._made: Any = None

    def __call__(self, make: Callable[[], Any], *tensors: Tensor | None, given: Hashable = None) -> Any:
        """`make()`, which depends on the tensors and on what is `given`."""
        if torch.compiler.is_compiling():  # it does not know where a tensor will lie, nor its version
            return make()
        sources = tuple(t for t in tensors if t is not None)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if wanted or any(t.grad_fn is not None or t.is_inference() or t.is_meta for t in sources):
            return make()
        seen = (given, *((t.data_ptr(), t._version, t.dtype, t.device, t.stride()) for t in sources))
        if seen != self._seen:
            # What is kept from an evaluation may serve in training. The sources are held, so that nothing else comes to
            # lie in their place.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(sources[0].device.type, enabled=False):
                self._made = make()
            self._seen, self._sources = seen, tuple(t.detach() for t in sources)
        return self._made

    def clear(self) -> None:
        self.__init__()

    def __reduce__(self) -> tuple:
        return Kept, ()  # a copy of a model makes its own


_CONVOLUTIONS = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.ConvTranspose2d: F.conv_transpose2d,
}


class Linear(nn.Linear, TwoWays):
    """What `choose` makes of a linear layer: where oneDNN can be asked, with a weight that is packed once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x, "none") if self.packs(x) else super().forward(x)

    def packs(self, x: Tensor) -> bool:
        """Whether `then` can be asked. What is computed anew in every call is not packed."""
        return self.fast and onednn.serves(x) and not parametrize.is_parametrized(self)

    def then(self, x: Tensor, then: onednn.Then) -> Tensor:
        """The layer, and what comes behind it."""
        packed = self.kept("weight")(lambda: onednn.pack_linear(self.weight, x), self.weight)
        return onednn.linear(x, packed, self.bias, then)


class Layers(nn.Sequential, TwoWays):
    """One after another; a BatchNorm that computes with fixed numbers goes into the convolution before it, and an
    activation into what is computed by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.fast:
            return super().forward(x)
        number = 0
        while number < len(self):
            x, done = self._pass(x, number)
            number += done
        return x

    def _pass(self, x: Tensor, number: int) -> tuple[Tensor, int]:
        """Through a layer and those behind it that can be computed with it; and how many they are."""
        layer, behind, last = (*list(self)[number : number + 3], None, None)[:3]
        if foldable(layer, behind):
            if onednn.serves(x) and onednn.convolves(layer):
                then = activation(last)
                return onednn.convolution(layer, x, *self._packed(number, x), then), 2 + (then != "none")
            return convolution(layer, x, *self.folded(number)), 2
        if isinstance(layer, Linear) and not listened(layer) and layer.packs(x):
            then = activation(behind)
            return layer.then(x, then), 1 + (then != "none")
        return layer(x), 1

    def folded(self, number: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of that convolution, with the BatchNorm behind it folded in."""
        return self._made(f"{number}", number, fold)

    def _packed(self, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same with a packed weight."""

        def make(layer: nn.Conv2d, weight: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
            weight, bias_O = fold(layer, weight, norm)
            return onednn.pack_convolution(layer, weight, x), bias_O

        return self._made(f"{number} packed", number, make)

    def _made(self, name: str, number: int, make: Callable[[nn.Module, Tensor, _BatchNorm], Any]) -> Any:
        layer, norm = self[number], self[number + 1]
        weight = layer.weight
        sources = (weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return self.kept(name)(lambda: make(layer, weight, norm), *sources)


def foldable(layer: nn.Module, behind: nn.Module | None) -> bool:
    """Whether a norm stands behind a convolution that multiplies and adds the same numbers whatever it is given.

    Its own parameters are not trained either: their gradient costs more in a weight than in the map. Nobody listens to
    what passes between the two.
    """
    if not isinstance(behind, _BatchNorm) or behind.training or behind.running_mean is None:
        return False
    if torch.compiler.is_compiling():  # it joins them in its own way
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in behind.parameters()):
        return False
    kind = parametrize.type_before_parametrizations(layer)
    if kind not in _CONVOLUTIONS or layer.padding_mode != "zeros" or (layer.transposed and layer.groups > 1):
        return False
    return not listened(layer) and not listened(behind)


def listened(layer: nn.Module) -> bool:
    """Whether somebody wants to know what enters it, or what it returns."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def activation(layer: nn.Module | None) -> onednn.Then:
    """What a layer does, if it can be done together with the product before it."""
    if type(layer) is nn.ReLU and not listened(layer):
        return "relu"
    if type(layer) is nn.GELU and layer.approximate == "none" and not listened(layer):
        return "gelu"
    return "none"


def fold(layer: nn.Module, weight: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution in the place of two layers."""
    scale_O = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale_O = scale_O * norm.weight
    shift_O = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    bias_O = shift_O * scale_O
    if norm.bias is not None:
        bias_O = bias_O + norm.bias
    along = [1] * weight.dim()
    along[1 if layer.transposed else 0] = -1
    return weight * scale_O.view(along), bias_O


def convolution(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the layer makes of x with another weight and bias."""
    convolve = _CONVOLUTIONS[parametrize.type_before_parametrizations(layer)]
    if layer.transposed:
        return convolve(x, weight, bias, layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)
    return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Kept,
    change: Callable[[Tensor], Tensor] = lambda weight: weight,
) -> Tensor:
    """`F.linear` with what `change` makes of a weight, which is packed where oneDNN can be asked."""
    if not onednn.serves(x):
        return F.linear(x, change(weight), bias)
    return onednn.linear(x, kept(lambda: onednn.pack_linear(change(weight), x), weight), bias)


def doubled_convolution(
    x_BCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None = None, kept: Kept | None = None
) -> Tensor:
    """`conv2d(interpolate(x, scale_factor=2, mode="bilinear"), weight, bias, padding=1)`: (B, O, 2H, 2W).

    Both are linear, so that the channels can be mixed, once for each of the nine taps, where there are four times fewer
    cells; then every tap is enlarged and shifted along one axis after the other.
    """
    B, C, H, W = x_BCHW.shape
    out = len(weight_OC33)

    def mixing(weight_OC33: Tensor) -> Tensor:
        return weight_OC33.permute(3, 2, 0, 1).reshape(-1, C)  # columns of the kernel, rows, channels out

    taps_BHWT = linear(x_BCHW.permute(0, 2, 3, 1), weight_OC33, None, kept or Kept(), mixing)
    wide = _doubling(W, x_BCHW.dtype, x_BCHW.device) @ taps_BHWT.reshape(B, H, W * 3, 3 * out)
    rows = wide.view(B, H, 2 * W, 3, out).transpose(2, 3).reshape(B, H * 3, 2 * W * out)
    out_BHWO = (_doubling(H, x_BCHW.dtype, x_BCHW.device) @ rows).view(B, 2 * H, 2 * W, out)
    return (out_BHWO if bias_O is None else out_BHWO.add_(bias_O)).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept from an evaluation may serve in training
def _doubling(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 length, length * 3): what a cell of the doubled axis takes from each cell for each of three taps in a row."""
    one_1NN = torch.eye(length, dtype=torch.float64, device="cpu")[None]
    doubled_MN = F.interpolate(one_1NN, scale_factor=2, mode="linear")[0].T
    padded = F.pad(doubled_MN, (0, 0, 1, 1))  # the convolution sees zeros beyond the ends
    return torch.stack([padded[tap : tap + 2 * length] for tap in range(3)], dim=2).flatten(1).to(device, dtype)
