"""What goes on in a results folder, told by its files alone: no word with the processes that are at work there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tabulate import tabulate

from ris_bench import plan
from ris_bench.errors import UserError
from ris_bench.plan import Experiment
from ris_bench.progress import describe, duration
from ris_bench.records import Result
from ris_bench.results import is_gone
from ris_bench.search import NUMBER

SILENT_SECONDS = 120
"""After which a trial that says nothing is pointed at."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """An attempt at a trial."""

    trial_id: str
    told: Mapping[str, Any]
    """The last word of its process, as `Progress` has it, with host, pid and since; empty before the first."""
    silent_seconds: float
    gone: bool
    """Whether its process ran on this machine and is no more."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How far an experiment is."""

    name: str
    done: int
    failed: tuple[Result, ...]
    running: int
    waiting: int
    eta_seconds: float | None
    """Until all that is wanted so far is done, at the speed so far; None where nothing runs, or no speed is known."""


@dataclass(frozen=True, kw_only=True)
class Status:
    root: str
    """Where the results are."""
    driver: Mapping[str, Any] | None
    """Who starts trials there."""
    sweeps: tuple[Sweep, ...]
    running: tuple[Running, ...]
    skipped: tuple[str, ...]
    """Files that could pass for results or plans, and are none."""

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "results": self.root,
            "driver": self.driver,
            "experiments": [
                {**vars(one), "failed": [{"id": r.trial.id, "error": r.error} for r in one.failed]}
                for one in self.sweeps
            ],
            "running": [{**vars(one), "told": dict(one.told)} for one in self.running],
            "skipped": list(self.skipped),
        }

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.driver is None:
            yield f"nobody starts trials in {self.root}"
        else:
            at = " ".join(f"{key} {value}" for key, value in self.driver.items())
            yield f"at work in {self.root}: {at or 'a process that has not said who it is'}"
        if self.sweeps:
            yield ""
            rows = [
                {
                    "experiment": one.name,
                    "done": one.done,
                    "failed": len(one.failed),
                    "running": one.running,
                    "to run": one.waiting,
                    "left": "" if one.eta_seconds is None else f"about {duration(one.eta_seconds)}",
                }
                for one in self.sweeps
            ]
            yield tabulate(rows, headers="keys")
        if self.running:
            yield ""
            yield tabulate([self._row(one) for one in self.running], headers="keys", disable_numparse=True)
        for one in self.sweeps:
            for result in one.failed:
                yield f"failed: {result.trial.id}: {result.error}; see {self._log(result)}"
        yield from (f"warning: {line}" for line in self.skipped)

    def _log(self, result: Result) -> str:
        return f"{self.root}/trials/{result.trial.id}/log.txt"

    def _row(self, one: Running) -> dict[str, str]:
        where = f"{one.told.get('host', '')} {one.told.get('pid', '')}".strip()
        state = ""
        if one.gone:
            state = "its process is gone"
        elif one.silent_seconds > SILENT_SECONDS:
            state = f"silent for {duration(one.silent_seconds)}"
        return {
            "trial": one.trial_id,
            "is at": describe(_progress(one.told)) if one.told else "begins",
            "since": str(one.told.get("since", "")),
            "process": where,
            "": state,
        }


def _progress(told: Mapping[str, Any]) -> SimpleNamespace:
    optional = dict.fromkeys(("loss", "images_per_second", "eta_seconds", "score"))
    return SimpleNamespace(**{"phase": "?", "epoch": 0, "epochs": 0, **optional, **told})


def of(place: str | Path) -> Status:
    """The state of a results folder, or of one experiment where its folder of tables is named; also by URL.

    Raises UserError where it is neither.
    """
    store, root = plan.opened(place)
    folders = [root] if (root / plan.FILE).is_file() else sorted(path.parent for path in root.glob(f"*/{plan.FILE}"))
    driver = store.driver()
    if not (folders or driver or (store.root / "trials").is_dir()):
        raise UserError(f"{place} is no results folder: it has neither trials/ nor the folder of an experiment")
    experiments, skipped = [], []
    for folder in folders:
        try:
            experiments.append(plan.read(folder))
        except UserError as error:
            skipped.append(str(error))
    running = tuple(map(_running, store.running()))
    results, left_out = store.collect(run.trial for experiment in experiments for run in experiment.runs)
    return Status(
        root=store.place,
        driver=driver,
        sweeps=tuple(_sweep(experiment, results, running) for experiment in experiments),
        running=running,
        skipped=(*skipped, *left_out),
    )


def _running(attempt: tuple[str, Mapping[str, Any], float]) -> Running:
    trial_id, told, last = attempt
    silent = max(0.0, time.time() - last)
    return Running(trial_id=trial_id, told=told, silent_seconds=silent, gone=is_gone(told))


def _sweep(experiment: Experiment, results: Mapping[str, Result], running: tuple[Running, ...]) -> Sweep:
    wanted = [trial.id for trial in experiment.trials(results)]
    known = [results[key] for key in wanted if key in results]
    done = [result for result in known if result.status == "done"]
    at_work = [one for one in running if one.trial_id in wanted and one.trial_id not in results and not one.gone]
    waiting = len(wanted) - len(known) - len(at_work)
    if experiment.search and experiment.search.trials:  # of which those to come are not known yet
        waiting += experiment.search.trials - max(int(number) for number in experiment.axes[NUMBER])
    eta = None
    spent = [result.cost.train_seconds + result.cost.eval_seconds for result in done if result.cost]
    if at_work and (spent or not waiting):
        left = [one.told.get("eta_seconds") or 0.0 for one in at_work]
        total = sum(left) + waiting * sum(spent) / max(1, len(spent))
        eta = max(total / len(at_work), *left)  # no trial is split
    return Sweep(
        name=experiment.name,
        done=len(done),
        failed=tuple(result for result in known if result.status == "failed"),
        running=len(at_work),
        waiting=waiting,
        eta_seconds=eta,
    )
