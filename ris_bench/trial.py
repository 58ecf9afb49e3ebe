"""The whole program is this arrow: a trial becomes a result."""

from __future__ import annotations

import io
import platform
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar
from torch import Tensor

from ris_bench import cache, checkpoints, code, evaluation, parallel, plugins
from ris_bench.audit import separate
from ris_bench.backbones.base import Known
from ris_bench.backbones.weights import Weights
from ris_bench.data.dataset import DATASETS
from ris_bench.data.samples import Sample, shuffled
from ris_bench.features import FrozenFeatures, frozen_features
from ris_bench.kept import Room
from ris_bench.loading import ReferentBatches, Tokenizer
from ris_bench.model import RISModel, build
from ris_bench.parallel import ALONE, Team
from ris_bench.pixels import Images, Masks
from ris_bench.records import Cost, Epoch, Params, Places, Progress, Result, Scores, Trial, plain
from ris_bench.results import CHECKPOINTS
from ris_bench.speed import choose, missing_compiler
from ris_bench.training import HALVES, Loop, fit, out_of_memory, reduced, settle, train, under

SHUFFLED = "/shuffled"
EVAL_BATCH_SIZE = 32
"""Expressions per forward pass of an evaluation; it changes no score."""
LOADING_PROCESSES = 4
"""Per trial on a GPU. On a CPU the trial loads its own data, so as not to take other trials' cores."""


def run_trial(trial: Trial, folder: Path, places: Places, report: Callable[[Progress], None]) -> Result:
    """Train, select the checkpoint, evaluate; write expressions.parquet, tuned.safetensors, overlays/, log.txt and, for
    TensorBoard, tensorboard/.

    Whatever goes wrong inside ends in a result with status "failed"; the traceback is in log.txt. `folder` exists.
    Where it has checkpoints/, of an attempt that was cut off, the trial goes on from there and ends as if it had not
    been: on a CPU to the last bit. They are left there. A KeyboardInterrupt that `report` raises saves one more. Where
    it goes on, the number of processes may be another. If one of several dies, all begin again, once.
    """
    result = _attempt(trial, folder, places, report)
    return _attempt(trial, folder, places, report, last=True) if result is None else result


def _attempt(
    trial: Trial, folder: Path, places: Places, report: Callable[[Progress], None], *, last: bool = False
) -> Result | None:
    """None where another process has died, unless this is the last attempt."""
    run = _Run(trial, folder, places, report)
    try:
        loaded = tuple(plugins.LOADED.values())
        with run.room, parallel.team(places.processes, _follow, trial, folder, places, loaded) as run.team:
            run.execute()
        status, error = "done", None
    except parallel.ProcessDiedError as death:
        run.log(str(death))
        if not last:
            return None
        status, error = "failed", f"{death}, as one did before"
    except Exception as failure:
        run.log(traceback.format_exc())
        lines = str(failure).splitlines() or [""]
        status, error = "failed", f"{type(failure).__name__}: {lines[0]}"
        if out_of_memory(failure):
            hint = "" if trial.train.out_of_memory == "split" else "; train.out_of_memory: split tries smaller parts"
            error += f" (the peak was {run.peak() / 2**30:.1f} GiB{hint})"
    finally:
        if "board" in vars(run):
            with suppress(OSError):
                run.board.close()
    return run.result(status, error)


def _follow(team: Team, trial: Trial, folder: Path, places: Places, loaded: tuple[plugins.Plugin, ...]) -> None:
    """What the other processes of a trial do."""
    for plugin in loaded:
        plugin.load()
    run = _Run(trial, folder, places, lambda progress: None, team)
    with run.room:
        run.execute()


