"""ris-bench status."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ris_bench import status
from ris_bench.cli.arguments import place


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "status",
        help="say what runs in a results folder, how far it is, and what failed",
        description="Tells what runs in a results folder, since when and for how long, and what failed and why. It "
        "reads files alone, from any shell that sees them.",
    )
    parser.set_defaults(call=_call)
    parser.add_argument(
        "results",
        type=place,
        nargs="?",
        default="results",
        metavar="RESULTS|DIR|URL",
        help="where results are kept, or the folder of one experiment there (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")


def _call(args: argparse.Namespace) -> int:
    found = status.of(args.results)
    print(json.dumps(found.record(), indent=1) if args.json else found.text())
    return 0
