"""ris-bench data prepare (in prepare.py), ris-bench data check and ris-bench data audit."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ris_bench.cli import prepare
from ris_bench.cli.arguments import add_data_folder, read_dataset
from ris_bench.data import check

CHECK = """\
Reads the files of a dataset and says of every split what it holds: referents, expressions and images, beside what is
published of them; referents that point to nothing; images that are missing or of another size than their annotation
(only headers are read); polygons and run lengths that are none.

exit code:  0 all well   1 something differs or is at fault   2 bad input, or the dataset is not there
"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser("data", help="look after the data sets").add_subparsers(required=True, metavar="VERB")
    prepare.add(parser)

    verb = parser.add_parser(
        "check",
        help="compare the files of a dataset with what is published of it, and with each other",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(call=lambda args: _check_data(args, verb))
    verb.add_argument(
        "dataset",
        nargs="?",
        metavar="NAME",
        help="as in an experiment: refcoco, or with options: 'own: {file: mine.json}'",
    )
    verb.add_argument("--all", action="store_true", help="every dataset that is there and needs no options")
    add_data_folder(verb)
    verb.add_argument("--json", action="store_true", help="a JSON list on stdout, and nothing else")

    audit = parser.add_parser(
        "audit",
        help="say what scores on a dataset can hide",
        description="Reports images that one split trains on and another evaluates on, referents on whose ground truth "
        "the released evaluations differ, and expressions that are longer than the model reads.",
    )
    audit.set_defaults(call=_audit_data)
    audit.add_argument("datasets", nargs="*", metavar="NAME", help="as for check (default: all that are there)")
    add_data_folder(audit)
    audit.add_argument("--json", action="store_true", help="a JSON object on stdout, and nothing else")


def _check_data(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.all == (args.dataset is not None):
        parser.error("name a dataset, or --all")

    rows = check.check_all(args.data) if args.all else check.check(read_dataset(args.dataset), args.data)
    print(json.dumps([row.to_dict() for row in rows], indent=1) if args.json else check.text(rows))
    return 0 if all(row.ok for row in rows) else 1


def _audit_data(args: argparse.Namespace) -> int:
    from ris_bench import audit  # only now: this imports torch

    chosen = [source for name in args.datasets for source in read_dataset(name).sources]
    found = audit.audit(chosen or audit.present(args.data), args.data)
    print(json.dumps(audit.to_dict(*found), indent=1) if args.json else audit.text(*found))
    return 0
