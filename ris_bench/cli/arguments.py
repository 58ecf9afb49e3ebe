"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ris_bench.data.dataset import Dataset, named
from ris_bench.located import read
from ris_bench.records import Speed
from ris_bench.remote import is_url

if TYPE_CHECKING:  # it imports torch
    from ris_bench.predict import Predictor


CHECKPOINT: dict[str, Any] = {
    "metavar": "TRIAL|DIR",
    "help": "the beginning of a trial's id, or a folder: of a trial, or written by export or import-official",
}
"""How a trained model is named."""


def add_results(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--results",
        type=place,
        default="results",
        metavar="DIR|URL",
        help="where results are kept: a folder, or a URL such as s3://bucket/path (default: %(default)s)",
    )


def place(text: str) -> Path | str:
    """A folder, or a URL, which is no path: its slashes are two."""
    return text if is_url(text) else Path(text)


def add_data_folder(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--data",
        type=Path,
        default="datasets",
        metavar="DIR",
        help="where refcoco/, ... and images/ lie (default: %(default)s)",
    )


def add_speed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--speed",
        choices=get_args(Speed),
        default="fast",
        help="compute as the papers' code does, or the same in less time; or that with its blocks compiled by PyTorch, "
        "which takes minutes at the start; only roundings differ, and compiled what dropout draws (default: "
        "%(default)s)",
    )


def read_dataset(text: str) -> Dataset:
    """A dataset as an experiment names it: refcoco, or with options: 'own: {file: mine.json}'."""
    return named(read(text, lambda line: f"dataset {text!r}").plain())


def add_plugins(verb: argparse.ArgumentParser, when: str = "") -> None:
    verb.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{when}a module or .py file that the trial's experiment names as a plug-in; may be repeated",
    )


def load_plugins(args: argparse.Namespace) -> None:
    from ris_bench import plugins  # only now: it imports torch

    for name in args.plugin:
        plugins.find(name, Path()).load()


def add_model(verb: argparse.ArgumentParser) -> None:
    """What else a verb is told that loads a trained model."""
    add_results(verb)
    verb.add_argument("--weights", type=Path, metavar="DIR", help="where pretrained weights lie (default: as run)")
    verb.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="a pixel is in the mask where its probability is greater (default: the checkpoint's own, else 0.35)",
    )
    add_plugins(verb)


def load_model(args: argparse.Namespace, checkpoint: str) -> Predictor:
    from ris_bench import predict  # only now: it imports torch

    load_plugins(args)
    way = getattr(args, "speed", "fast")
    return predict.load(checkpoint, results=args.results, weights=args.weights, threshold=args.threshold, way=way)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number
