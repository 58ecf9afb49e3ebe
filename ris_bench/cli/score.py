"""ris-bench score."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ris_bench import protocols, rescored
from ris_bench.cli.arguments import add_data_folder
from ris_bench.errors import UserError

SCORE = """\
Scores one file of predictions, of this harness or of any other model, under several evaluation protocols. The file is
JSON or Parquet: a row for every expression of the splits that it names, with a mask (COCO's run lengths) or a map of
logits or probabilities; ris_bench/predictions.py tells the columns.

A mask is scored as it is, and resampled where a protocol compares elsewhere than in the original image; a map is cut as
the protocol cuts it. ris-bench itself is always among the rows, and the difference to it is a column.
"""


def add(verbs: Any) -> None:
    score = verbs.add_parser(
        "score",
        help="score a file of predictions under several evaluation protocols",
        description=SCORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.set_defaults(call=_call)
    score.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="a JSON or Parquet file")
    add_data_folder(score)
    score.add_argument(
        "--protocol",
        nargs="+",
        default=[],
        metavar="P",
        help=", ".join(protocols.PROTOCOLS) + " (default: all)",
    )
    score.add_argument(
        "--validation", action="store_true", help="as the protocols select checkpoints, not as they report results"
    )
    score.add_argument(
        "--trial",
        type=Path,
        metavar="DIR",
        help="whose predictions they are: keep the scores in its folder, for `ris-bench report --protocol`",
    )
    score.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")


def _call(args: argparse.Namespace) -> int:
    from ris_bench import predictions, scoring  # only now: these import torch

    chosen = [protocols.find(name) for name in args.protocol] or list(protocols.PROTOCOLS.values())
    given = predictions.read(args.predictions)
    stage = "validation" if args.validation else "test"
    if args.trial and args.validation:
        raise UserError("--trial keeps what papers report, and --validation is not that; leave out one of them")
    scores = scoring.score(given, scoring.load(given, args.data), chosen, stage)
    if args.trial:
        print(rescored.keep(args.trial, scores), file=sys.stderr)
    if args.json:
        print(json.dumps(scoring.record(scores, stage), indent=1))
    else:
        print(scoring.markdown(scores, stage, masks=given.maps is None), end="")
    return 0
