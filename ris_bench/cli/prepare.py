"""ris-bench data prepare."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import add_data_folder, read_dataset
from ris_bench.data import check, prepare

PREPARE = """\
Brings the files of a dataset into the data folder, as the README lays them out: its annotations, and the images of
COCO's train2014.zip. What is there stays as it is. An archive is downloaded to DIR/downloads, compared with the sha256
that is known of it, unpacked, and removed; a download that was stopped goes on where it was.

Without a network, give the archives that you have; what is missing and where it is published is said.
Then the dataset is checked as by `ris-bench data check`.

exit code:  0 all well   1 something differs or is at fault   2 bad input, or a file cannot be had   130 stopped
"""
QUIET_SECONDS = 30
"""Where nobody watches, a long step prints a line no more often than this."""


def add(verbs: Any) -> None:
    verb = verbs.add_parser(
        "prepare",
        help="download and unpack what a dataset lacks",
        description=PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(call=_prepare)
    verb.add_argument("dataset", metavar="NAME", help="as in an experiment: refcoco, refcocog-umd, grefcoco, ...")
    verb.add_argument(
        "--archives",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE|DIR",
        help="files that you have already, such as refcoco.zip or train2014.zip, or folders that hold them",
    )
    add_data_folder(verb)


def _prepare(args: argparse.Namespace) -> int:
    dataset = read_dataset(args.dataset)
    with _Steps() as steps:
        brought = prepare.prepare(dataset, args.data, args.archives, steps.report)
    print("\n".join(brought) or f"{args.data} holds every file of {dataset.name}", flush=True)
    rows = check.check(dataset, args.data)
    print(check.text(rows))
    return 0 if all(row.ok for row in rows) else 1


class _Steps:
    """A context manager that shows on stderr how far a step is: by a bar on a terminal, else by a line at times."""

    def __init__(self) -> None:
        self._name = ""
        self._spoke = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True))

    def __enter__(self) -> _Steps:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, name: str, done: int, total: int | None) -> None:
        """As ris_bench.data.archives.Report says."""
        begins, self._name = name != self._name, name
        if self._bar:
            if begins:
                self._task = self._bar.add_task(name, total=total)
            self._bar.update(self._task, completed=done, total=total)
        elif begins or time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._spoke = time.monotonic()
            print(f"{name}: {done:,} of {total:,} bytes" if total else name, file=sys.stderr, flush=True)
