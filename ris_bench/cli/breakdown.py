"""ris-bench breakdown."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ris_bench.cli.arguments import add_results
from ris_bench.errors import UserError
from ris_bench.remote import store_at
from ris_bench.report import breakdowns
from ris_bench.results import read_done


def add(verbs: Any) -> None:
    breakdown = verbs.add_parser(
        "breakdown",
        help="the scores of trials by category, size, words, ... of the expressions, and how often what goes wrong",
        description="Scores groups of expressions, from the table of every expression that a trial keeps.",
    )
    breakdown.set_defaults(call=_call)
    breakdown.add_argument("trials", nargs="+", metavar="TRIAL", help="the beginning of a trial's id, or its folder")
    breakdown.add_argument(
        "--by",
        action="append",
        choices=list(breakdowns.BY),
        help="what makes a group; may be repeated (default: everything)",
    )
    breakdown.add_argument("--split", action="append", metavar="NAME", help="only this split; may be repeated")
    add_results(breakdown)
    breakdown.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")


def _call(args: argparse.Namespace) -> int:
    store = store_at(args.results)
    groups = []
    for name in args.trials:
        folder = store.find(name)
        trial, frame = read_done(folder).trial.id, breakdowns.read(folder)
        there = list(dict.fromkeys(frame["split"]))
        if absent := [split for split in args.split or () if split not in there]:
            raise UserError(f"{trial} was not evaluated on {', '.join(absent)}; its splits are {', '.join(there)}")
        frame = frame[frame["split"].isin(args.split or there)]
        groups += [group for by in args.by or breakdowns.BY for group in breakdowns.breakdown(trial, frame, by)]
    print(json.dumps(breakdowns.records(groups), indent=1) if args.json else breakdowns.markdown(groups))
    return 0
