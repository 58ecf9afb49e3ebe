"""The whole program is this arrow: a trial becomes a result."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from ris_bench import cache, evaluation, plugins
from ris_bench.backbones.weights import Weights
from ris_bench.data.audit import separate
from ris_bench.data.dataset import DATASETS
from ris_bench.data.loading import Pixels, ReferentBatches, Tokenizer
from ris_bench.data.samples import Sample, shuffled
from ris_bench.data.transforms import Letterbox
from ris_bench.features import FrozenFeatures, Room, frozen_features
from ris_bench.model import RISModel, build
from ris_bench.records import Cost, Epoch, Params, Provenance, Result, Scores, Trial
from ris_bench.training import reduced, train

SHUFFLED = "/shuffled"
EVAL_BATCH_SIZE = 32
"""Expressions per forward pass of an evaluation; it changes no score."""
LOADING_PROCESSES = 4
"""Per trial on a GPU. On a CPU the trial loads its own data, so as not to take other trials' cores."""


class Places(NamedTuple):
    """Where a machine keeps what a trial needs; none of it can change a number."""

    data: Path
    weights: Path | None
    feature_bytes: int = 0
    """How much room frozen features may take in the cache folder."""


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


def run_trial(trial: Trial, folder: Path, places: Places, report: Callable[[Progress], None]) -> Result:
    """Train, select the checkpoint, evaluate; write expressions.parquet, tuned.safetensors, overlays/ and log.txt.

    Whatever goes wrong inside ends in a result with status "failed"; the traceback is in log.txt. `folder` exists.
    """
    run = _Run(trial, folder, places, report)
    try:
        run.execute()
        status, error = "done", None
    except Exception as failure:
        run.log(traceback.format_exc())
        lines = str(failure).splitlines() or [""]
        status, error = "failed", f"{type(failure).__name__}: {lines[0]}"
    return run.result(status, error)


