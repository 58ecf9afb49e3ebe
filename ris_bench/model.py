"""A model is a backbone, a method injected into it, and a head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ris_bench.backbones.base import BACKBONES, Backbone, Features, Known
from ris_bench.backbones.weights import Weights
from ris_bench.data.dataset import DATASETS
from ris_bench.errors import UserError
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS, Method
from ris_bench.records import Params, Trial
from ris_bench.speed import TwoWays


@dataclass(frozen=True)
class Encoded:
    """What a model makes of images before it reads a sentence, all that it can."""

    maps_BCHW: tuple[Tensor, ...]
    """As the head has prepared them, or as `Features` has them where it prepares nothing."""

    def __getitem__(self, row_B: Tensor) -> Encoded:
        """The same for rows of the batch, which may repeat."""
        return Encoded(tuple(map_BCHW[row_B] for map_BCHW in self.maps_BCHW))


class RISModel(TwoWays):
    """Images (B, 3, H, W), normalised, and tokens (B, L), int64 -> logits (B, 1, h, w)."""

    def __init__(self, backbone: Backbone, method: Method, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.method, self.head = backbone, method, head

    def forward(self, image: Tensor | Known | Encoded, tokens_BL: Tensor, row_B: Tensor | None = None) -> Tensor:
        """What `known` says of images can stand in their place.

        Expression i is of image i or, where there is `row_B`, of image `row_B[i]`: what the image tower makes of an
        image whatever stands in other rows is then computed once (`ImageTower.shared`), unless the towers meet.
        """
        if row_B is not None:
            shared = self.fast and self._apart and not isinstance(image, Encoded)
            image = self.backbone.image.shared(image, row_B) if shared else image[row_B]
        if not isinstance(image, Encoded):
            return self.head(self.method(self.backbone, image, tokens_BL))
        features = Features(image.maps_BCHW, *self.backbone.encode_text(tokens_BL))
        return self.head.decode(features) if self._prepares else self.head(features)

    def known(self, image: Tensor | Known) -> Tensor | Known | Encoded:
        """What can be worked out of images without a sentence, once for all of theirs.

        While the model learns, that is what `ImageTower.known` says. In evaluation, where tuned parameters stand still,
        it is the whole image tower, unless the method makes the towers meet. For `plain` models the images themselves.
        """
        if not self.fast:
            return image
        if self.training or torch.is_grad_enabled() or not self._apart or isinstance(image, Known):
            return self.backbone.image.known(image)
        maps = self.backbone.encode_image(image)
        return Encoded(self.head.prepare(maps) if self._prepares else maps)

    @property
    def _apart(self) -> bool:
        """Whether the towers do not meet."""
        return type(self.method).forward is Method.forward

    @property
    def _prepares(self) -> bool:
        return hasattr(self.head, "prepare")

    def moving_statistics(self, *parts: nn.Module) -> dict[str, Tensor]:
        """Running means and variances that training moves, by name; of the whole model if no part is named."""
        fixed = set(self.backbone.fixed_norms)
        inside = {module for part in parts or (self,) for module in part.modules()}
        return {
            f"{name}.{key}": buffer
            for name, module in self.named_modules()
            if isinstance(module, _BatchNorm) and module not in fixed and module in inside
            for key, buffer in module.named_buffers(recurse=False)
        }

    def tuned_tensors(self) -> dict[str, Tensor]:
        """What pretrained weights do not give back: tuned parameters, moving statistics, frozen tensors of no file."""
        kept = tuple(f"backbone.{prefix}" for prefix in self.backbone.not_pretrained)
        tensors = {name: p for name, p in self.named_parameters() if p.requires_grad}
        tensors |= self.moving_statistics()
        # Layers may share a frozen tensor, under a name in each: it is saved once, as a shared parameter is.
        frozen = {name: t for name, t in self.state_dict(keep_vars=True).items() if kept and name.startswith(kept)}
        first = {id(t): name for name, t in reversed(frozen.items())}
        return tensors | {name: t for name, t in frozen.items() if first[id(t)] == name}

    def save_tuned(self, file: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in self.tuned_tensors().items()}, file)

    def load_tuned(self, file: Path) -> None:
        """Strict: the file must hold exactly the tuned tensors of this model. Raises UserError otherwise."""
        try:
            saved = load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read the tuned tensors {file}: {error}") from error
        self.set_tuned(saved, str(file))

    def set_tuned(self, saved: dict[str, Tensor], source: str) -> None:
        own = self.tuned_tensors()
        shapes, given = ({name: t.shape for name, t in state.items()} for state in (own, saved))
        wrong = sorted({name for name, _ in shapes.items() ^ given.items()})
        if wrong:
            raise UserError(f"{source} does not fit this model: {len(wrong)} tensors differ, the first is {wrong[0]}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def count(self) -> Params:
        statistics = self.moving_statistics(self.backbone, self.method)
        return Params(
            tunable_backbone=count(self.backbone, self.method, tunable=True),
            tunable_head=count(self.head, tunable=True),
            moving_statistics=sum(t.numel() for name, t in statistics.items() if "running" in name),
            total=count(self),
            prompt=self.count_prompt(),
        )

    def count_prompt(self) -> int:
        """Tunable scalars that stand before the words of a sentence."""
        prompts = self.backbone.sites("prompt", ("text",))
        return count(*(getattr(site.parent, site.attr) for site in prompts), tunable=True)


def count(*parts: nn.Module, tunable: bool = False) -> int:
    """Scalars in the parameters of the parts, by identity."""
    distinct = {p for part in parts for p in part.parameters() if p.requires_grad or not tunable}
    return sum(p.numel() for p in distinct)


def build(trial: Trial, weights: Weights | None) -> RISModel:
    """The model of a trial, before training; without pretrained weights where `weights` is None.

    The three parts draw from the seed apart, so that every method of an experiment meets the same head.
    """
    torch.manual_seed(trial.seed)
    backbone = BACKBONES.build(trial.backbone, weights)
    torch.manual_seed(trial.seed)
    method = METHODS.build(trial.method, backbone)
    torch.manual_seed(trial.seed)
    return RISModel(backbone, method, HEADS.build(trial.head, backbone))


def count_parameters(trial: Trial) -> Params:
    """Counts without memory or weights, on the meta device. Raises UserError for an impossible combination."""
    with torch.device("meta"):
        model = build(trial, None)
        # A method may lengthen the sentences; the text tower refuses those that are too long for it.
        model.backbone.text.stem(torch.zeros(1, DATASETS.build(trial.dataset).word_len, dtype=torch.long))
        return model.count()
