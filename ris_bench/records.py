"""What a trial is, what it is given, and what is known of it meanwhile and afterwards: plain data.

Trials and results are written to and read from JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A registered name with the value of every one of its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    """sha256 of the plug-in that it comes from: another code is another trial. None for what the project has."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a trial is trained: Adam, a step schedule, one random expression per referent and epoch."""

    epochs: int
    batch_size: int
    """Referents per optimizer step."""
    lr: float
    milestones: tuple[int, ...]
    """Epochs after which the learning rate is multiplied by `gamma`."""
    gamma: float
    precision: Literal["fp32", "tf32", "fp16", "bf16"]
    """Arithmetic on a GPU; a CPU always computes in fp32.

    fp32 is that everywhere. tf32 rounds what enters products and convolutions to 10 bits of mantissa, in the forward
    and the backward pass. fp16 and bf16 are PyTorch's autocast; what that leaves in fp32 is fp32.
    """
    accumulate: int = 1
    """Micro-batches that a batch is split into: less memory, the same batch size."""
    dice: float = 0.0
    """Weight of a Dice loss added to the binary cross-entropy."""
    split: str = "train"
    out_of_memory: Literal["fail", "split"] = "fail"
    """What a step does that does not fit: with "split" it and all after it have twice as many micro-batches.

    The batch stays what it was; but the head normalises over a micro-batch, so that scores depend on where that is.
    """
    stop_below: tuple[tuple[int, float], ...] = ()
    """Epochs with a score: training ends after one of them if the best validation score so far is lower."""
    expressions_per_image: int = 1
    """So many referents of an image come side by side, with an expression each (see `ReferentBatches`): what reads no
    sentence is computed once for them. With 1 each comes when it is its own turn, as the papers have it."""
    feature_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """To which what the untouched steps of the image tower make of a training image is rounded, whether it is kept on
    disk, where it then takes half the room, or not. Evaluations do not round it."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and on which split the checkpoint is selected."""

    select_on: str
    metric: Literal["miou", "oiou"] = "miou"
    every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    threshold: float = 0.35
    """A pixel belongs to the mask where its probability is greater."""
    splits: tuple[str, ...] = ()
    """Splits reported; none named means every evaluation split of the dataset.

    "testA/shuffled" is testA with its expressions dealt out to other referents: what a model scores that does not read.
    """


