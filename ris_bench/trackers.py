"""Experiment trackers that people may have: Weights & Biases and MLflow are told what a sweep tells.

Only the driver speaks with them, so that the processes of trials need neither network nor login. What is true lies in
the results folder: a tracker that does not answer is left alone, and the sweep goes on.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.records import Progress, Result, Trial, plain


class Tracker(ABC):
    """A run for each trial, under the trial's id: one that is tried again, or goes on, goes on there too."""

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment
        self.runs: dict[str, Any] = {}
        self.mute = False

    @abstractmethod
    def open(self, trial: Trial, settings: Mapping[str, Any]) -> Any:
        """The run of a trial, of which `settings` are all keys, "train.lr" and such."""

    @abstractmethod
    def log(self, run: Any, numbers: Mapping[str, float], axis: str, at: int) -> None:
        """Numbers by name, at a "step" or "epoch"."""

    @abstractmethod
    def close(self, run: Any, status: str) -> None:
        """The status is "done", "failed" or "stopped"."""

    def started(self, trial: Trial) -> None:
        self._try(lambda: self._run(trial))

    def progress(self, progress: Progress) -> None:
        if progress.loss is None or progress.trial_id not in self.runs:
            return
        told = {"train/step_loss": progress.loss, "train/images_per_second": progress.images_per_second}
        numbers = {name: number for name, number in told.items() if number is not None}
        self._try(lambda: self.log(self.runs[progress.trial_id], numbers, "step", progress.step))

    def finished(self, result: Result) -> None:
        self._try(lambda: self._finish(result))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        """The sweep is over, however it ended."""
        for run in self.runs.values():
            self._try(lambda run=run: self.close(run, "stopped"))
        self.runs.clear()

    def _run(self, trial: Trial) -> Any:
        if trial.id not in self.runs:
            self.runs[trial.id] = self.open(trial, dict(flat(plain(trial))))
        return self.runs[trial.id]

    def _finish(self, result: Result) -> None:
        run, split = self._run(result.trial), result.trial.eval.select_on
        for epoch in result.history:
            told = {"train/loss": epoch.loss, "train/lr": epoch.lr, f"{split}/mIoU": epoch.miou}
            told[f"{split}/oIoU"] = epoch.oiou
            self.log(run, {name: n for name, n in told.items() if n is not None}, "epoch", epoch.epoch)
        if last := dict(summary(result)):
            self.log(run, last, "epoch", result.history[-1].epoch if result.history else 0)
        self.close(self.runs.pop(result.trial.id), result.status)

    def _try(self, tell: Callable[[], Any]) -> None:
        if self.mute:
            return
        try:
            tell()
        except Exception as error:  # whatever a network, a server or a new version of theirs comes up with
            self.mute = True
            print(f"warning: {type(self).__name__} is told nothing more ({_first_line(error)})", file=sys.stderr)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.lr", 0.001), ... of nested mappings."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def summary(result: Result) -> Iterator[tuple[str, float]]:
    """The final scores, as fractions, the counts and the cost."""
    for split, scores in result.scores.items():
        yield f"final/{split}/{METRICS['miou']}", scores.miou
        yield f"final/{split}/{METRICS['oiou']}", scores.oiou
        yield from ((f"final/{split}/Pr_{threshold}", share) for threshold, share in scores.precision_at.items())
    for kind, record in (("params", result.params), ("cost", result.cost)):
        for name, number in vars(record).items() if record else ():
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield f"{kind}/{name}", number


class Wandb(Tracker):
    """Weights & Biases: project "ris-bench", unless WANDB_PROJECT names another; the experiment is the group."""

    def __init__(self, experiment: str) -> None:
        super().__init__(experiment)
        import wandb

        self.wandb = wandb

    def open(self, trial: Trial, settings: Mapping[str, Any]) -> Any:
        run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ris-bench"),
            group=self.experiment,
            id=trial.id,
            name=trial.id,
            config=dict(settings),
            resume="allow",
            reinit="create_new",  # several trials run at a time
        )
        run.define_metric("train/step_loss", step_metric="step")
        run.define_metric("train/images_per_second", step_metric="step")
        run.define_metric("*", step_metric="epoch")
        return run

    def log(self, run: Any, numbers: Mapping[str, float], axis: str, at: int) -> None:
        run.log({**numbers, axis: at})

    def close(self, run: Any, status: str) -> None:
        run.summary["status"] = status
        run.finish(exit_code=int(status != "done"))


class MLflow(Tracker):
    """MLflow: an experiment of the same name, on the server or in the folder of MLFLOW_TRACKING_URI."""

    def __init__(self, experiment: str) -> None:
        super().__init__(experiment)
        import mlflow

        self.client = mlflow.MlflowClient()
        self.known: str | None = None

    def open(self, trial: Trial, settings: Mapping[str, Any]) -> Any:
        from mlflow.entities import Param

        if self.known is None:
            there = self.client.get_experiment_by_name(self.experiment)
            self.known = there.experiment_id if there else self.client.create_experiment(self.experiment)
        found = self.client.search_runs([self.known], f"tags.trial = '{trial.id}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        run = self.client.create_run(self.known, tags={"trial": trial.id}, run_name=trial.id).info.run_id
        self.client.log_batch(run, params=[Param(name, str(value)) for name, value in settings.items()])
        return run

    def log(self, run: Any, numbers: Mapping[str, float], axis: str, at: int) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(run, metrics=[Metric(name, number, now, at) for name, number in numbers.items()])

    def close(self, run: Any, status: str) -> None:
        self.client.set_terminated(run, {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status])


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": MLflow}
"""By the name of their package."""


def named(name: str, experiment: str) -> Tracker:
    """Raises UserError where the tracker's package is not installed, or does not take its own settings."""
    os.environ.setdefault("WANDB_SILENT", "true")  # the screen is ours
    try:
        return TRACKERS[name](experiment)
    except ImportError as error:
        raise UserError(f"--track {name} needs a package ({error}): pip install {name}, or leave it out") from None
    except Exception as error:  # such as an address that it does not know
        raise UserError(f"--track {name} does not work: {_first_line(error)}") from error
