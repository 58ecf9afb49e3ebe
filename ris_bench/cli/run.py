"""ris-bench run, which run_bench.py is too."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ris_bench.cli.arguments import add_data_folder, add_results, add_speed, count
from ris_bench.errors import UserError
from ris_bench.records import Places, Result, Trial
from ris_bench.remote import is_url, store_at

if TYPE_CHECKING:
    from ris_bench.plan import Experiment
    from ris_bench.results import Store

RUN = """\
Runs every trial of an experiment that has no result yet and prints the table. Results are kept by trial and shared by
experiments; the same command goes on where an earlier one stopped, also inside a trial, and runs trials that failed
again. Ctrl-C lets the steps that are running end and saves where their trials stand; a second one stops at once.

exit code:  0 all well   1 a trial failed   2 bad input, nothing was run   130 stopped

On a cluster (--address) every node must find results, data and weights under the same paths; results may be at a URL,
such as s3://bucket/path, for which each has the credentials in its environment. Nodes are sent this package; what it
depends on has to be installed there, in the same versions. Driver and nodes need one token: RAY_AUTH_MODE=token and
RAY_AUTH_TOKEN_PATH=FILE.
"""


def add(verbs: Any) -> None:
    from_checkout = Path(sys.argv[0]).name == "run_bench.py"
    run = verbs.add_parser(
        "run",
        prog="run_bench.py" if from_checkout else None,
        help="run what an experiment lacks and print its table",
        description=RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(call=lambda args: _call(args, run))
    run.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    run.add_argument(
        "--dry-run", action="store_true", help="print the trials with their parameter counts; needs no data or weights"
    )
    run.add_argument("--json", action="store_true", help="with --dry-run: a JSON list on stdout, and nothing else")
    run.add_argument("--only", default="", metavar="TEXT", help="only trials whose id contains TEXT")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of the experiment's defaults, such as train.epochs=2; may be repeated",
    )
    add_results(run)
    add_data_folder(run)
    run.add_argument(
        "--weights", type=Path, metavar="DIR", help="where pretrained weights lie (default: caches and the hub)"
    )
    run.add_argument(
        "--feature-cache",
        type=_amount,
        default=50,
        metavar="GB",
        help="room on disk for letterboxed images and masks and for what untouched stages make of the training images, "
        "shared by trials; 0 works them out every time (default: %(default)s)",
    )
    add_speed(run)
    run.add_argument(
        "--recompute",
        action="store_true",
        help="compute what is inside the blocks of towers and head again in the backward pass instead of keeping it: "
        "less memory, more time, the same numbers but for rounding",
    )
    run.add_argument(
        "--checkpoint-minutes",
        type=_amount,
        default=5,
        metavar="M",
        help="how much of a trial's training may be lost if it is cut off; 0 writes no checkpoints, and it starts anew "
        "(default: %(default)s)",
    )
    run.add_argument(
        "--track",
        action="append",
        default=[],
        choices=("wandb", "mlflow"),
        help="tell a tracker of every trial, where its own environment variables say; may be repeated",
    )
    run.add_argument(
        "--executor",
        choices=("ray", "local"),
        default="ray",
        help="through Ray Tune (default), or one after another in this process",
    )
    run.add_argument(
        "--processes-per-trial",
        type=count,
        metavar="N",
        help="that share the work of a trial, each with a GPU of its own or, without GPUs, a core; numbers change by "
        "rounding, and with what dropout draws (default: 1)",
    )
    ray = run.add_argument_group("with Ray")
    ray.add_argument("--max-concurrent", type=count, metavar="N", help="trials at a time (default: as many as fit)")
    ray.add_argument(
        "--gpus-per-trial",
        type=_share,
        metavar="F|auto",
        help="0.5 puts two trials on a GPU, 0 all on CPUs, 2 gives a trial two processes with a GPU each; auto puts as "
        "many on one as it has memory for, by what the first trial of a kind has taken; the times of trials that share "
        "one are longer (default: one for each process, where there are GPUs)",
    )
    ray.add_argument(
        "--memory-per-trial",
        type=_memory,
        action="append",
        metavar="[BACKBONE=]GB",
        help="what a trial (of a backbone) is expected to take of a machine's memory, so that Ray puts no more trials "
        "on it than it has room for; may be repeated",
    )
    ray.add_argument(
        "--patience-minutes",
        type=_amount,
        metavar="M",
        help="end the process of a trial that has told nothing for so long, and try it once more; 0 waits for ever "
        "(default: 60)",
    )
    ray.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="a running cluster, or `auto` for the one of this machine (default: start Ray here)",
    )


def _call(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    ray_options = {
        "address": args.address,
        "max_concurrent": args.max_concurrent,
        "gpus_per_trial": args.gpus_per_trial,
        "memory_gb": args.memory_per_trial,
        "patience": args.patience_minutes,
    }
    if args.executor == "local" and any(value is not None for value in ray_options.values()):
        parser.error(
            "--max-concurrent, --gpus-per-trial, --memory-per-trial, --patience-minutes and --address say something to "
            "Ray: not with --executor local"
        )
    gpus = 0 if args.gpus_per_trial in (None, "auto") else args.gpus_per_trial
    processes = args.processes_per_trial or max(1, int(gpus))
    if gpus and processes != max(1, gpus):
        parser.error(
            f"--gpus-per-trial {gpus:g} with --processes-per-trial {processes}: each process has one GPU or none"
        )
    if args.gpus_per_trial == "auto" and processes > 1:
        parser.error("--gpus-per-trial auto puts several trials on a GPU: not with --processes-per-trial")
    ray_options["processes"] = processes
    ray_options["memory_gb"] = dict(args.memory_per_trial or ())
    ray_options["patience"] = 3600 if args.patience_minutes is None else 60 * args.patience_minutes
    if args.recompute and args.speed == "compiled":
        parser.error("--recompute: not with --speed compiled")
    if args.json and not args.dry_run:
        parser.error("--json goes with --dry-run")

    from ris_bench import plan  # what is heavy is imported only now, and PyTorch only where something has to be run
    from ris_bench.report import folder, tables
    from ris_bench.sweep import pending

    store = store_at(args.results)
    if args.executor == "ray" and store.place.startswith("memory:"):
        raise UserError(f"what is in {store.place} is in this process alone: give --executor local, or another URL")
    results: dict[str, Result] = {}
    experiment = plan.last_run(args.experiment, args.set, store.root)
    if (
        args.dry_run
        or experiment is None
        or experiment.may_be_another
        or pending(experiment, store, results, args.only)
        or not any(args.only in key for key in results)
    ):
        experiment, results = _run(args, store, ray_options, processes)
    if args.dry_run:
        return 0

    experiment = experiment.after(lambda trial: results.get(trial.id))
    print(tables.render(experiment, results).markdown, end="", flush=True)
    failed = [result for key, result in results.items() if result.status == "failed" and args.only in key]
    for result in failed:
        log = f"{args.results}/trials/{result.trial.id}/log.txt"
        see = f"; see {log}" if is_url(log) or Path(log).exists() else ""
        print(f"failed: {result.trial.id}: {result.error}{see}", file=sys.stderr)
    try:
        folder.keep(experiment, results, store.root / experiment.name)
        store.publish(experiment.name)
    except OSError as error:
        print(f"error: the tables cannot be written to {args.results}/{experiment.name} ({error})", file=sys.stderr)
        return 1
    return 1 if failed else 0


def _run(
    args: argparse.Namespace, store: Store, ray_options: dict[str, Any], processes: int
) -> tuple[Experiment, dict[str, Result]]:
    """The experiment, and what is known of its trials once they were run; of a dry run, once they were listed."""
    from ris_bench import executors, sweep, trackers
    from ris_bench.backbones.base import BACKBONES
    from ris_bench.experiment import load
    from ris_bench.trial import run_trial

    experiment = load(args.experiment, args.set)
    if unknown := [name for name in ray_options["memory_gb"] if name and name not in BACKBONES]:
        raise UserError(f"--memory-per-trial names {unknown[0]!r}; the backbones are {', '.join(BACKBONES)}")
    known: dict[str, Result] = {}
    waiting = sweep.pending(experiment, store, known, args.only)
    experiment = experiment.after(lambda trial: known.get(trial.id))
    trials = [trial for trial in experiment.trials(known) if args.only in trial.id]
    if not trials:
        raise UserError(f"no trial of {args.experiment} has {args.only!r} in its id: --dry-run lists the ids")
    if args.dry_run:
        _print_trials(trials, len(waiting), experiment, as_json=args.json)
        return experiment, known

    places = Places(
        data=args.data.absolute(),
        weights=args.weights and args.weights.absolute(),
        feature_bytes=int(args.feature_cache * 1e9),
        checkpoint_seconds=60 * args.checkpoint_minutes,
        speed=args.speed,
        recompute=args.recompute,
        processes=processes,
    )
    ray_options["plugins"] = experiment.plugins
    executor = executors.in_process() if args.executor == "local" else executors.through_ray(**ray_options)
    job = sweep.Job(run_trial, store, places, experiment.plugins)
    check = partial(sweep.check, elsewhere=args.address is not None)
    with ExitStack() as stack:
        told = [stack.enter_context(trackers.named(name, experiment.name)) for name in dict.fromkeys(args.track)]
        return experiment, sweep.run(experiment, job, executor, only=args.only, check=check, watchers=told)


def _print_trials(trials: list[Trial], waiting: int, experiment: Experiment, *, as_json: bool) -> None:
    from ris_bench.sweep import count_parameters

    counts = count_parameters(trials)
    rows = [
        {
            "id": trial.id,
            "backbone": trial.backbone.name,
            "method": trial.method.name,
            "dataset": trial.dataset.name,
            "seed": trial.seed,
            "params": asdict(counts[trial.id]),
        }
        for trial in trials
    ]
    if experiment.search:
        suggested = {run.trial.id: dict(run.axes) for run in experiment.runs}
        rows = [{**row, "suggested": suggested[row["id"]]} for row in rows]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for place, row in enumerate(rows):
        params = {name.replace("_", " "): number for name, number in row.pop("params").items()}
        rows[place] = {"id": row["id"], **row.pop("suggested")} | params if experiment.search else row | params
    numbers = len(asdict(counts[trials[0].id]))
    print(tabulate(rows, headers="keys", intfmt=(*[""] * (len(rows[0]) - numbers), *[","] * numbers)))
    later = f"; more once the best {' and '.join(experiment.choose)} is known" if experiment.choose else ""
    if experiment.search:
        print("", *experiment.search.notes(), sep="\n")
        later = "; more as their results tell"
    print(f"\n{len(trials)} trials, {waiting} to run{later}")


def _share(text: str) -> float | str:
    if text == "auto":
        return text
    # A process computes on one device, so that more would idle.
    if not (0 <= (number := float(text)) <= 1 or (number > 1 and number.is_integer())):
        raise argparse.ArgumentTypeError(f"{text} is neither from 0 to 1 nor a whole number nor auto")
    return number


def _memory(text: str) -> tuple[str, float]:
    backbone, _, amount = text.rpartition("=")
    return backbone, _amount(amount)


def _amount(text: str) -> float:
    if not 0 <= (number := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to a million")
    return number
