"""What the harness itself costs: `python -m benchmarks.overhead [--trials N]`.

The trials do nothing: what is left is the sweep's own time, by executor, and that of a run that finds all done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ris_bench import executors, sweep
from ris_bench.experiment import load
from ris_bench.plan import Experiment
from ris_bench.records import Cost, Epoch, Params, Places, Progress, Result, Scores, Trial
from ris_bench.results import Store

ROOT = Path(__file__).parent.parent
TEXT = """\
name: overhead
title: Trials that do nothing
defaults:
  dataset: refcoco
  backbone: tiny-clip-vit
  method: frozen
  head: {{etris: {{width: 16, layers: 1, heads: 2, ffn: 16}}}}
  train: {{epochs: 2, batch_size: 4, lr: 1.0e-3, milestones: [], gamma: 0.1, precision: fp32}}
  eval: {{select_on: val, splits: [val]}}
  seed: 0
grid:
  train.lr: [{rates}]
  seed: [0, 1, 2, 3, 4]
table:
  rows: train.lr
  columns:
    - {{header: RefCOCO, value: miou, splits: [val]}}
"""
SEEDS = 5


def no_op(trial: Trial, folder: Path, places: Places, report: Any) -> Result:
    """A whole result of nothing."""
    report(Progress(trial.id, "train", 1, 2, 1, 2, 0.5, 1.0, 1.0, None))
    scores = Scores(oiou=0.5, miou=0.5, precision_at={"0.5": 0.5}, num_expressions=1)
    params = Params(tunable_backbone=0, tunable_head=1, moving_statistics=0, total=2)
    cost = Cost(
        train_seconds=1.0,
        eval_seconds=1.0,
        train_images_per_second=1.0,
        peak_memory_bytes=1,
        tuned_bytes=1,
        device="none",
    )
    history = tuple(Epoch(epoch=number, loss=0.5, lr=1e-3, miou=0.5, oiou=0.5) for number in (1, 2))
    failed = sweep.failure(trial, "")
    return replace(failed, status="done", error=None, scores={"val": scores}, params=params, cost=cost, history=history)


def swept(experiment: Experiment, root: Path, executor: AbstractContextManager[sweep.Execute]) -> float:
    """Seconds from the first trial to the last table; the executor's start is no part of them."""
    job = sweep.Job(no_op, Store(root), Places(data=Path("/nowhere"), weights=None))
    with executor as execute:
        started = time.perf_counter()
        results = sweep.run(experiment, job, nullcontext(execute), check=lambda *places: None)
        taken = time.perf_counter() - started
    assert all(result.status == "done" for result in results.values()) and len(results) == len(experiment.runs)
    return taken


def bare(experiment: Experiment, root: Path) -> float:
    """Seconds for the same calls in a loop, without anything around them."""
    root.mkdir()
    started = time.perf_counter()
    for run in experiment.runs:
        no_op(run.trial, root, Places(data=Path("/nowhere"), weights=None), lambda progress: None)
    return time.perf_counter() - started


def again(path: Path, root: Path) -> float:
    """Seconds of the command over complete results, Python's start included."""
    command = [sys.executable, str(ROOT / "run_bench.py"), str(path), "--results", str(root)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def resident() -> float:
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also written there")
    args = parser.parse_args()
    rates = ", ".join(f"{number + 1}.0e-4" for number in range(-(-args.trials // SEEDS)))
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        path = Path(folder) / "overhead.yaml"
        path.write_text(TEXT.format(rates=rates), encoding="utf-8")
        experiment = load(path)
        trials = len(experiment.runs)
        loop = bare(experiment, Path(folder) / "bare")
        found["bare loop, ms a trial"] = 1e3 * loop / trials
        with redirect_stderr(nowhere):
            local = swept(experiment, Path(folder) / "local", executors.in_process())
            found["in this process, ms a trial more"] = 1e3 * (local - loop) / trials
            found["driver, MiB at most"] = resident()
            started = time.perf_counter()
            with executors.through_ray() as execute:
                found["Ray's start, s"] = time.perf_counter() - started
                ray = swept(experiment, Path(folder) / "ray", nullcontext(execute))
            found["through Ray, ms a trial more"] = 1e3 * (ray - loop) / trials
            found["driver with Ray, MiB at most"] = resident()
        found["the command over complete results, s"] = again(path, Path(folder) / "ray")
    print(f"{trials} trials, {os.cpu_count()} cores, {platform.machine()}")
    print(tabulate(found.items(), floatfmt=".1f"))
    if args.out:
        args.out.write_text(json.dumps({"trials": trials, "cores": os.cpu_count(), **found}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
