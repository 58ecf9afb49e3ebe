"""Has the trials run that have no result yet, by an executor, and keeps each result as it comes.

What is true of them lies in the results folder alone: a sweep that was cut off goes on by being started again.
"""

from __future__ import annotations

import json
import math
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ris_bench import code
from ris_bench.errors import UserError
from ris_bench.files import whole, write_whole
from ris_bench.progress import Display
from ris_bench.records import Params, Places, Progress, Result, Trial
from ris_bench.report import folder
from ris_bench.results import PROGRESS, Store, add_line, this_process

if TYPE_CHECKING:  # all import torch, and a sweep with nothing to run needs none
    from ris_bench.experiment import Experiment
    from ris_bench.plugins import Plugin

Report = Callable[[Progress], None]
RunTrial = Callable[[Trial, Path, Places, Report], Result]

PULSE_SECONDS = 5
"""Between two words of a trial on how far it is."""
HUNG = "no progress for"
"""What the log of a trial says that was ended for it."""


class Watcher(Protocol):
    """Who is told what happens, in the driver process."""

    def started(self, trial: Trial) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def finished(self, result: Result) -> None: ...


Execute = Callable[[list[Trial], "Job", Watcher], None]
"""Runs every trial of a list and tells the watcher; it raises for no failure of a trial."""


@dataclass(frozen=True)
class Driver:
    """What the nodes of a cluster have to know of the process that sends them code and trials."""

    commit: str | None
    dirty: bool | None
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Driver:
        return cls(*code.checkout(), code.versions())

    def check_versions(self) -> None:
        """Raises UserError where this process computes with another software: a table is made with one."""
        # What stands after a plus is how it was built: for a GPU or without.
        theirs, ours = (
            {name: v.partition("+")[0] for name, v in each.items()} for each in (self.versions, code.versions())
        )
        if other := [f"{name} {ours[name]} instead of {theirs[name]}" for name in theirs if ours[name] != theirs[name]]:
            raise UserError(f"this node has {', '.join(other)}: install what the machine has that starts the sweep")

    def sign(self, result: Result) -> Result:
        """Code that was sent lies in no checkout; and of a failure it has to be known on which node it was."""
        provenance = replace(result.provenance, commit=self.commit, dirty=self.dirty)
        error = result.error and f"{result.error} (on {socket.gethostname()})"
        return replace(result, provenance=provenance, error=error)


@dataclass(frozen=True)
class Job:
    """What is done with a trial, in whichever process it runs."""

    run_trial: RunTrial
    store: Store
    places: Places
    plugins: tuple[Plugin, ...] = ()
    driver: Driver | None = None
    """Who has sent the code of this process here; None where it runs the code of its own machine."""

    def __call__(self, trial: Trial, report: Report) -> Result:
        """Run a trial and keep what comes of it. Raises OSError where that cannot be written."""
        self.store.refresh(trial)
        known = self.store.read(trial)
        if known and known.status == "done":  # the process of an earlier attempt died just after it
            return known
        folder = self.store.begin(trial)
        process = this_process()
        write_whole(folder / PROGRESS, json.dumps({"phase": "load", **process}))  # not at the end does a full disk show

        def note(progress: Progress) -> None:
            try:
                with whole(folder / PROGRESS) as temporary:
                    temporary.write_text(json.dumps({**progress._asdict(), **process}), encoding="utf-8")
            except FileNotFoundError:
                raise  # another attempt has taken over: this process was thought dead
            except OSError:
                pass  # nobody can read how far it is, which is no reason to end it

        tell = throttled(note, PULSE_SECONDS)

        def told(progress: Progress) -> None:
            tell(progress)
            report(progress)

        try:
            with self.store.shared(trial, folder):
                if self.driver:
                    self.driver.check_versions()
                for plugin in self.plugins:
                    plugin.load()
                result = self.run_trial(trial, folder, self.places, told)
        except Exception as error:
            with suppress(OSError):
                add_line(folder, traceback.format_exc().rstrip("\n"))
            result = failure(trial, one_line(error))
        if self.driver:
            result = self.driver.sign(result)
        (folder / PROGRESS).unlink(missing_ok=True)
        return self.store.finish(folder, result)

    def lost(self, trial: Trial, error: str, details: str = "") -> Result:
        """The failure of a trial whose process left no result; it is kept, where that can be written, with what the
        process has written, its log above all."""
        with suppress(OSError):
            folder = next(iter(self.store.attempts(trial)), None) or self.store.begin(trial)
            if hung := next((line for line in reversed(_lines(folder / "log.txt")) if HUNG in line), None):
                error = hung
            (folder / PROGRESS).unlink(missing_ok=True)
            add_line(folder, error, details)
            return self.store.finish(folder, failure(trial, error))
        return failure(trial, error)


