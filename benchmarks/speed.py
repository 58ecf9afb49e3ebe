"""What the fast way of computing saves: `python -m benchmarks.speed [CASE ...]`.

Plain and fast alternate in one process, on full-size models with random weights; a ratio is the median of the ratios of
neighbouring runs, with their range. On a GPU if there is one, else on the CPU with `--threads`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ris_bench import speed
from ris_bench.backbones.base import BACKBONES
from ris_bench.head import HEADS
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel
from ris_bench.training import segmentation_loss

EXPRESSIONS = 7
"""Of an image: RefCOCO's val has 10,834 on 1,500."""
TRAIN_BATCH = {"cpu": 2, "cuda": 32}


class Case(NamedTuple):
    backbone: str
    method: str
    head: str = "etris"
    method_options: dict[str, Any] = {}


CASES = {
    "etris-r101": Case("clip-r101", "bridger"),
    "etris-vit-b16": Case("clip-vit-b16", "bridger", method_options={"width": 128, "heads": 8}),
    "detris-b": Case("dinov2-b", "detris", "detris"),
    "frozen-r101": Case("clip-r101", "frozen"),
    "frozen-vit-b16": Case("clip-vit-b16", "frozen"),
    "frozen-dinov2-b": Case("dinov2-b", "frozen"),
}


class Ratio(NamedTuple):
    """Plain over fast."""

    plain_ms: float
    fast_ms: float
    median: float
    least: float
    most: float


def build(case: Case, device: torch.device) -> RISModel:
    torch.manual_seed(0)
    backbone = BACKBONES[case.backbone](None)
    method = METHODS[case.method](backbone, **case.method_options)
    model = RISModel(backbone, method, HEADS[case.head](backbone))
    return model.to(device, memory_format=torch.channels_last)


def inputs(model: RISModel, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size, vocabulary = model.backbone.image_size, model.backbone.vocab_size
    tokens = torch.randint(1, vocabulary - 2, (batch, 17), device=device)
    tokens[:, 0], tokens[:, 9], tokens[:, 10:] = vocabulary - 2, vocabulary - 1, 0
    return torch.randn(batch, 3, size, size, device=device), tokens


def alternate(plain: Callable[[], Any], fast: Callable[[], Any], repeats: int, device: torch.device) -> Ratio:
    taken: dict[str, list[float]] = {"plain": [], "fast": []}
    for number in range(repeats + 1):
        for name, run in (("plain", plain), ("fast", fast)):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first run of each warms up
                taken[name].append(1e3 * (time.perf_counter() - started))
    ratios = [p / f for p, f in zip(taken["plain"], taken["fast"], strict=True)]
    medians = (statistics.median(taken[name]) for name in ("plain", "fast"))
    return Ratio(*medians, statistics.median(ratios), min(ratios), max(ratios))


def measure(model: RISModel, repeats: int, device: torch.device, autocast: torch.dtype | None) -> Iterator[tuple]:
    """(what, Ratio) for evaluation and training."""

    def cast() -> torch.autocast:
        return torch.autocast(device.type, autocast, enabled=autocast is not None)

    def one_by_one(way: speed.Speed) -> Callable[[], None]:
        image_13HW, tokens_1L = inputs(model, 1, device)

        def run() -> None:
            speed.choose(model, way)
            with torch.inference_mode(), cast():
                model(model.known(image_13HW), tokens_1L)

        return run

    def grouped(way: speed.Speed) -> Callable[[], None]:
        image_13HW, _ = inputs(model, 1, device)
        _, tokens_BL = inputs(model, EXPRESSIONS, device)

        def run() -> None:
            speed.choose(model, way)
            with torch.inference_mode(), cast():
                known = model.known(image_13HW)
                # A CPU is quickest when what it works on fits its caches.
                for tokens in tokens_BL.split(1 if device.type == "cpu" else EXPRESSIONS):
                    model(known[torch.zeros(len(tokens), dtype=torch.long, device=device)], tokens)

        return run

    def step(way: speed.Speed, cached: bool = False) -> Callable[[], None]:
        images, tokens = inputs(model, TRAIN_BATCH[device.type], device)
        mask = (torch.rand(len(images), 1, *images.shape[2:], device=device) > 0.5).float()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        kept = model.known(images) if cached else None

        def run() -> None:
            speed.choose(model, way)
            with cast():
                logits = model(model.known(images) if kept is None else kept, tokens)
            segmentation_loss(logits, mask, dice=0.0).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    model.eval()
    yield "one expression", alternate(one_by_one("plain"), one_by_one("fast"), repeats, device)
    yield f"{EXPRESSIONS} expressions of an image", alternate(grouped("plain"), grouped("fast"), repeats, device)
    model.train()
    yield "training step", alternate(step("plain"), step("fast"), repeats, device)
    if model.backbone.image.untouched > 1:
        pair = step("plain"), step("fast", cached=True)
        yield "training step, features cached", alternate(*pair, repeats, device)


def gigaflops(model: RISModel, way: speed.Speed, device: torch.device) -> float:
    """Of one expression; a product and a sum count as two."""
    image, tokens = inputs(model.eval(), 1, device)
    speed.choose(model, way)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(model.known(image), tokens)
    return counter.get_total_flops() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on a CPU (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="on a GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also written there")
    args = parser.parse_args()
    if unknown := sorted({*args.cases} - {*CASES}):
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.bfloat16 if device.type == "cuda" and args.precision == "bf16" else None
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {args.threads} threads"
    found = []
    for label in args.cases:
        model = build(CASES[label], device)
        flops = {way: gigaflops(model, way, device) for way in ("plain", "fast")}
        print(f"{label} on {name}: {flops['plain']:.1f} GFLOP an expression, {flops['fast']:.1f} fast", flush=True)
        for what, ratio in measure(model, args.repeats, device, autocast):
            row = {"case": label, "what": what, **ratio._asdict()}
            if device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            found.append(row)
            print(f"  {what}: {ratio.median:.2f}x [{ratio.least:.2f}-{ratio.most:.2f}]", flush=True)
        del model
    print(tabulate(found, headers="keys", floatfmt=".2f"))
    if args.out:
        record = {"device": name, "torch": torch.__version__, "precision": "fp32" if autocast is None else "bf16"}
        args.out.write_text(json.dumps({**record, "rows": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
