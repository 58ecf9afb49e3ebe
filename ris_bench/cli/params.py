"""ris-bench params."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    params = verbs.add_parser(
        "params",
        help="count tunable parameters, as the papers count them and as they move",
        description="Counts what every pair of backbone and method tunes, beside the figure that a paper prints: of an "
        "experiment, or of all pairs that are possible on the full-size backbones. Needs no data and no weights.",
    )
    params.set_defaults(call=lambda args: _call(args, params))
    params.add_argument("experiment", type=Path, nargs="?", metavar="EXPERIMENT.yaml")
    params.add_argument("--backbone", metavar="NAME", help="only this backbone")
    params.add_argument(
        "--method",
        metavar="NAME",
        help="only this method; its options are those of the published row it stands for, else its defaults",
    )
    params.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")


def _call(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.experiment and (args.backbone or args.method):
        parser.error("an experiment names its own backbones and methods: not with --backbone or --method")

    from ris_bench import params  # only now: it imports torch

    if args.experiment:
        counted, refused = params.of_experiment(args.experiment), {}
    else:
        counted, refused = params.of_registry(args.backbone, args.method)
    print(
        json.dumps([counts.to_dict() for counts in counted], indent=1) if args.json else params.text(counted, refused)
    )
    return 0