@dataclass(frozen=True, kw_only=True)
class Trial:
    """All that can change a number, and nothing else: no path, no device, no number of workers."""

    dataset: Choice
    backbone: Choice
    method: Choice
    head: Choice
    train: Training
    eval: Evaluation
    seed: int

    @cached_property
    def id(self) -> str:
        """Readable parts and a content hash: `refcoco.clip-r101.lora.s0.4de1a2c6`."""
        content = json.dumps(plain(self), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return f"{self.dataset.name}.{self.backbone.name}.{self.method.name}.s{self.seed}.{digest}"

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Trial:
        """The inverse of `plain`, also after a round trip through JSON."""
        choices = {key: Choice(**tuples(record[key])) for key in ("dataset", "backbone", "method", "head")}
        return cls(
            **choices,
            train=Training(**tuples(record["train"])),
            eval=Evaluation(**tuples(record["eval"])),
            seed=record["seed"],
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of one split, as fractions in [0, 1]."""

    oiou: float
    """Overall IoU: the sum of all intersections over the sum of all unions (cIoU in other papers)."""
    miou: float
    """Mean IoU: the mean over expressions of intersection over union."""
    precision_at: Mapping[str, float]
    """Share of expressions whose IoU is greater than the threshold, keyed "0.5" ... "0.9"."""
    num_expressions: int
    by_threshold: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What "oiou" and "miou" were if a pixel were predicted above another probability, keyed "0.05" ... "0.95".

    The greatest of them is that of an oracle: a threshold chosen on the split that is scored.
    """
    rounded: Mapping[str, float] = field(default_factory=dict)
    """What "oiou" and "miou" are with the image features rounded as in training, if they are, on the validation split:
    next to the scores themselves it tells what `Training.feature_precision` does to them."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """Numbers of scalars, counted by identity: a tensor that two modules share counts once."""

    tunable_backbone: int
    """With gradient, in the backbone or injected into it by the method."""
    tunable_head: int
    moving_statistics: int
    """Elements of the backbone's and method's normalisation statistics that training moves."""
    total: int
    """Every parameter of the model, frozen ones included."""
    prompt: int | None = None
    """Of `tunable_backbone`, the vectors that stand before the words of a sentence; None where nobody counted them."""

    @property
    def tunable(self) -> int:
        """All with gradient."""
        return self.tunable_backbone + self.tunable_head


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the trial took on the machine that ran it."""

    train_seconds: float
    eval_seconds: float
    train_images_per_second: float
    peak_memory_bytes: int
    """Peak device memory on a GPU, peak resident memory of the process on a CPU: of the process that needs most."""
    tuned_bytes: int
    """Size of the saved tuned tensors."""
    device: str
    micro_batches: int | None = None
    """That a batch was split into at the end of the training; None where nobody counted them."""
    processes: int = 1
    """That shared the work, each for as long as the trial took."""
    speed: str | None = None
    """How it computed (see `ris_bench.speed`); None where nobody noted it."""
    recompute: bool = False
    """Whether the backward pass computed again what is inside the blocks of towers and head."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of the learning curve; the validation scores are None where the epoch was not validated."""

    epoch: int
    loss: float
    lr: float
    oiou: float | None = None
    miou: float | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which code and packages made the result."""

    commit: str | None
    dirty: bool | None
    versions: Mapping[str, str]
    weights: Mapping[str, str]
    """sha256 of every weight file that was loaded, by file name."""
    precision: str
    """The arithmetic that was really used."""
    started: str
    """UTC, ISO 8601."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every plug-in that was loaded, by the name that the experiment gives it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that is known of what happened to a trial, failures included."""

    trial: Trial
    status: Literal["done", "failed"]
    error: str | None
    scores: Mapping[str, Scores]
    """By split, in the order reported."""
    selected_epoch: int | None
    history: tuple[Epoch, ...]
    params: Params | None
    cost: Cost | None
    provenance: Provenance

    @property
    def stopped(self) -> bool:
        """Whether its training was ended before the last epoch, as `Training.stop_below` says."""
        return self.status == "done" and bool(self.history) and self.history[-1].epoch < self.trial.train.epochs

    def to_json(self) -> str:
        return json.dumps({"id": self.trial.id, **plain(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises ValueError, KeyError or TypeError where the text is not a whole result."""
        record = json.loads(text)
        del record["id"]
        return cls(
            **{
                **record,
                "trial": Trial.from_dict(record["trial"]),
                "scores": {split: Scores(**scores) for split, scores in record["scores"].items()},
                "history": tuple(Epoch(**epoch) for epoch in record["history"]),
                "params": record["params"] and Params(**record["params"]),
                "cost": record["cost"] and Cost(**record["cost"]),
                "provenance": Provenance(**record["provenance"]),
            }
        )


_LATER = (
    ("code", None),
    ("out_of_memory", "fail"),
    ("stop_below", ()),
    ("expressions_per_image", 1),
    ("feature_precision", "fp32"),
    ("rounded", {}),
)
"""Fields that trials once were without: with this value they are left out, so that a trial is still the same trial."""


def plain(record: Any) -> dict[str, Any]:
    """A record as JSON takes it."""
    return asdict(record, dict_factory=lambda items: {key: v for key, v in items if (key, v) not in _LATER})


def tuples(value: Any) -> Any:
    """A value with tuples for its lists: JSON has lists only, and records compare equal after a round trip."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


Speed = Literal["plain", "fast", "compiled"]
"""How a model computes (see `speed`)."""


class Places(NamedTuple):
    """Where a machine keeps what a trial needs, and how it computes; none of it can change a number but by rounding."""

    data: Path
    weights: Path | None
    feature_bytes: int = 0
    """How much room letterboxed images and masks and frozen features may take in the cache folder; with 0 none is
    kept."""
    checkpoint_seconds: float = 0
    """How much of a training may be lost if its process dies; 0 writes no checkpoints."""
    speed: Speed = "fast"
    recompute: bool = False
    """Whether what is inside the blocks of towers and head is computed again in the backward pass, for less memory."""
    processes: int = 1
    """How many share the work of a trial, each with a GPU of its own or, without GPUs, a core (see `parallel`)."""


class Progress(NamedTuple):
    """What a running trial tells of itself after every step."""

    trial_id: str
    phase: str
    """ "load", "train" or "evaluate SPLIT"."""
    epoch: int
    epochs: int
    step: int
    steps: int
    """Of the whole training."""
    loss: float | None
    images_per_second: float | None
    eta_seconds: float | None
    """Until the end of training, validations included."""
    score: float | None
    """The best on the validation split so far."""
    warning: str | None = None
    """What should be known of the trial before it is over."""
