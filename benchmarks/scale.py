"""How cost grows: `python -m benchmarks.scale [--images N ...] [--trials N ...] [--expressions N ...]`.

Each line is one size, with the time for each of its items: where growth is linear it stays the same. Below stands the
power of the size that the whole time grows with, fitted over the sizes from a tenth of the largest on. It is the
processor's time, which other processes disturb less, but for a GPU's.

A size of a data set is measured in a process of its own, with made-up referents of one expression in images of 32 x 32,
which are never read:

    index, open    write the index of the parsed split, and read it as a trial does
    batches        what training keeps of it, tokens included
    epoch          the order of an epoch; with three expressions of an image side by side: grouped
    write, read    a file of predictions
    score          its scores
    compare        two trials by their tables of expressions, with 100 resamples of the images
    peak           of the memory, over what the process held before it began
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate

EXPERIMENT = """\
name: many
title: Many trials
defaults:
  dataset: refcoco
  backbone: tiny-clip-rn
  method: frozen
  head: {etris: {width: 16, layers: 1, heads: 2, ffn: 16}}
  train: {epochs: 1, batch_size: 4, lr: 1.0e-3, milestones: [], gamma: 0.1, precision: fp32}
  eval: {select_on: val, splits: [val]}
  seed: 0
grid:
  method: [frozen, lora, adapter, coop, bridger]
  seed: SEEDS
table:
  rows: method
  columns:
    - {header: mIoU, value: miou, splits: [val]}
"""
SIDE = 32
WORDS = ("man", "woman", "left", "right", "red", "shirt", "blue", "umbrella", "tall", "small", "front", "back", "table")


class Clock:
    """Seconds that something takes, by what it is."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}

    def __call__(self, what: str, run: Callable[[], Any]) -> Any:
        started = time.process_time()
        made = run()
        self.taken[what] = time.process_time() - started
        return made


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; 0 where there is no /proc."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return 0
    return int(lines[field].split()[0]) * 1024


def images(number: int) -> dict[str, float]:
    """Seconds of every way to go through a split of so many images, and bytes that it takes at most."""
    torch.set_num_threads(1)
    go_through(min(number, 100))  # imports, and what is made once
    before = resident("VmRSS")
    return go_through(number) | {"peak": resident("VmHWM") - before}


def go_through(number: int) -> dict[str, float]:
    from ris_bench.data import index
    from ris_bench.data.samples import Sample
    from ris_bench.loading import ReferentBatches, Tokenizer
    from ris_bench.predictions import Prediction, Predictions, read, write
    from ris_bench.protocols import RIS_BENCH
    from ris_bench.report import statistics
    from ris_bench.scoring import score

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RIS_BENCH_CACHE"] = folder
        home = Path(folder) / "images"

        def sample(i: int) -> Sample:
            expression = " ".join(WORDS[i % step] for step in (13, 11, 7))
            corner = i % 16
            return Sample(
                dataset="many",
                split="train",
                ref_id=i,
                sent_id=i,
                sentence_index=0,
                image_id=i,
                ann_id=i,
                category="thing",
                expression=expression,
                raw=expression,
                image_path=home / f"{i:012}.jpg",
                height=SIDE,
                width=SIDE,
                segmentation=[[corner, corner, corner + 15, corner, corner + 15, corner + 15, corner, corner + 15]],
            )

        clock("index", lambda: index.save("many", "0" * 64, home, {"train": [sample(i) for i in range(number)]}))
        samples = clock("open", lambda: index.load("many", "0" * 64, home)["train"])
        assert len(samples) == number
        tokenizer = Tokenizer(17, 8192)

        def sampled(what: str, together: int) -> None:
            given = {"known": len, "expressions_per_image": together}
            batches = clock("batches", lambda: ReferentBatches(samples, tokenizer, SIDE, 32, 0, **given))
            clock(what, lambda: next(batches.epoch(1)))

        sampled("epoch", 1)
        sampled("grouped", 3)
        path = Path(folder) / "answers.parquet"

        def answer() -> Iterator[Prediction]:
            for one in samples:
                yield Prediction.of(one, mask_HW=one.mask())

        def scored() -> None:
            predictions: Predictions = clock("read", lambda: read(path))
            found = clock("score", lambda: score(predictions, {("many", "train"): samples}, [RIS_BENCH]))
            assert found[0].value == 1

        clock("write", lambda: write(path, answer()))
        scored()

        def compare() -> None:
            identity = ("dataset", "split", "ref_id", "sent_id", "sentence_index", "image_id", "ann_id", "expression")
            columns = {name: [getattr(sample, name) for sample in samples] for name in identity}
            draws = np.random.default_rng(0)
            both = []
            for _ in range(2):
                counts = {"intersection": draws.integers(100, size=number), "union": 100, "target": 100}
                both.append(statistics.ordered(pd.DataFrame(columns | counts)))
            statistics.check_same(*both, ("one", "other"))
            sums = [statistics.sums(frame, ["miou", "oiou"]) for frame in both]
            parts = (np.stack([getattr(one, part) for one in sums], 1) for part in ("numerator_IM", "denominator_IM"))
            statistics.bootstrap(*parts, resamples=100, seed=0)

        clock("compare", compare)
    return clock.taken