class _Run:
    """One execution of a trial, with what is known so far, which is what a failed result holds too."""

    def __init__(self, trial: Trial, folder: Path, places: Places, report: Callable[[Progress], None]) -> None:
        self.trial, self.folder, self.report = trial, folder, report
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            # One thread each: sums come out in one order whichever executor runs the trial, and trials share the cores.
            torch.set_num_threads(1)
        else:
            torch.cuda.reset_peak_memory_stats()
        self.places, self.weights = places, Weights(places.weights)
        self.started = datetime.now(timezone.utc)
        self.params: Params | None = None
        self.cost: Cost | None = None
        self.history: list[Epoch] = []
        self.selected: Epoch | None = None
        self.scores: dict[str, Scores] = {}
        self.steps = 0
        self.clock = time.monotonic()
        self.train_seconds = self.eval_seconds = 0.0

    def log(self, line: str) -> None:
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {line}\n")

    def execute(self) -> None:
        trial, training = self.trial, self.trial.train
        self.tell("load")
        dataset = DATASETS.build(trial.dataset)
        dataset.locate(self.places.data)
        # Convolutions with channels last: on a CPU a step of full tuning takes 0.8 of the time.
        model = build(trial, self.weights).to(self.device, memory_format=torch.channels_last)
        self.params = model.count()
        self.log(f"{trial.id} on {device_name(self.device)}: {self.params}")
        self.tokenizer = Tokenizer(dataset.word_len, model.backbone.vocab_size)
        samples = {split: self.read(dataset, split) for split in trial.eval.splits or dataset.eval_splits}
        validation = samples.get(trial.eval.select_on) or self.read(dataset, trial.eval.select_on)
        learnt = separate(
            dataset.read(self.places.data, training.split),
            {**samples, trial.eval.select_on: validation},
            dataset.leakage,
        )
        batches = ReferentBatches(
            learnt,
            self.tokenizer,
            model.backbone.image_size,
            training.batch_size,
            trial.seed,
            self.loading_processes,
            self.features(model, learnt),
        )
        self.steps = len(batches) * training.epochs
        sizes = ", ".join(f"{len(expressions)} expressions in {split}" for split, expressions in samples.items())
        self.log(f"{batches.num_referents} referents, {self.steps} steps; {sizes}")

        torch.manual_seed(trial.seed)
        self.lap()
        best, best_frame = {}, pd.DataFrame()
        for epoch in train(model, batches, training, self.device, self.on_step):
            self.train_seconds += self.lap()
            line = epoch
            if epoch.epoch % trial.eval.every == 0 or epoch.epoch == training.epochs:
                frame, scores = self.evaluate(model, trial.eval.select_on, validation)
                line = Epoch(**{**vars(epoch), "oiou": scores.oiou, "miou": scores.miou})
                if self.selected is None or self.metric(line) > self.metric(self.selected):
                    self.selected, best_frame = line, frame
                    best = {name: tensor.detach().clone() for name, tensor in model.tuned_tensors().items()}
            self.history.append(line)
            self.log(str(line))
        model.set_tuned(best, "the selected checkpoint")
        model.save_tuned(self.folder / "tuned.safetensors")

        frames = {}
        for split, expressions in samples.items():
            if split == trial.eval.select_on:
                frames[split], self.scores[split] = best_frame, evaluation.scores(best_frame)
            else:
                frames[split], self.scores[split] = self.evaluate(model, split, expressions)
            self.log(f"{split}: {self.scores[split]}")
        evaluation.write(frames, self.folder / "expressions.parquet")
        evaluation.overlays(model, validation, self.folder / "overlays", **self.settings)
        self.cost = self.measure(batches.num_referents * training.epochs)

    def features(self, model: RISModel, samples: list[Sample]) -> FrozenFeatures | None:
        with evaluation.inference(model):
            return frozen_features(
                model.backbone.image,
                samples,
                Pixels(Letterbox(model.backbone.image_size), 0).images,
                self.weights.sha256,
                Room(cache.folder() / "features", self.places.feature_bytes),
                device=self.device,
                autocast=reduced(self.trial.train.precision, self.device),
                log=self.log,
                report=lambda: self.tell("load"),
            )

    def read(self, dataset, split: str) -> list[Sample]:
        samples = dataset.read(self.places.data, split.removesuffix(SHUFFLED))
        return shuffled(samples, self.trial.seed) if split.endswith(SHUFFLED) else samples

    @property
    def loading_processes(self) -> int:
        return 0 if self.device.type == "cpu" else LOADING_PROCESSES

    @property
    def precision(self) -> str:
        """The arithmetic that is really used."""
        asked = self.trial.train.precision
        return "fp32" if reduced(asked, self.device) is None else asked

    @property
    def settings(self) -> dict:
        return {
            "tokenizer": self.tokenizer,
            "threshold": self.trial.eval.threshold,
            "batch_size": EVAL_BATCH_SIZE,
            "device": self.device,
            "autocast": reduced(self.trial.train.precision, self.device),
        }

    def evaluate(self, model, split: str, samples: list[Sample]) -> tuple[pd.DataFrame, Scores]:
        self.lap()
        frame = evaluation.evaluate(
            model,
            samples,
            **self.settings,
            num_workers=self.loading_processes,
            report=lambda done, total: self.tell(f"evaluate {split}"),
        )
        self.eval_seconds += self.lap()
        return frame, evaluation.scores(frame)

    def metric(self, epoch: Epoch) -> float:
        return getattr(epoch, self.trial.eval.metric)

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.clock = self.clock, time.monotonic()
        return self.clock - before

    def on_step(self, epoch: int, batch: int, loss: float) -> None:
        step = epoch * (self.steps // self.trial.train.epochs) + batch + 1
        running = time.monotonic() - self.clock
        elapsed = self.train_seconds + self.eval_seconds + running
        rate = step * self.trial.train.batch_size / (self.train_seconds + running)
        self.tell("train", epoch + 1, step, loss, rate, elapsed / step * (self.steps - step))

    def tell(
        self,
        phase: str,
        epoch: int | None = None,
        step: int = 0,
        loss: float | None = None,
        rate: float | None = None,
        eta: float | None = None,
    ) -> None:
        score = None if self.selected is None else self.metric(self.selected)
        done = len(self.history) + 1 if epoch is None else epoch
        epochs = self.trial.train.epochs
        self.report(
            Progress(
                trial_id=self.trial.id,
                phase=phase,
                epoch=min(done, epochs),
                epochs=epochs,
                step=step,
                steps=self.steps,
                loss=loss,
                images_per_second=rate,
                eta_seconds=eta,
                score=score,
            )
        )

    def measure(self, images: int) -> Cost:
        on_gpu = self.device.type == "cuda"
        # Linux counts the resident peak in KiB, macOS in bytes.
        unit = 1 if platform.system() == "Darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Cost(
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            train_images_per_second=images / self.train_seconds,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else resident,
            tuned_bytes=(self.folder / "tuned.safetensors").stat().st_size,
            device=device_name(self.device),
        )

    def result(self, status: str, error: str | None) -> Result:
        return Result(
            trial=self.trial,
            status=status,
            error=error,
            scores=self.scores if status == "done" else {},
            selected_epoch=self.selected and self.selected.epoch,
            history=tuple(self.history),
            params=self.params,
            cost=self.cost,
            provenance=provenance(self.started, self.weights.sha256, self.precision),
        )


def device_name(device: torch.device) -> str:
    """As people call it: "NVIDIA H100", or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()}), 1 thread"


def provenance(started: datetime, weights: dict[str, str], precision: str) -> Provenance:
    """Which code and packages are at work; the commit is None outside a checkout of the project."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    tracked = git("ls-files", "--error-unmatch", "__init__.py") is not None
    packages = ("torch", "open_clip_torch", "timm", "peft", "numpy", "ris-bench")
    return Provenance(
        commit=git("rev-parse", "HEAD") if tracked else None,
        dirty=bool(git("status", "--porcelain", "--", here)) if tracked else None,
        versions={"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
        weights=weights,
        precision=precision,
        started=started.isoformat(timespec="seconds"),
        plugins=dict(plugins.LOADED),
    )
