"""ris-bench compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import add_results, count
from ris_bench.layout import METRICS
from ris_bench.remote import store_at


def add(verbs: Any) -> None:
    compare = verbs.add_parser(
        "compare",
        help="say which differences between the rows of a table are more than chance",
        description="Compares every row of an experiment's table with one of them, from results alone: differences, "
        "95% intervals and p-values by a paired bootstrap over images, the latter also corrected after Holm for their "
        "number, beside the noise of the seeds.",
    )
    compare.set_defaults(call=_call)
    compare.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    compare.add_argument("--against", required=True, metavar="METHOD", help="the row to compare with, such as frozen")
    compare.add_argument(
        "--split", nargs="+", default=(), metavar="SPLIT", help="such as val testA (default: those of the table)"
    )
    compare.add_argument(
        "--metric", nargs="+", default=(), choices=METRICS, metavar="METRIC", help="of " + ", ".join(METRICS)
    )
    compare.add_argument("--resamples", type=count, default=10_000, metavar="N", help="(default: %(default)s)")
    compare.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the bootstrap (default: 0)")
    add_results(compare)
    compare.add_argument("--json", action="store_true", help="a JSON list on stdout, with fractions instead of percent")


def _call(args: argparse.Namespace) -> int:
    from ris_bench.experiment import load  # only now: it imports torch
    from ris_bench.report.comparison import compare

    experiment, store = load(args.experiment), store_at(args.results)
    store.refresh()
    store.fetch(run.trial.id for run in experiment.runs)
    compared = compare(
        experiment,
        store,
        args.against,
        splits=args.split,
        metrics=args.metric,
        resamples=args.resamples,
        seed=args.seed,
    )
    print(json.dumps(compared.records(), indent=1) if args.json else compared.markdown().rstrip("\n"))
    return 0


def _natural(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return number