def trials(number: int) -> dict[str, float]:
    """Of an experiment of so many trials."""
    from ris_bench.experiment import load

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.yaml"
        seeds = list(range(-(-number // 5)))
        path.write_text(EXPERIMENT.replace("SEEDS", json.dumps(seeds)), encoding="utf-8")
        experiment = clock("read", lambda: load(path))
        clock("next", lambda: experiment.trials({}))
        clock("plan", lambda: experiment.text)
    return clock.taken


def expressions(numbers: list[int]) -> Iterator[tuple[int, dict[str, float]]]:
    """Of one image, in evaluation on the tiny ResNet: a text-free tower, and one that meets the words."""
    from ris_bench.backbones.base import BACKBONES
    from ris_bench.backbones.weights import Weights
    from ris_bench.evaluation import forward
    from ris_bench.head import HEADS
    from ris_bench.methods.base import METHODS
    from ris_bench.model import RISModel
    from ris_bench.speed import choose

    torch.set_num_threads(1)
    cpu, clock, models = torch.device("cpu"), Clock(), {}
    for name in ("frozen", "bridger"):
        backbone = BACKBONES["tiny-clip-rn"](Weights(None))
        method = METHODS[name](backbone)
        models[name] = RISModel(backbone, method, HEADS["etris"](backbone, width=128)).eval()
        choose(models[name], "fast")
    for number in numbers:
        tokens_BL = torch.randint(1, 8000, (number, 17))
        row_B, image_13HW = torch.zeros(number, dtype=torch.long), torch.randn(1, 3, 128, 128)
        with torch.inference_mode():
            for name, model in models.items():
                given = (model, image_13HW, row_B, tokens_BL, cpu, None)
                forward(*given)
                clock(name, lambda given=given: [forward(*given) for _ in range(5)])
        yield number, {name: seconds / 5 for name, seconds in clock.taken.items()}


def power(kind: str, what: str, rows: list[dict[str, float]]) -> float:
    """By which the time grows: 1 where it is linear; not a number where there is one size."""
    large = [row for row in rows if 10 * row[kind] >= max(row[kind] for row in rows)]
    sizes = [math.log(row[kind]) for row in large]
    times = [math.log(max(row[what] * row[kind], 1e-3)) for row in large]
    return float(np.polyfit(sizes, times, 1)[0]) if len(large) > 1 else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("images", [10**3, 10**4, 10**5, 10**6]),
        ("trials", [10, 100, 1000, 10_000]),
        ("expressions", [1, 2, 4, 8, 16, 32]),
    ):
        parser.add_argument(
            f"--{name}", type=int, nargs="*", default=default, metavar="N", help="(default: %(default)s)"
        )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also written there")
    args = parser.parse_args()
    for name in ("images", "trials", "expressions"):
        if any(number < 2 - (name == "expressions") for number in getattr(args, name)):
            parser.error(f"--{name} has {min(getattr(args, name))}; give larger numbers")
    found: dict[str, list[dict[str, float]]] = {"images": [], "trials": [], "expressions": []}

    def show(kind: str, number: int, taken: dict[str, float]) -> None:
        row = {kind: number} | {what: 1e6 * s / number for what, s in taken.items() if what != "peak"}
        if "peak" in taken:
            row["peak MB"] = taken["peak"] / 1e6
        found[kind].append(row)
        print(f"  {kind}: {number:,} done", flush=True)

    for number in args.images:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # of which the peak is that size's alone
            show("images", number, process.submit(images, number).result())
    if args.trials:
        trials(5)  # imports what reading needs
    for number in args.trials:
        show("trials", number, trials(number))
    for number, taken in expressions(args.expressions):
        show("expressions", number, taken)
    for kind, rows in found.items():
        if rows:
            powers = {what: power(kind, what, rows) for what in rows[0] if what not in (kind, "peak MB")}
            lines = [*rows, {kind: "power"} | {what: f"{one:.2f}" for what, one in powers.items()}]
            print(
                f"\nMicroseconds for each of the {kind}\n{tabulate(lines, headers='keys', floatfmt=',.1f', intfmt=',')}"
            )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
