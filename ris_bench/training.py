"""One training loop, ignorant of methods and files: Adam on what is trainable, a step schedule, one epoch at a time."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from ris_bench.data.samples import draw
from ris_bench.loading import Batch, ReferentBatches
from ris_bench.model import RISModel
from ris_bench.parallel import ALONE, MemoryElsewhereError, Team, batch_norms
from ris_bench.records import Epoch, Training

HALVES = {"fp32": None, "tf32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The dtype that a precision has tensors in; None where that is float32."""


def reduced(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision; None where there is none, as on a CPU, which computes in fp32 whatever is asked."""
    return None if device.type == "cpu" else HALVES[precision]


def settle(precision: str, device: torch.device) -> str:
    """Have this process compute with fp32 numbers as the `Training.precision` says, and tell what that really is.

    Left alone, PyTorch takes TF32 for convolutions and not for products. A CPU has fp32 alone, and a GPU older than
    NVIDIA's Ampere no TF32.
    """
    if device.type == "cpu" or (precision == "tf32" and torch.cuda.get_device_capability(device) < (8, 0)):
        precision = "fp32"
    # Not by their successors, `fp32_precision`: PyTorch 2.5 has none, and a compiler reads these.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def segmentation_loss(logits_B1hw: Tensor, mask_B1HW: Tensor, dice: float) -> Tensor:
    """Binary cross-entropy at the resolution of the logits, to which the mask is brought by nearest neighbour as in the
    released code (ETRIS model/segmenter.py:66-70), plus `dice` times a soft Dice loss per expression."""
    logits_B1hw = logits_B1hw.float()
    mask_B1hw = F.interpolate(mask_B1HW, logits_B1hw.shape[-2:], mode="nearest")
    loss = F.binary_cross_entropy_with_logits(logits_B1hw, mask_B1hw)
    if dice:
        probability_B1hw = logits_B1hw.sigmoid()
        overlap_B = (probability_B1hw * mask_B1hw).flatten(1).sum(1)
        size_B = (probability_B1hw + mask_B1hw).flatten(1).sum(1)
        loss = loss + dice * (1 - (2 * overlap_B + 1) / (size_B + 1)).mean()
    return loss


def learning_rate(training: Training, epoch: int) -> float:
    """That of an epoch, counted from 0: multiplied by `gamma` at every milestone that has been reached."""
    rate = training.lr
    for _ in filter(lambda milestone: milestone <= epoch, training.milestones):
        rate *= training.gamma
    return rate


class Loop:
    """Where training stands: in the model's tuned tensors, in the optimizer, and in the epochs.

    Between two steps `state_dict` is all of it, and the rest of the training depends on nothing else: on a CPU it is
    the same to the last bit in a loop that has loaded it.
    """

    def __init__(
        self, model: RISModel, training: Training, device: torch.device, team: Team = ALONE, seed: int = 0
    ) -> None:
        """The processes of a team take every step together, each with its share of the batch. From `seed` all but the
        leader, whose state is that of the team, draw for each step anew."""
        self.model, self.training, self.device, self.team, self.seed = model, training, device, team, seed
        team.careful = training.out_of_memory == "split"
        self.tuned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Fused, a step passes once over what it changes, where a sum at a time takes a dozen passes.
        self.optimizer = torch.optim.Adam(self.tuned.values(), lr=training.lr, fused=True)
        self.dtype = reduced(training.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.epoch = self.batch = 0
        """Epochs that are over, and batches trained on in the one that follows."""
        self.total, self.seen = 0.0, 0
        """Of that epoch: the sum of the losses of its samples, and their number."""
        self.parts = training.accumulate
        """Micro-batches that a batch is split into."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, which are not copied, and what JSON takes, by name."""
        state = {f"tuned/{name}": tensor.detach() for name, tensor in self.model.tuned_tensors().items()}
        for name, p in self.tuned.items():
            state |= {f"optimizer/{name}/{key}": moment for key, moment in self.optimizer.state.get(p, {}).items()}
        state |= {f"rng/{kind}": generator.get_state() for kind, generator in self._generators.items()}
        state |= {key: getattr(self, key) for key in ("epoch", "batch", "total", "seen", "parts")}
        return state | {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, also one with more in it. Raises ValueError, and changes nothing, where it does not fit."""
        tuned = self.model.tuned_tensors()
        fit(tuned, under(state, "tuned"))
        random = under(state, "rng")
        fit({kind: generator.get_state() for kind, generator in self._generators.items()}, random)
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.tuned}
        for path, moment in under(state, "optimizer").items():
            name, _, key = path.rpartition("/")
            if name not in moments or moment.shape != (() if key == "step" else self.tuned[name].shape):
                raise ValueError(f"the optimizer has no {path} of shape {tuple(moment.shape)}")
            moments[name][key] = moment
        epoch, batch, total, seen = (state[key] for key in ("epoch", "batch", "total", "seen"))
        parts, scaler = state["parts"], state["scaler"]
        if scaler.keys() != self.scaler.state_dict().keys():
            raise ValueError("its gradients were scaled otherwise")

        with torch.no_grad():
            for name, tensor in tuned.items():
                tensor.copy_(state[f"tuned/{name}"])
        for name, p in self.tuned.items():
            # In the order in memory of what they belong to: a kernel may round otherwise where two orders meet.
            self.optimizer.state[p] = {
                key: moment.to(p.device, copy=True) if key == "step" else torch.empty_like(p).copy_(moment)
                for key, moment in moments[name].items()
            }
        self.scaler.load_state_dict(scaler)
        for kind, generator in self._generators.items():
            generator.set_state(random[kind])
        self.epoch, self.batch, self.total, self.seen, self.parts = epoch, batch, total, seen, parts

    def step(self, batch: Batch) -> float:
        """One step of the optimizer; gives the loss, and takes the step only where that is finite.

        Where memory runs out, and the training allows it, it begins again with smaller micro-batches: in all processes.
        """
        if not self.team.leads:
            for generator in self._generators.values():
                generator.manual_seed(draw("dropout", self.seed, self.team.rank, self.epoch, self.batch))
        splits = self.training.out_of_memory == "split"
        while True:
            # What a part that did fit has changed already.
            random = {kind: generator.get_state() for kind, generator in self._generators.items()} if splits else {}
            statistics = self.model.moving_statistics() if splits else {}
            before = {name: tensor.clone() for name, tensor in statistics.items()}
            try:
                loss = self._gradients(batch)
                break
            except (RuntimeError, MemoryError) as error:
                # BatchNorm in the head needs two samples in each part.
                if not (splits and out_of_memory(error) and 2 * self.parts <= batch.size // 2):
                    raise
                if not isinstance(error, MemoryElsewhereError):
                    self.team.all_fit(False)
            self.parts *= 2
            self.optimizer.zero_grad()
            for kind, state in random.items():
                self._generators[kind].set_state(state)
            for name, tensor in before.items():
                statistics[name].copy_(tensor)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if math.isfinite(loss):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            for p in self.tuned.values():
                increment_version(p)  # which a fused step does not
        self.optimizer.zero_grad()
        return loss

    def _gradients(self, batch: Batch) -> float:
        """Add those of a batch, and give its loss: of all its rows, whichever process has them."""
        device, dtype, size = self.device, self.dtype, batch.size
        parts = min(self.parts, max(1, size // 2))
        loss = 0.0
        image, rounding = batch.image_U3HW.to(device, non_blocking=True), HALVES[self.training.feature_precision]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            known = self.model.known(self.model.backbone.image.known(image, rounding) if rounding else image)
        here = (t.to(device, non_blocking=True) for t in (batch.row_B, batch.tokens_BL, batch.mask_B1HW))
        row_B, tokens_BL, mask_B1HW = here
        own = self.team.share(range(size))
        for part in torch.arange(size).tensor_split(parts):
            start, stop = bisect_left(own, part[0]), bisect_right(own, part[-1])
            number = stop - start
            rows = slice(start, stop) if number else slice(0, 1)
            with batch_norms(self.team, present=number > 0):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    # Else few rows share an image, by chance, and every part of a batch keeps the shape of the others.
                    if self.training.expressions_per_image > 1:
                        logits = self.model(known, tokens_BL[rows], row_B[rows])
                    else:
                        logits = self.model(known[row_B[rows]], tokens_BL[rows])
                weighted = segmentation_loss(logits, mask_B1HW[rows], self.training.dice) * (number / size)
                self.scaler.scale(weighted).backward()
            loss += weighted.item()
        self.team.sum(*(p.grad for p in self.tuned.values() if p.grad is not None))
        total = torch.tensor(loss, dtype=torch.float64)
        self.team.sum(total)
        return total.item()

    @property
    def _generators(self) -> dict[str, torch.Generator]:
        """Those that dropout draws from."""
        generators = {"cpu": torch.default_generator}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
        return generators


def out_of_memory(error: BaseException) -> bool:
    """Whether that of a GPU or of the machine was not enough."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What stands in a state under names that begin with "prefix/", by the rest of the name."""
    return {name.removeprefix(f"{prefix}/"): item for name, item in state.items() if name.startswith(f"{prefix}/")}


def fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the names, shapes or dtypes of tensors are not the same."""
    layouts = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (own, given))
    differing = sorted({name for name, _ in set.symmetric_difference(*(set(layout.items()) for layout in layouts))})
    if differing:
        raise ValueError(f"{len(differing)} tensors differ, the first is {differing[0]}")


def train(loop: Loop, batches: ReferentBatches, on_step: Callable[[float], None]) -> Iterator[Epoch]:
    """Go on from where the loop stands. Yield after every epoch, so that the caller can validate; `on_step(loss)` is
    called after every step.

    Until the caller goes on, the loop stands behind the last batch of the epoch that was yielded: what is loaded from
    there yields that epoch again.

    Raises FloatingPointError as soon as a loss is not finite.
    """
    while loop.epoch < loop.training.epochs:
        rate = learning_rate(loop.training, loop.epoch)
        for group in loop.optimizer.param_groups:
            group["lr"] = rate
        loop.model.train()
        for batch in batches.epoch(loop.epoch, loop.batch):
            loss, size = loop.step(batch), batch.size
            if not math.isfinite(loss):
                place = f"epoch {loop.epoch + 1}, batch {loop.batch + 1} of {len(batches)}"
                raise FloatingPointError(f"the loss is {loss} at {place}")
            loop.total, loop.seen, loop.batch = loop.total + loss * size, loop.seen + size, loop.batch + 1
            on_step(loss)
        yield Epoch(epoch=loop.epoch + 1, loss=loop.total / loop.seen, lr=rate)
        loop.epoch, loop.batch, loop.total, loop.seen = loop.epoch + 1, 0, 0.0, 0
