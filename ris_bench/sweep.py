"""Runs the trials that have no result yet, through Ray Tune or in this process, and keeps each result as it comes.

Ray places the trials and restarts what died. What is true of them lies in the results folder alone: a sweep that was
cut off goes on by being started again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from ris_bench.errors import UserError
from ris_bench.files import whole, write_whole
from ris_bench.progress import Display
from ris_bench.records import Params, Result, Trial
from ris_bench.report import folder
from ris_bench.results import PROGRESS, Store, add_line, this_process

if TYPE_CHECKING:  # all import torch, and a sweep with nothing to run needs none
    from ris_bench.experiment import Experiment
    from ris_bench.plugins import Plugin
    from ris_bench.trial import Places, Progress

Report = Callable[["Progress"], None]
RunTrial = Callable[[Trial, Path, "Places", Report], Result]

PULSE_SECONDS = 5
"""Between two words of a trial on how far it is."""
HUNG = "no progress for"
"""What the log of a trial says that was ended for it."""
GRACE_SECONDS = 20
"""For the step that is running when a sweep is stopped: who sends SIGTERM sends SIGKILL after half a minute."""


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
        from ris_bench.trial import checkout, versions

        commit, dirty = checkout()
        return cls(commit, dirty, versions())

    def check_versions(self) -> None:
        """Raises UserError where this process computes with another software: a table is made with one."""
        from ris_bench.trial import versions

        # What stands after a plus is how it was built: for a GPU or without.
        theirs, ours = ({name: v.partition("+")[0] for name, v in each.items()} for each in (self.versions, versions()))
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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def failure(trial: Trial, error: str) -> Result:
    """The result of a trial of which nothing is known but that it failed."""
    from ris_bench.trial import provenance

    return Result(
        trial=trial,
        status="failed",
        error=error,
        scores={},
        selected_epoch=None,
        history=(),
        params=None,
        cost=None,
        provenance=provenance(datetime.now(timezone.utc), weights={}, precision="unknown"),
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


def largest_first(trials: list[Trial]) -> list[Trial]:
    """The trials that are expected to take longest come first, so that no machine waits in the end for one that began
    late; those that are expected to take as long stay as they are.

    What is expected is the work of a step, by all that computes and all that is tuned at every pixel, times the epochs.
    The size of the data, which the trial's own machine has, is not known here.
    """
    scalars: dict[str, int] = {}

    def work(trial: Trial) -> float:
        model, side = repr((trial.backbone, trial.method, trial.head)), trial.backbone.options.get("image_size")
        if model not in scalars:
            scalars[model] = 0
            with suppress(UserError):  # an impossible model fails at once
                counted = count_parameters([trial])[trial.id]
                scalars[model] = counted.total + counted.tunable
        return trial.train.epochs * scalars[model] * (side**2 if isinstance(side, int) else 1)

    return sorted(trials, key=work, reverse=True)


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


@contextmanager
def in_process() -> Iterator[Execute]:
    """One trial after another in this process; needs no Ray. Who stops it lets the step that is running end."""

    def execute(trials: list[Trial], job: Job, watcher: Watcher) -> None:
        with _asked_to_stop() as asked:

            def report(progress: Progress) -> None:
                watcher.progress(progress)
                if asked():
                    signal.alarm(0)  # no haste any more: where the trial stands is saved now
                    raise KeyboardInterrupt

            for trial in trials:
                if asked():
                    raise KeyboardInterrupt
                watcher.started(trial)
                try:
                    result = job(trial, report)
                except OSError as error:
                    result = job.lost(trial, one_line(error))
                watcher.finished(result)

    yield execute


@contextmanager
def _asked_to_stop(then: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Whether somebody has pressed Ctrl-C, or sent SIGTERM; a second time, or when nobody has looked for
    `GRACE_SECONDS`, it is a KeyboardInterrupt, wherever. The first time `then` is called."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        then()
        signal.alarm(GRACE_SECONDS)
        os.write(2, b"\nstops after the step that is running; once more stops at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield lambda: asked
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


RAY_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 it prints nothing: the output is ours
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # it would install packages again, from the network
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it makes fit() return as if all were well
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@contextmanager
def through_ray(
    *,
    address: str | None = None,
    plugins: Iterable[Plugin] = (),
    max_concurrent: int | None = None,
    gpus_per_trial: float | None = None,
    processes: int = 1,
    memory_gb: Mapping[str, float] = MappingProxyType({}),
    patience: float = 0,
) -> Iterator[Execute]:
    """Trials side by side: each takes one CPU for each of its `processes` and `gpus_per_trial` GPUs of one node (None:
    one for each of its processes, where the cluster has any).

    The process of a trial that tells nothing for `patience` seconds is ended, as if it had died; 0 waits for ever. Who
    stops the sweep lets the step that is running in each trial end.

    `address` is "host:port" of a running cluster, or "auto" for the one of this machine; None starts Ray on this
    machine alone. A cluster is sent this package, and the `plugins` that are modules.

    `memory_gb` says what the trials of a backbone are expected to take of a node's memory, with "" those of all
    that are not named: Ray puts no more of them on a node than it has room for, and enforces nothing.

    Raises UserError for a cluster that does not answer, and for a request that no node can satisfy.
    """
    os.environ.update(RAY_SETTINGS)
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed: install ray[tune], or give --executor local") from None

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # what Ray prints are warnings
        if not ray.is_initialized():
            _connect(address, plugins)
            stack.callback(ray.shutdown)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to tell
        gpus = gpus_per_trial
        if gpus is None:
            gpus = float(processes) if ray.cluster_resources().get("GPU") else 0.0
        share = {"cpu": processes, "gpu": gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max(memory_gb.values(), default=0)
        wanted = {"CPU": processes, "GPU": gpus, "memory": most * 1e9}
        if not any(all(node.get(what, 0) >= amount for what, amount in wanted.items()) for node in nodes):
            # Ray would wait for such a node for ever.
            cpus = "1 CPU" if processes == 1 else f"{processes} CPUs"
            asked = f"{cpus} and {gpus:g} GPUs" + (f" and {most:g} GB of memory" if most else "")
            there = "; ".join(
                f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs"
                + (f" and {node.get('memory', 0) / 1e9:.3g} GB" if most else "")
                for node in nodes
            )
            flags = "--gpus-per-trial" + (", --memory-per-trial" if most else "")
            raise UserError(
                f"a trial asks for {asked}, which no node has (there is: {there}); "
                f"lower {flags} or --processes-per-trial, or add a node"
            )

        def execute(trials: list[Trial], job: Job, watcher: Watcher) -> None:
            if address is not None:
                job = replace(job, driver=Driver.here())
            # Tune's own state is no truth of ours, and only its checkpoints, of which there are none, come from nodes.
            with tempfile.TemporaryDirectory(prefix="ris-bench-") as folder:
                _tune(
                    largest_first(trials),
                    job,
                    watcher,
                    folder=folder,
                    share=share,
                    memory_gb=memory_gb,
                    max_concurrent=max_concurrent,
                    patience=patience,
                )

        yield execute


def _connect(address: str | None, plugins: Iterable[Plugin] = ()) -> None:
    import ray

    if address not in (None, "auto"):
        # Ray would ask a wrong address for minutes.
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (ValueError, OSError) as error:
            raise UserError(f"no Ray cluster at {address} ({error}): --address takes HOST:PORT or auto") from error
    with ExitStack() as stack:
        own: dict[str, Any] = {"include_dashboard": False}
        if address is not None:
            # Not as py_modules: workers would look for modules in the folder that the sweep was started in first.
            code = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ris-bench-")))
            for root in (Path(__file__).parent, *(root for plugin in plugins for root in plugin.roots())):
                if root.is_dir():
                    left_out = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(root, code / root.name, ignore=left_out, dirs_exist_ok=True)
                else:
                    shutil.copy(root, code)
            own = {"runtime_env": {"working_dir": str(code)}}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            what, advice = "does not start", "--executor local works without it"
            if "Version mismatch" in str(error):
                what, advice = f"at {address} is another one", "install the same versions of Ray and Python here"
            elif isinstance(error, ray.exceptions.RuntimeEnvSetupError):
                what, advice = (
                    f"at {address} does not take the code",
                    "name a large plug-in by its file",
                )
            elif address:
                what = f"at {address} does not let us in"
                advice = "set RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH here as on its nodes"
            raise UserError(f"Ray {what} ({' '.join(str(error).split())}): {advice}") from error


@contextmanager
def _watched(patience: float, trial: Trial, store: Store) -> Iterator[Callable[[], None]]:
    """End this process, as a kill would, when what is given is not called for `patience` seconds."""
    last, over = time.monotonic(), threading.Event()

    def alive() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not over.wait(min(patience / 4, PULSE_SECONDS)):
            if time.monotonic() - last > patience:
                with suppress(Exception):
                    store.note(trial, f"{HUNG} {patience / 60:g} minutes: its process was ended")
                os._exit(1)

    if patience:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield alive
    finally:
        over.set()


def _tune(
    trials: list[Trial],
    job: Job,
    watcher: Watcher,
    *,
    folder: str,
    share: Mapping[str, float],
    memory_gb: Mapping[str, float],
    max_concurrent: int | None,
    patience: float,
) -> None:
    from ray import tune
    from ray.exceptions import RayActorError
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put

    trials_by_id = {trial.id: trial for trial in trials}
    unfinished, begun = dict(trials_by_id), set()
    stop = f"ris-bench.stop.{secrets.token_hex(8)}"  # kept by the head of the cluster: who asks it pays nothing

    def stopped() -> bool:
        with suppress(Exception):  # a head that does not answer is no reason to stop
            return bool(_internal_kv_exists(stop))
        return False

    def trainable(config: dict[str, Any]) -> None:
        if not share["gpu"]:  # a process that was given no GPU would see them all
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        trial = trials_by_id[config["trial"]]

        def report(progress: Progress) -> None:
            if stopped():
                raise KeyboardInterrupt  # the trial saves where it stands
            tune.report({"progress": progress._asdict()})

        if stopped():
            return
        with _watched(patience, trial, job.store) as alive, suppress(KeyboardInterrupt):
            tell = throttled(report)
            job(trial, lambda progress: (alive(), tell(progress)))

    def needs(config: dict[str, Any]) -> dict[str, float]:
        backbone = trials_by_id[config["trial"]].backbone.name
        return {**share, "memory": int(1e9 * memory_gb.get(backbone, memory_gb.get("", 0)))}

    class Relay(tune.Callback):
        """The result itself comes by way of the results folder."""

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return tune.Callback, ()  # Tune saves its callbacks, to a folder that is thrown away: ours holds a screen

        def on_trial_start(self, trial: Any, **info: Any) -> None:
            begun.add(trial.config["trial"])
            watcher.started(trials_by_id[trial.config["trial"]])

        def on_trial_result(self, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if "progress" in result:
                watcher.progress(SimpleNamespace(**result["progress"]))

        def on_trial_complete(self, trial: Any, **info: Any) -> None:
            ours = trials_by_id[trial.config["trial"]]
            with suppress(OSError):
                job.store.refresh(ours)
            result = job.store.read(ours)
            if asked() and result is None:  # it was told to
                return
            del unfinished[ours.id]
            watcher.finished(
                result or job.lost(ours, f"it left nothing in {job.store.place}: every node must see the same folder")
            )

        def on_trial_error(self, trial: Any, **info: Any) -> None:
            ours, error = unfinished.pop(trial.config["trial"]), trial.get_pickled_error()
            # What a trial raises is a result already. Here its process is gone, perhaps with the error that it had.
            if error is not None and not isinstance(error, RayActorError):
                reason = one_line(getattr(error, "cause", None) or error)
            elif ours.id in begun:
                reason = "its process died twice: killed, out of memory, or its node was lost"
            else:
                reason = "its process could not start: does every node have the packages that this one needs?"
            watcher.finished(job.lost(ours, reason, str(error or "")))

    tuner = tune.Tuner(
        tune.with_resources(trainable, needs),  # in one bundle, and so on one node
        param_space={"trial": tune.grid_search(list(trials_by_id))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max_concurrent,
            reuse_actors=not share["gpu"],  # a process that used a GPU keeps memory and settings of it
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=folder,
            verbose=0,
            callbacks=[Relay()],
            failure_config=tune.FailureConfig(max_failures=1),  # a death, or a result that could not be written
        ),
    )

    def tell_all() -> None:  # not from here: Ray may be in the middle of something
        threading.Thread(target=_internal_kv_put, args=(stop, b"")).start()

    with _asked_to_stop(tell_all) as asked:
        try:
            tuner.fit()
        finally:
            _internal_kv_del(stop)
        if asked():
            raise KeyboardInterrupt
    for trial in unfinished.values():
        watcher.finished(job.lost(trial, "Ray Tune ended without having run it"))


def throttled(report: Report, seconds: float = 1.0) -> Report:
    """Pass a report on only if the last one is this long ago."""
    last = -math.inf

    def pass_on(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            report(progress)

    return pass_on
