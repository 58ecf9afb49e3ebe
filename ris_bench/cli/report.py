"""ris-bench report."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ris_bench import plan
from ris_bench.cli.arguments import place
from ris_bench.errors import UserError
from ris_bench.protocols import PROTOCOLS, RIS_BENCH, find
from ris_bench.remote import is_url
from ris_bench.report import folder, speeds
from ris_bench.rescored import rescored
from ris_bench.results import Store

REPORT = f"""\
Makes the tables, figures and page of an experiment anew, from the files of its results alone: no data is needed, and
no PyTorch for an experiment that was run as it stands. Files that are no result of its trials are named and left out.
Of results at a URL the report is made on this machine, where it says; nothing is written there.
What `python -m benchmarks.speed --out RESULTS/speed.json` has measured is shown with every experiment of RESULTS.

{chr(10).join(f"{kind:<5} {what}" for kind, what in folder.FORMATS.items())}
"""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "report",
        help="make tables, figures and a page of the results of an experiment",
        description=REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=_call)
    parser.add_argument(
        "experiment",
        type=place,
        metavar="EXPERIMENT.yaml|DIR|URL",
        help="an experiment, or the folder of one among the results: as it was run last, --set included",
    )
    parser.add_argument(
        "--format",
        type=_formats,
        default=tuple(folder.FORMATS),
        metavar="F,...",
        help=f"of {','.join(folder.FORMATS)} (default: all)",
    )
    parser.add_argument(
        "--against", metavar="METHOD", help="compare the rows with this one, as ris-bench compare does, and mark them"
    )
    parser.add_argument(
        "--protocol",
        metavar="P",
        help="the scores by another protocol, as `ris-bench score --trial` has kept them, in the tables of the formats "
        f"{','.join(folder.TABLES)}: {', '.join(PROTOCOLS)}",
    )
    parser.add_argument(
        "--results",
        type=place,
        metavar="DIR|URL",
        help="where results are kept (default: results, or the folder around the one named)",
    )


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(text.split(","))
    if unknown := [name for name in formats if name not in folder.FORMATS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no format; write some of {','.join(folder.FORMATS)}")
    return formats


def _call(args: argparse.Namespace) -> int:
    named, root, store = args.experiment, args.results, None
    if is_url(named):
        store, named = plan.opened(named)
    elif root is not None and is_url(root):
        store, _ = plan.opened(root)
        root = store.root
    experiment, into, root = plan.find(named, root)
    store = store or Store(root.absolute())
    store.fetch(run.trial.id for run in experiment.runs)
    results, skipped = store.collect(run.trial for run in experiment.runs)
    if not results:
        left_out = f"; {skipped[0]}" if skipped else ""
        raise UserError(f"{store.place} has no result of {experiment.path}: run it, or give --results DIR{left_out}")
    if missing := [trial.id for trial in experiment.trials(results) if trial.id not in results]:
        skipped.append(f"without a result: {', '.join(missing)}")
    measured, unread = speeds.read(store.root)
    skipped += unread
    by = None
    if args.protocol is not None and (protocol := find(args.protocol)) is not RIS_BENCH:
        if args.against is not None:
            raise UserError("--against compares the expressions, which are counted by ris-bench; leave out --protocol")
        args.format = tuple(name for name in args.format if name in folder.TABLES)
        into, measured = into / protocol.name, None
        by = rescored(results, store, protocol)
        shown = {run.trial.id for run in experiment.reported(results)}
        if lacking := [name for name in by.lacking if name in shown]:
            skipped.append(
                f"not scored by {protocol.name}: {', '.join(lacking)}; `ris-bench evaluate TRIAL --split S --maps "
                f"--out F` and `ris-bench score F --protocol {protocol.name} --trial TRIAL` do that"
            )
    compared = None
    if args.against is not None:
        from ris_bench.report.comparison import compare

        compared = compare(experiment, store, args.against)
    table, written, absent = folder.write(
        experiment, results, store, into, args.format, compared=compared, skipped=skipped, by=by, speeds=measured
    )
    for line in (*skipped, *absent):
        print(f"warning: {line}", file=sys.stderr)
    print(table.markdown)
    for path in written:
        print(path)
    return 0
