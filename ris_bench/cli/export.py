"""ris-bench export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import add_plugins, add_results, load_plugins
from ris_bench.remote import store_at


def add(verbs: Any) -> None:
    export = verbs.add_parser(
        "export",
        help="write a trained trial to a folder of its own, to pass it on",
        description="Writes the tuned tensors of a trial, or with --merge a whole model that runs without the method, "
        "and model.json, which says how to build and feed it; ris_bench.export.load(FOLDER) reads both.",
    )
    export.set_defaults(call=_call)
    export.add_argument("trial", metavar="TRIAL", help="the beginning of a trial's id, or its folder")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--merge", action="store_true", help="fold what was tuned into the pretrained weights, and write them all"
    )
    add_results(export)
    export.add_argument(
        "--weights", type=Path, metavar="DIR", help="with --merge: where pretrained weights lie (default: as run)"
    )
    add_plugins(export, "with --merge: ")


def _call(args: argparse.Namespace) -> int:
    from ris_bench.export import export  # only now: it imports torch

    load_plugins(args)
    folder = store_at(args.results).find(args.trial)
    export(folder, args.out, merge=args.merge, weights=args.weights)
    for file in sorted(args.out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0
