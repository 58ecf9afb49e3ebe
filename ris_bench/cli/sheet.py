"""ris-bench sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import add_data_folder, count
from ris_bench.errors import UserError
from ris_bench.protocols import RIS_BENCH

SHEET = """\
Draws what several models answer to the same expressions: rows of image, expression, ground truth and the prediction of
each model, of every split that the files hold. The files are those of ris-bench evaluate; where they hold maps
(evaluate --maps), the scores at every threshold are drawn too.

  ris-bench sheet "w/o Bridger=a.parquet" Bridger=b.parquet --data DIR --disagreement --out figures
"""


def add(verbs: Any) -> None:
    sheet = verbs.add_parser(
        "sheet",
        help="draw what several models answer to the same expressions",
        description=SHEET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sheet.set_defaults(call=_call)
    sheet.add_argument(
        "predictions", nargs="+", metavar="[LABEL=]FILE", help="a file of predictions (its label, if not its name)"
    )
    add_data_folder(sheet)
    sheet.add_argument("--rows", type=count, default=6, metavar="N", help="expressions shown (default: %(default)s)")
    how = sheet.add_mutually_exclusive_group()
    how.add_argument("--seed", type=int, default=0, metavar="N", help="draws them at random (default: %(default)s)")
    how.add_argument("--disagreement", action="store_true", help="show those on which the models differ most")
    sheet.add_argument(
        "--threshold",
        type=float,
        default=RIS_BENCH.threshold,
        metavar="P",
        help="of maps: a pixel is in the mask where its probability is greater (default: %(default)s)",
    )
    sheet.add_argument("--out", type=Path, default=".", metavar="DIR", help="where the files go (default: here)")


def _call(args: argparse.Namespace) -> int:
    if not 0 < args.threshold < 1:
        raise UserError(f"a threshold is a probability between 0 and 1, not {args.threshold:g}")
    if args.seed < 0:
        raise UserError(f"a seed is at least 0, not {args.seed}")

    from ris_bench import predictions, scoring  # only now: these import torch, and the others matplotlib
    from ris_bench.report import drawing, sheets

    files = {label: predictions.read(path) for label, path in sheets.read(args.predictions).items()}
    samples: dict[scoring.Split, Any] = {}
    for given in files.values():
        samples |= scoring.load(given, args.data)
    drawn, absent = sheets.draw(
        samples, files, rows=args.rows, seed=args.seed, disputed=args.disagreement, threshold=args.threshold
    )
    for line in absent:
        print(line, file=sys.stderr)
    for each in drawn:
        print(each.caption)
        for path in drawing.save(each, args.out):
            print(path)
    return 0
