"""Where the trials of a sweep run: one after another in this process, or side by side through Ray Tune.

Ray places the trials and restarts what died; it is told nothing of what they come to but how far they are.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from ris_bench import packing
from ris_bench.allocator import ENVIRONMENT
from ris_bench.errors import UserError
from ris_bench.records import Progress, Trial
from ris_bench.results import Store
from ris_bench.sweep import HUNG, PULSE_SECONDS, Driver, Execute, Job, Watcher, count_parameters, one_line, throttled

if TYPE_CHECKING:  # it imports torch
    from ris_bench.plugins import Plugin

GPU_SECONDS = 120
"""For the nodes to say how much memory their GPUs have: each of them starts a process that imports PyTorch."""
GRACE_SECONDS = 20
"""For the step that is running when a sweep is stopped: who sends SIGTERM sends SIGKILL after half a minute."""


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
    gpus_per_trial: float | Literal["auto"] | None = None,
    processes: int = 1,
    memory_gb: Mapping[str, float] = MappingProxyType({}),
    patience: float = 0,
) -> Iterator[Execute]:
    """Trials side by side: each takes one CPU for each of its `processes` and `gpus_per_trial` GPUs of one node (None:
    one for each of its processes, where the cluster has any). With "auto", trials of a kind of which one has been
    measured share GPUs, as many as memory has room for (see `packing`), where there are more trials than GPUs; the
    first one of a kind has a GPU to itself, and the others wait for it.

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
        all_gpus = int(ray.cluster_resources().get("GPU", 0))
        gpus = gpus_per_trial
        if gpus is None or gpus == "auto":
            gpus = float(processes) if all_gpus else 0.0
        gpu_bytes = _gpu_bytes() if gpus_per_trial == "auto" and gpus == 1 else None
        if gpus_per_trial == "auto" and gpus and not gpu_bytes:
            print("how much memory the GPUs have is not known: no trials share one", file=sys.stderr)
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
            for wave, shares in placed(trials, job):
                # Tune's own state is no truth of ours, and only its checkpoints, of which there are none, come from
                # nodes.
                with tempfile.TemporaryDirectory(prefix="ris-bench-") as folder:
                    _tune(
                        largest_first(wave),
                        job,
                        watcher,
                        folder=folder,
                        cpus=processes,
                        gpus=shares,
                        memory_gb=memory_gb,
                        max_concurrent=max_concurrent,
                        patience=patience,
                    )

        def placed(trials: list[Trial], job: Job) -> Iterator[tuple[list[Trial], dict[str, float]]]:
            """Trials that run side by side, with the GPUs of each."""

            def known() -> dict[str, int]:
                return packing.peaks(job.store.done(), job.places.speed, job.places.recompute)

            def most(wave: list[Trial]) -> int:
                return math.ceil(min(len(wave), max_concurrent or len(wave)) / all_gpus)

            if not gpu_bytes or most(trials) == 1:
                yield trials, {trial.id: gpus for trial in trials}
                return
            for wave in filter(None, packing.waves(trials, known())):
                yield wave, packing.shares(wave, known(), gpu_bytes, most(wave))

        yield execute


def _gpu_bytes() -> int | None:
    """The memory of the smallest GPU of the cluster, None where it cannot be known."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_calls=1)  # a process that has seen a GPU holds some of it
    def smallest() -> int:
        import torch

        return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    asked = [
        smallest.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    try:
        return min(ray.get(asked, timeout=GPU_SECONDS))
    except (ray.exceptions.RayError, ValueError):  # a node that does not answer, or whose GPUs PyTorch does not see
        return None


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
        environment: dict[str, Any] = {"env_vars": ENVIRONMENT}
        if address is not None:
            # Not as py_modules: workers would look for modules in the folder that the sweep was started in first.
            code = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ris-bench-")))
            for root in (Path(__file__).parent, *(root for plugin in plugins for root in plugin.roots())):
                if root.is_dir():
                    left_out = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(root, code / root.name, ignore=left_out, dirs_exist_ok=True)
                else:
                    shutil.copy(root, code)
            environment["working_dir"] = str(code)
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                runtime_env=environment,
                log_to_driver=False,
                logging_level="error",
            )
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
    cpus: int,
    gpus: Mapping[str, float],
    memory_gb: Mapping[str, float],
    max_concurrent: int | None,
    patience: float,
) -> None:
    from ray import tune
    from ray.exceptions import RayActorError
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put
    from ray.tune.progress_reporter import TrialProgressCallback

    trials_by_id = {trial.id: trial for trial in trials}
    unfinished, begun = dict(trials_by_id), set()
    stop = f"ris-bench.stop.{secrets.token_hex(8)}"  # kept by the head of the cluster: who asks it pays nothing

    def stopped() -> bool:
        with suppress(Exception):  # a head that does not answer is no reason to stop
            return bool(_internal_kv_exists(stop))
        return False

    def trainable(config: dict[str, Any]) -> None:
        if not gpus[config["trial"]]:  # a process that was given no GPU would see them all
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
        memory = int(1e9 * memory_gb.get(backbone, memory_gb.get("", 0)))
        return {"cpu": cpus, "gpu": gpus[config["trial"]], "memory": memory}

    class Relay(TrialProgressCallback):  # of which Tune else adds one that prints
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
            reuse_actors=not any(gpus.values()),  # a process that used a GPU keeps memory and settings of it
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
