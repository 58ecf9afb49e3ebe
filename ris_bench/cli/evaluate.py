"""ris-bench evaluate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ris_bench.cli.arguments import CHECKPOINT, add_data_folder, add_model, add_speed, load_model
from ris_bench.errors import UserError


def add(verbs: Any) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        help="write what a model answers to every expression of a split, to be scored",
        description="Runs a trained model over a split and writes its predictions for `ris-bench score`.",
    )
    evaluate.set_defaults(call=_call)
    evaluate.add_argument("checkpoint", **CHECKPOINT)
    evaluate.add_argument("--dataset", metavar="NAME", help="such as refcoco (default: what the trial was trained on)")
    evaluate.add_argument("--split", required=True, metavar="NAME", help="such as testA")
    add_data_folder(evaluate)
    add_model(evaluate)
    add_speed(evaluate)
    evaluate.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a name that ends in .parquet or .json"
    )
    evaluate.add_argument(
        "--maps",
        action="store_true",
        help="write the network's logits instead of masks: larger, and exact for protocols that resample them",
    )


def _call(args: argparse.Namespace) -> int:
    from ris_bench import predict  # only now: these import torch
    from ris_bench.data.dataset import DATASETS

    model = load_model(args, args.checkpoint)
    choice = model.dataset
    if args.dataset is not None and (choice is None or args.dataset != choice.name):
        choice = DATASETS.resolve(args.dataset, {})
    if choice is None:
        raise UserError(f"{args.checkpoint} does not say what it was trained on: name a data set with --dataset")
    dataset, options = DATASETS.build(choice), {choice.name: dict(choice.options)} if choice.options else None

    def report(done: int, total: int) -> None:
        print(f"\r{done:,} of {total:,} expressions", end="", file=sys.stderr, flush=True)

    number = predict.predict_split(
        model, dataset, args.split, args.data, args.out, dataset_options=options, maps=args.maps, report=report
    )
    print(file=sys.stderr)
    print(f"{args.out}: {number:,} predictions; ris-bench score {args.out} --data {args.data} scores them")
    return 0