class _Run:
    """One execution of a trial, with what is known so far, which is what a failed result holds too.

    In every process of a team it is the same, but that only the leader's reports, reads checkpoints and writes.
    """

    def __init__(
        self, trial: Trial, folder: Path, places: Places, report: Callable[[Progress], None], team: Team = ALONE
    ) -> None:
        self.trial, self.folder, self.report, self.team = trial, folder, report, team
        self.device = torch.device(f"cuda:{team.rank}" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            # One thread each: sums come out in one order whichever executor runs the trial, and trials share the cores.
            torch.set_num_threads(1)
        else:
            torch.cuda.reset_peak_memory_stats()
        self.precision = settle(trial.train.precision, self.device)
        """The arithmetic that is really used."""
        self.places, self.weights = places, Weights(places.weights)
        self.room = Room(cache.folder() / "features", places.feature_bytes, self.log, lambda: self.tell("load"))
        self.speed = places.speed
        """That which is really used."""
        self.started = datetime.now(timezone.utc)
        self.params: Params | None = None
        self.cost: Cost | None = None
        self.history: list[Epoch] = []
        self.selected: Epoch | None = None
        self.best: dict[str, Tensor] = {}
        """The tuned tensors of the selected epoch."""
        self.frames: dict[str, pd.DataFrame] = {}
        """What they predict, by split; from the first validation on that of the split selected on."""
        self.scores: dict[str, Scores] = {}
        self.steps = 0
        self.clock = time.monotonic()
        self.train_seconds = self.eval_seconds = 0.0
        self.peak_memory_bytes = 0
        """Of earlier processes."""
        self.saved = self.clock
        self.loop: Loop | None = None

    def log(self, line: str) -> None:
        if not self.team.leads:
            return
        with suppress(OSError), open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {line}\n")

    def execute(self) -> None:
        trial, training = self.trial, self.trial.train
        self.tell("load")
        dataset = DATASETS.build(trial.dataset)
        dataset.locate(self.places.data)
        model = build(trial, self.weights).to(self.device)
        if self.speed == "compiled" and (why := self.uncompiled()):
            self.speed = "fast"
            self.log(f"nothing is compiled: {why}")
        choose(model, self.speed, self.places.recompute)
        self.params = model.count()
        self.log(f"{trial.id} on {self.device_name}: {self.params}")
        self.tokenizer = Tokenizer(dataset.word_len, model.backbone.vocab_size)
        samples = {split: self.read(dataset, split) for split in trial.eval.splits or dataset.eval_splits}
        validation = samples.get(trial.eval.select_on) or self.read(dataset, trial.eval.select_on)
        learnt = separate(
            dataset.read(self.places.data, training.split),
            {**samples, trial.eval.select_on: validation},
            dataset.leakage,
        )
        side = model.backbone.image_size
        known: Callable[[Sequence[Sample]], Any] | None = self.features(model, learnt)
        masks = Masks(side)
        self.photos = {split: Images(side) for split in {**samples, trial.eval.select_on: validation}}
        with self.team.leader_first():
            if known is None:
                known = Images(side)
                known.keep(learnt, self.room, self.loading_processes)
            masks.keep(learnt, self.room, self.loading_processes)
            for split, photos in self.photos.items():
                photos.keep(samples.get(split, validation), self.room, self.loading_processes)
        batches = ReferentBatches(
            learnt,
            self.tokenizer,
            side,
            training.batch_size,
            trial.seed,
            self.loading_processes,
            known,
            self.team,
            training.expressions_per_image,
            masks,
        )
        self.steps = len(batches) * training.epochs
        sizes = ", ".join(f"{len(expressions)} expressions in {split}" for split, expressions in samples.items())
        self.log(f"{batches.num_referents} referents, {self.steps} steps; {sizes}")

        torch.manual_seed(trial.seed)
        self.loop = Loop(model, training, self.device, self.team, trial.seed)
        if self.places.checkpoint_seconds:
            self.resume()
        self.saved = time.monotonic()
        self.draw(self.history)
        self.lap()
        for epoch in train(self.loop, batches, self.on_step):
            if epoch.epoch <= len(self.history):  # it was over before the checkpoint that training goes on from
                if self.is_outdone():
                    break
                continue
            line = epoch
            if validated := epoch.epoch % trial.eval.every == 0 or epoch.epoch == training.epochs:
                frame, scores = self.evaluate(model, trial.eval.select_on, validation)
                line = Epoch(**{**vars(epoch), "oiou": scores.oiou, "miou": scores.miou})
                if self.selected is None or self.metric(line) > self.metric(self.selected):
                    self.selected, self.frames = line, {trial.eval.select_on: frame}
                    self.best = {name: tensor.detach().clone() for name, tensor in model.tuned_tensors().items()}
            self.history.append(line)
            self.log(str(line))
            self.draw([line])
            if validated:
                self.save()
            if self.is_outdone():
                break
        model.set_tuned(self.best, "the selected checkpoint")
        if self.team.leads:
            model.save_tuned(self.folder / "tuned.safetensors")

        for split, expressions in samples.items():
            if split not in self.frames:
                self.frames[split], _ = self.evaluate(model, split, expressions)
                self.save()
            self.scores[split] = evaluation.scores(self.frames[split])
            self.log(f"{split}: {self.scores[split]}")
        self.compare_rounded(model, validation)
        self.peak_memory_bytes = max(self.team.gather(self.peak()))
        if not self.team.leads:
            return
        evaluation.write({split: self.frames[split] for split in samples}, self.folder / "expressions.parquet")
        evaluation.overlays(model, validation, self.folder / "overlays", **self.settings)
        self.cost = self.measure(batches.num_referents * len(self.history))

    def uncompiled(self) -> str | None:
        """Why regions are not compiled though it was asked for, if so."""
        if self.team.size > 1:
            return "norms over the rows of several processes cannot be"
        return missing_compiler(self.device)

    @cached_property
    def board(self) -> EventsWriter:
        """For TensorBoard. Not its SummaryWriter, whose thread ends when the disk is full: who adds more waits for it
        for ever."""
        folder = self.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        return EventsWriter(str(folder / "events"))

    def draw(self, epochs: list[Epoch]) -> None:
        """Continue the learning curves."""
        if not self.team.leads:
            return
        names = {"loss": "train/loss", "lr": "train/lr", "miou": "mIoU", "oiou": "oIoU"}
        with suppress(OSError):  # pictures of a training are no reason to end it
            for epoch in epochs:
                for name, tag in names.items():
                    if (value := getattr(epoch, name)) is not None:
                        tag = tag if "/" in tag else f"{self.trial.eval.select_on}/{tag}"
                        self.board.write_event(
                            Event(wall_time=time.time(), step=epoch.epoch, summary=scalar(tag, value))
                        )
            self.board.flush()

    @cached_property
    def checkpoints(self) -> checkpoints.Checkpoints:
        """Those of this trial, made by this code with the same weights on the same kind of device."""
        return checkpoints.Checkpoints(
            self.folder / CHECKPOINTS,
            {
                "trial": plain(self.trial),
                "code": code.digest(),
                "versions": code.versions(),
                "weights": self.weights.sha256,
                "device": self.device.type,
                "speed": self.speed,
            },
        )

    def save(self) -> None:
        """All that the rest of the trial depends on: nothing that is frozen and comes from a file is among it."""
        if self.loop is None or not self.places.checkpoint_seconds or not self.team.leads:
            return
        self.saved = time.monotonic()
        state = self.loop.state_dict()
        state |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        state |= {f"frame/{split}": _packed(frame) for split, frame in self.frames.items()}
        state |= {"history": list(map(vars, self.history)), "selected": self.selected and vars(self.selected)}
        state |= {"train_seconds": self.train_seconds, "eval_seconds": self.eval_seconds}
        state |= {"started": self.started.isoformat(), "peak_memory_bytes": self.peak()}
        try:
            self.checkpoints.save(state)
        except OSError as error:
            self.log(f"no checkpoint could be written, training goes on without ({error})")
        self.lap()  # what was written is no part of the training

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one: from the same in all processes."""
        taken: Mapping[str, Any] | None = None

        def take_up(state: Mapping[str, Any]) -> None:
            nonlocal taken
            self.take_up(state)
            taken = state

        if self.team.leads:
            self.checkpoints.restore(take_up, self.log)
        taken = self.team.told(taken)
        if taken and not self.team.leads:
            self.take_up(taken)

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved. Raises an error, and changes nothing, where it does not fit."""
        history = [Epoch(**line) for line in state["history"]]
        selected = state["selected"] and Epoch(**state["selected"])
        best, tuned = under(state, "best"), self.loop.model.tuned_tensors()
        if selected:
            fit(tuned, best)
        frames = {split: _unpacked(packed) for split, packed in under(state, "frame").items()}
        started = datetime.fromisoformat(state["started"])
        seconds, peak = (state["train_seconds"], state["eval_seconds"]), state["peak_memory_bytes"]
        self.loop.load_state_dict(state)
        self.history, self.selected, self.frames, self.started = history, selected, frames, started
        self.best = {name: torch.empty_like(tuned[name]).copy_(tensor) for name, tensor in best.items()}
        (self.train_seconds, self.eval_seconds), self.peak_memory_bytes = seconds, peak

    def features(self, model: RISModel, samples: list[Sample]) -> FrozenFeatures | None:
        with self.team.leader_first(), evaluation.inference(model):
            return frozen_features(
                model.backbone.image,
                samples,
                Images(model.backbone.image_size),
                self.weights.sha256,
                self.room,
                device=self.device,
                autocast=self.settings["autocast"],
                precision=HALVES[self.trial.train.feature_precision],
                num_workers=self.loading_processes,
            )

    def compare_rounded(self, model: RISModel, validation: list[Sample]) -> None:
        """Score the validation split once more, with its image features rounded as those that were trained on."""
        precision, split = self.trial.train.feature_precision, self.trial.eval.select_on
        if HALVES[precision] is None or not model.backbone.image.untouched:
            return
        tower, autocast = model.backbone.image, self.settings["autocast"]

        def rounded(samples: Sequence[Sample]) -> Known:
            images = self.photos[split](samples).to(self.device)
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                return tower.known(images, HALVES[precision])

        _, scores = self.evaluate(model, split, validation, known=rounded, num_workers=0)
        live = evaluation.scores(self.frames[split])
        if split in self.scores:
            self.scores[split] = replace(live, rounded={"oiou": scores.oiou, "miou": scores.miou})
        self.log(
            f"{split} with image features rounded to {precision}: "
            f"mIoU {scores.miou:.6f} instead of {live.miou:.6f} ({scores.miou - live.miou:+.6f}), "
            f"oIoU {scores.oiou:.6f} instead of {live.oiou:.6f} ({scores.oiou - live.oiou:+.6f})"
        )

    def read(self, dataset, split: str) -> list[Sample]:
        samples = dataset.read(self.places.data, split.removesuffix(SHUFFLED))
        return shuffled(samples, self.trial.seed) if split.endswith(SHUFFLED) else samples

    @property
    def loading_processes(self) -> int:
        return 0 if self.device.type == "cpu" else LOADING_PROCESSES

    @property
    def device_name(self) -> str:
        """As people call it: "NVIDIA H100", or the processor's architecture; "2 x NVIDIA H100"."""
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else f"CPU ({platform.machine()}), 1 thread"
        return name if self.team.size == 1 else f"{self.team.size} x {name}"

    @property
    def settings(self) -> dict:
        return {
            "tokenizer": self.tokenizer,
            "threshold": self.trial.eval.threshold,
            "batch_size": EVAL_BATCH_SIZE,
            "device": self.device,
            "autocast": reduced(self.trial.train.precision, self.device),
        }

    def evaluate(self, model, split: str, samples: list[Sample], **changed: Any) -> tuple[pd.DataFrame, Scores]:
        self.lap()
        frame = evaluation.evaluate(
            model,
            samples,
            others=evaluation.THRESHOLDS,
            team=self.team,
            report=lambda done, total: self.tell(f"evaluate {split}"),
            **self.settings | {"known": self.photos[split], "num_workers": self.loading_processes} | changed,
        )
        self.eval_seconds += self.lap()
        return frame, evaluation.scores(frame)

    def metric(self, epoch: Epoch) -> float:
        return getattr(epoch, self.trial.eval.metric)

    def is_outdone(self) -> bool:
        """Whether the training is to end here, because of what it has reached so far."""
        wanted = dict(self.trial.train.stop_below).get(len(self.history), 0.0)
        return self.selected is not None and self.metric(self.selected) < wanted

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.clock = self.clock, time.monotonic()
        return self.clock - before

    def on_step(self, loss: float) -> None:
        self.train_seconds += self.lap()
        step = self.loop.epoch * (self.steps // self.trial.train.epochs) + self.loop.batch
        rate = step * self.trial.train.batch_size / self.train_seconds
        elapsed = self.train_seconds + self.eval_seconds
        self.tell("train", self.loop.epoch + 1, step, loss, rate, elapsed / step * (self.steps - step))
        if time.monotonic() - self.saved >= self.places.checkpoint_seconds:
            self.save()

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
        progress = Progress(
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
            warning=next(iter(self.room.left_out), None),
        )
        try:
            self.report(progress)
        except KeyboardInterrupt:  # between two steps, or in an evaluation, which begins again
            self.save()
            raise

    def peak(self) -> int:
        if self.device.type == "cuda":
            return max(self.peak_memory_bytes, torch.cuda.max_memory_allocated())
        # Linux counts the resident peak in KiB, macOS in bytes.
        unit = 1 if platform.system() == "Darwin" else 1024
        return max(self.peak_memory_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def measure(self, images: int) -> Cost:
        return Cost(
            train_seconds=self.train_seconds,
            eval_seconds=self.eval_seconds,
            train_images_per_second=images / self.train_seconds,
            peak_memory_bytes=self.peak(),
            tuned_bytes=(self.folder / "tuned.safetensors").stat().st_size,
            device=self.device_name,
            micro_batches=self.loop.parts,
            processes=self.team.size,
            speed=self.speed,
            recompute=self.places.recompute,
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
            provenance=code.provenance(self.started, self.weights.sha256, self.precision),
        )


def _packed(frame: pd.DataFrame) -> Tensor:
    """A table as bytes (N,), in a tensor: Parquet holds it without loss."""
    return torch.from_numpy(np.frombuffer(frame.to_parquet(index=False), dtype=np.uint8).copy())


def _unpacked(packed: Tensor) -> pd.DataFrame:
    return pd.read_parquet(io.BytesIO(packed.numpy().tobytes()))
