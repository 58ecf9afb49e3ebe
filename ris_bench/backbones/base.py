"""A backbone is two towers that never meet: an image tower and a text tower, each stem -> stages -> head.

Shapes: B batch, C channels, H W map, N image tokens, L text tokens, E text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ris_bench.errors import UserError
from ris_bench.registry import Registry

BACKBONES = Registry("backbone", "ris_bench.backbones")

NormStats = Literal["frozen", "batch"]


class Features(NamedTuple):
    """What a backbone hands to the head."""

    maps_BCHW: tuple[Tensor, ...]
    """One per image stage, fine to coarse."""
    words_BLE: Tensor
    sentence_BE: Tensor
    pad_BL: Tensor
    """True where a text position is padding."""


class TextState(NamedTuple):
    """What flows through a text tower: a method that adds tokens says where the sentence's last one went."""

    x_BLE: Tensor
    eot_B: Tensor
    pad_BL: Tensor


@dataclass(frozen=True, kw_only=True)
class Site:
    """One named place of a tower where a method may act."""

    tower: Tower = field(repr=False)
    kind: str
    """What stands at the place.

    "attention" and "ffn": the branches of a transformer block, which are added to its input. "shortcut": what the ffn's
    is added to. "q", "k", "v", "out": the projections of an attention. "fc1", "fc2": the layers of an MLP. "norm": a
    LayerNorm.
    "conv": the 3x3 convolution of a bottleneck with its norm and activation; "kernel": that convolution alone.
    "bottleneck": the branch of a bottleneck, which is added to its shortcut. "pool": the attention pool.
    "prompt": the words of a sentence, a `TextState`, before their positions are added. "stage": all of a stage.
    """
    step: int
    """Position of the first step of the tower whose result changes when a method acts here (see `Tower.untouched`)."""
    depth: int
    """Position among the sites of this kind in its tower."""
    width: int
    """Channels that leave the place; as many enter, but for "fc1", "fc2", "pool" and the attention pool's "out"."""
    parent: nn.Module = field(repr=False)
    attr: str

    def wrap(self, make: Callable[[nn.Module], nn.Module]) -> None:
        """Put `make(module)` in the place of the module that stands here."""
        self.touch()
        setattr(self.parent, self.attr, make(getattr(self.parent, self.attr)))

    def reparametrize(self, make: Callable[[Tensor], nn.Module]) -> None:
        """Add what `make(weight)` returns to the weight of the layer that stands here, at every use."""
        self.touch()
        layer = getattr(self.parent, self.attr)
        nn.utils.parametrize.register_parametrization(layer, "weight", _Added(make(layer.weight)))

    def open(self) -> None:
        """Make the parameters of the module that stands here trainable."""
        self.touch()
        getattr(self.parent, self.attr).requires_grad_(True)

    def touch(self) -> None:
        """Say that what leaves this place depends on tuned parameters, or on the other tower."""
        self.tower.untouched = min(self.tower.untouched, self.step)