def throttled(report: Report, seconds: float = 1.0) -> Report:
    """Pass a report on only if the last one is this long ago."""
    last = -math.inf

    def pass_on(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(progress)

    return pass_on


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def failure(trial: Trial, error: str) -> Result:
    """The result of a trial of which nothing is known but that it failed."""
    return Result(
        trial=trial,
        status="failed",
        error=error,
        scores={},
        selected_epoch=None,
        history=(),
        params=None,
        cost=None,
        provenance=code.provenance(datetime.now(timezone.utc), weights={}, precision="unknown"),
    )


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def pending(experiment: Experiment, store: Store, results: dict[str, Result], only: str = "") -> list[Trial]:
    """The trials that are to be run next: those with `only` in their id that are not in `results`.

    `results` takes up what the store has; but for failures that are to be tried again: these are pending.
    """
    store.refresh()

    def find(trial: Trial) -> Result | None:
        if trial.id not in results:
            result = store.read(trial)
            if result and (result.status == "done" or only not in trial.id):
                results[trial.id] = result
        return results.get(trial.id)

    experiment = experiment.after(find)
    while True:
        missing = [trial for trial in experiment.trials(results) if trial.id not in results]
        if not [trial for trial in missing if find(trial)]:
            return [trial for trial in missing if only in trial.id]
        # More may be asked for now: an experiment chooses by what is known.


def check(trials: list[Trial], store: Store, places: Places, *, elsewhere: bool = False) -> None:
    """Raises UserError where a trial cannot succeed: no place to write to, an impossible model; no data, no weights,
    but for those that run `elsewhere`, where there may be some."""
    from ris_bench.backbones import weights
    from ris_bench.data.dataset import DATASETS

    store.check_writable()
    datasets = {} if elsewhere else {repr(trial.dataset): trial.dataset for trial in trials}
    for dataset in datasets.values():
        DATASETS.build(dataset).locate(places.data)
    count_parameters(trials)
    for name in () if elsewhere else sorted({trial.backbone.name for trial in trials}):
        for kind in weights.KINDS.get(name, ()):  # a plug-in's backbone has ways of its own
            weights.locate(kind, places.weights)


def count_parameters(trials: list[Trial]) -> dict[str, Params]:
    """The counts of every trial by id, without data or weights. Raises UserError for an impossible model."""
    from ris_bench.data.dataset import DATASETS
    from ris_bench.model import count_parameters

    lengths = {trial.id: DATASETS.build(trial.dataset).word_len for trial in trials}
    models = {trial.id: repr((lengths[trial.id], trial.backbone, trial.method, trial.head)) for trial in trials}
    counts = {model: count_parameters(trial) for model, trial in {models[t.id]: t for t in trials}.items()}
    return {trial_id: counts[model] for trial_id, model in models.items()}


@dataclass(frozen=True)
class _Keeper:
    """Adds each result to what is known, and writes the tables anew: a sweep that is cut off leaves one."""

    experiment: Experiment
    store: Store
    results: dict[str, Result]
    watchers: Sequence[Watcher]

    def started(self, trial: Trial) -> None:
        for watcher in self.watchers:
            watcher.started(trial)

    def progress(self, progress: Progress) -> None:
        for watcher in self.watchers:
            watcher.progress(progress)

    def finished(self, result: Result) -> None:
        self.results[result.trial.id] = result
        self.write_tables()
        for watcher in self.watchers:
            watcher.finished(result)

    def write_tables(self) -> None:
        with suppress(OSError):  # the next ones may be written; who asks for the last ones is told
            folder.keep(self.experiment, self.results, self.store.root / self.experiment.name)
            self.store.publish(self.experiment.name)


def run(
    experiment: Experiment,
    job: Job,
    executor: AbstractContextManager[Execute],
    *,
    only: str = "",
    check: Callable[[list[Trial], Store, Places], None] = check,
    watchers: Sequence[Watcher] = (),
) -> dict[str, Result]:
    """Run what is pending until nothing is, and return every result that is known, by trial id.

    `watchers` are told what the screen is.
    The executor is entered, and stdout written to, only where there is something to run and `check` finds nothing
    against it. Raises its UserError otherwise.
    """
    results: dict[str, Result] = {}
    display = Display()
    with ExitStack() as stack:
        execute = None
        while trials := pending(experiment, job.store, results, only):
            experiment = experiment.after(lambda trial: results.get(trial.id))
            if execute is None:
                # A search that asks for something impossible later on learns that it fails.
                check(experiment.search.corners() if experiment.search else trials, job.store, job.places)
                stack.enter_context(job.store.held(experiment.name))
                execute = stack.enter_context(executor)
                # As Ctrl-C. Not earlier: ray.init installs a handler that ends the process without a word.
                before = signal.signal(signal.SIGTERM, signal.default_int_handler)
                stack.callback(signal.signal, signal.SIGTERM, before)
                stack.enter_context(display)
            keeper = _Keeper(experiment, job.store, results, (display, *watchers))
            if results:
                keeper.write_tables()  # with the plan, by which others know what is to be run
            display.expect(trials, retried=sum(job.store.read(trial) is not None for trial in trials))
            try:
                execute(trials, job, keeper)
            except KeyboardInterrupt:
                # A trial may have ended in its own process without a word having reached this one.
                pending(experiment, job.store, results, only)
                if results:
                    keeper.write_tables()
                raise
    return results
