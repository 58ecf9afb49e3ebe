"""The command line: parses, calls and prints. A verb is a file, and imports what is heavy only when it is called."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from ris_bench.cli import (
    breakdown,
    compare,
    data,
    evaluate,
    export,
    import_official,
    params,
    predict,
    report,
    run,
    score,
    sheet,
    status,
)
from ris_bench.errors import UserError

VERBS = (
    run,
    status,
    params,
    import_official,
    export,
    compare,
    data,
    predict,
    evaluate,
    breakdown,
    score,
    sheet,
    report,
)
"""In the order in which --help lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Bad flags end in SystemExit(2), as argparse does it."""
    parser = argparse.ArgumentParser(
        prog="ris-bench", description="Parameter-efficient tuning for referring segmentation."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    args = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        return args.call(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what has finished is kept; the same command goes on with the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain when it flushes
        return 130