class _Added(nn.Module):
    def __init__(self, delta: nn.Module) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class Tower(nn.Module):
    """A pretrained encoder cut into steps: the stem, the stages and the head, numbered 0, 1, ..., len(stages) + 1."""

    stages: nn.ModuleList
    widths: tuple[int, ...]
    """Channels of the state after each stage."""

    def __init__(self, stages: list[nn.Module], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.widths = widths
        self.untouched = len(stages) + 2
        """How many leading steps depend neither on tuned parameters nor on the other tower, as methods have said by
        where they acted: what they compute is the same for every expression of an image and in every epoch."""

    def stem(self, x: Tensor) -> Any:
        """Input -> state."""
        raise NotImplementedError

    def head(self, x: Any) -> Any:
        """State after the last stage -> output."""
        raise NotImplementedError

    def sites(self) -> Iterator[Site]:
        """Every place where a method may act, from first to last."""
        raise NotImplementedError

    def stage_sites(self) -> Iterator[Site]:
        for i, width in enumerate(self.widths):
            # What follows the stage changes, not the stage itself.
            yield Site(tower=self, kind="stage", step=i + 2, depth=i, width=width, parent=self.stages, attr=str(i))


@dataclass(frozen=True)
class Known:
    """Where a pass through an image tower stands whose next states were worked out before (`ImageTower.known`).

    It goes through `ImageTower.step` in the place of a state, or of the images that the pass begins with.
    """

    state: Tensor | None
    """None where nobody asks for it: after the stem, if more is known, and in the place of the images."""
    following: tuple[Tensor | None, ...]
    """The states after the next steps, (B, ...); the last one is a tensor."""

    def __getitem__(self, row_B: Tensor) -> Known:
        """The same for rows of the batch, which may repeat."""
        return self._each(lambda tensor: tensor[row_B])

    def to(self, *args: Any, **kwargs: Any) -> Known:
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Known:
        """As a `DataLoader` asks for it."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Known:
        state, *following = (None if tensor is None else change(tensor) for tensor in (self.state, *self.following))
        return Known(state, tuple(following))


class ImageTower(Tower):
    """A tower whose state can be seen as a map: `maps` are the states after the stages, the last one after the head."""

    strides: tuple[int, ...]
    """Input pixels per cell of each map."""
    out_channels: tuple[int, ...]
    """Channels of each map that the head of the model receives."""
    convolutional: bool
    """Whether the state is a map; else it is tokens."""

    def step(self, number: int, x: Tensor | Known) -> Tensor | Known:
        """The state after a step, given that before it; a `Known` as long as there is a state after that."""
        if isinstance(x, Known):
            state, *following = x.following
            return Known(state, tuple(following)) if following else state
        return (self.stem, *self.stages, self.head)[number](x)

    def known(self, image: Tensor | Known, precision: torch.dtype | None = None) -> Tensor | Known:
        """What the `untouched` steps make of images (B, 3, H, W), without gradient: one pass serves every expression.

        The images themselves where no step is untouched; what is known already as it is. With a `precision` what is
        float32 is rounded to it, and stays float32; raises UserError where it exceeds that.
        """
        if isinstance(image, Known) or not self.untouched:
            return image
        with torch.no_grad():
            known = self._gone_through(self.untouched, image)
        return known if precision is None else known._each(lambda x: _rounded(x, precision))

    def shared(self, image: Tensor | Known, row_B: Tensor) -> Tensor | Known:
        """What follows of `image[row_B]`, with gradient, where rows of one image share as many steps as they can.

        It is the same but for rounding, also in training mode. There a norm takes the statistics of the batch, in which
        an image counts as often as it has rows, and dropout draws for each row anew: the step with the first of them,
        and all after it, have a row for each expression.
        """
        steps = self._steps_apart()
        used_U, own_B = row_B.unique(return_inverse=True)
        known = len(image.following) if isinstance(image, Known) else 0
        if steps <= known or len(used_U) == len(row_B):
            return image[row_B]
        return self._gone_through(steps, image[used_U])[own_B]

    def _steps_apart(self) -> int:
        """How many leading steps make of an image the same in every row of a batch, whatever stands in the others."""
        staged = [set(stage.modules()) for stage in self.stages]
        if any(_ties_rows(module) for module in set(self.modules()).difference(*staged)):
            return 0  # in the stem, or in the head, where there is little to share
        ties = [any(map(_ties_rows, modules)) for modules in staged]
        return 1 + ties.index(True) if True in ties else len(staged) + 2

    def _gone_through(self, steps: int, image: Tensor | Known) -> Known:
        """The states that so many steps make of images, of which some may be known."""
        x, states = image, []
        for number in range(steps):
            x = self.step(number, x)
            # Of what the tower has passed, the model's head receives the maps of all stages but the last.
            wanted = number == steps - 1 or 0 < number < len(self.stages)
            states.append((x.state if isinstance(x, Known) else x) if wanted else None)
        return Known(None, tuple(states))

    def map_of(self, x: Tensor | Known) -> Tensor:
        """The map (B, C, H, W) of a state, which may be known."""
        return self.to_map(x.state if isinstance(x, Known) else x)

    def to_map(self, x: Tensor) -> Tensor:
        """State -> (B, C, H, W)."""
        raise NotImplementedError

    def add_map(self, x: Tensor, delta_BCHW: Tensor) -> Tensor:
        """State plus a map; tokens that stand for no place stay as they are."""
        raise NotImplementedError


def _ties_rows(module: nn.Module) -> bool:
    """Whether in the mode that it is in a module makes of a row what other rows, or a draw for that row, ask for.

    By what it is: a norm of PyTorch, or something with a rate of dropping as PyTorch, timm and open_clip call it.
    """
    if isinstance(module, _NormBase):
        return module.training or module.running_mean is None
    rates = (getattr(module, name, None) for name in ("p", "dropout", "drop_prob", "prob"))
    return module.training and any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _rounded(x: Tensor, precision: torch.dtype) -> Tensor:
    if x.dtype != torch.float32:
        return x
    rounded = x.to(precision)
    if precision == torch.float16 and not rounded.isfinite().all():
        raise UserError("frozen features exceed what fp16 holds (65,504); set train.feature_precision to bf16 or fp32")
    return rounded.float()


class Backbone(nn.Module):
    """An image tower beside a text tower, with what the rest of the model must know to fit them.

    Raises UserError for an image size that the coarsest map does not divide: maps of all stages would not fit together.
    """

    def __init__(
        self,
        image: ImageTower,
        text: Tower,
        *,
        image_size: int,
        vocab_size: int,
        sentence_width: int,
        norm_stats: NormStats = "frozen",
        not_pretrained: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        coarsest = max(image.strides)
        if image_size < 1 or image_size % coarsest:
            raise UserError(
                f"image_size is {image_size}; it must be a multiple of {coarsest}, the side in pixels of a cell of the "
                f"backbone's coarsest map"
            )
        self.image, self.text = image, text
        # Written down before any method wraps a module: the places inside it stay where they are.
        self._sites = {"image": tuple(image.sites()), "text": tuple(text.sites())}
        self.image_size, self.vocab_size = image_size, vocab_size
        self.word_width, self.sentence_width = text.widths[-1], sentence_width
        self.fixed_norms: list[_BatchNorm] = []
        self.norm_stats = norm_stats
        self.not_pretrained = not_pretrained
        """Prefixes of the names of frozen tensors that no weight file holds: they are saved beside the tuned ones."""
        self.freeze()

    def freeze(self) -> None:
        """Close every parameter; normalisation statistics too, unless `norm_stats` is "batch".

        What a method injects later is not closed: trainable is what was created or opened after this call.
        """
        self.requires_grad_(False)
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        if self.norm_stats == "frozen":
            self.fixed_norms = norms
        elif norms:
            # What is normalised by the batch is another thing in every batch; only image towers have such norms.
            self.image.untouched = 0
        self.train(self.training)

    def open(self) -> None:
        """Make every parameter trainable; the statistics stay as `norm_stats` says."""
        self.requires_grad_(True)
        self.image.untouched = self.text.untouched = 0

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for norm in self.fixed_norms:
            norm.eval()
        return self

    def sites(self, kind: str, towers: tuple[str, ...] = ("image", "text")) -> list[Site]:
        """All sites of a kind in the named towers, in order. UserError where there is none."""
        found = [site for name in towers for site in self._sites[name] if site.kind == kind]
        if not found:
            raise UserError(f"this backbone has no {kind!r} site in its {' or '.join(towers)} tower")
        return found

    def forward(self, image: Tensor | Known, tokens_BL: Tensor) -> Features:
        """Run both towers apart, on images (B, 3, H, W) or on what is known of them."""
        return Features(self.encode_image(image), *self.encode_text(tokens_BL))

    def encode_image(self, image: Tensor | Known) -> tuple[Tensor, ...]:
        """The maps of `Features`."""
        tower, maps = self.image, []
        x = tower.step(0, image)
        for number in range(1, len(tower.stages) + 1):
            x = tower.step(number, x)
            if number < len(tower.stages):
                maps.append(tower.map_of(x))
        return (*maps, tower.step(len(tower.stages) + 1, x))

    def encode_text(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words, sentence and padding of `Features`."""
        y = self.text.stem(tokens_BL)
        for stage in self.text.stages:
            y = stage(y)
        return (*self.text.head(y), y.pad_BL)


def resize_positions(positions_NC: Tensor, height: int, width: int, offset: float = 0.0) -> Tensor:
    """A square grid of position embeddings (N, C) resized to height x width, bicubic: (height * width, C).

    `offset` is added to both where the scale between the two grids is computed, as DINOv2's own code does
    (facebookresearch/dinov2 dinov2/models/vision_transformer.py, `interpolate_offset`).
    """
    side = round(len(positions_NC) ** 0.5)
    if (height, width) == (side, side):
        return positions_NC
    grid = positions_NC.T.unflatten(1, (side, side))[None]
    # Without an offset the size itself is given: computed from a scale, it could be one cell short.
    scale = ((height + offset) / side, (width + offset) / side) if offset else None
    size = None if offset else (height, width)
    resized = nn.functional.interpolate(grid, size, scale, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` builds with its random numbers drawn from `seed`, whatever was drawn before or is drawn after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
