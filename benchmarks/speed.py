"""What the fast way of computing saves: `python -m benchmarks.speed [CASE ...] [--released ETRIS DETRIS]`.

On full-size models with random weights, on a GPU if there is one, else on the CPU with `--threads`; with one thread it
is the processor's time that is taken, which other processes disturb less. The ways take turns, every model in a process
of its own, as it is used: what one does with memory is nothing to the others. A ratio is the median of the ratios of
neighbouring runs, with their range. Three ways are compared:

    released  the paper's own modules, from a clone of its repository that `--released` names; while they train, ETRIS
              trains the positions of both towers too and moves the statistics of their norms
    plain     the same function as fast, computed as the papers' code computes it; an image is encoded anew for every
              expression
    fast      what trials do; "cached" with what is known of the images from disk. With `--speed compiled` that is
              compiled too
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.papers import DETRIS_B, ETRIS_R101, ETRIS_VIT_B, clone_of, released
from ris_bench import speed
from ris_bench.backbones.base import BACKBONES
from ris_bench.errors import UserError
from ris_bench.evaluation import count, forward, log_odds
from ris_bench.files import write_whole
from ris_bench.head import HEADS
from ris_bench.kept import Room
from ris_bench.methods.base import METHODS
from ris_bench.model import RISModel
from ris_bench.official import to_official
from ris_bench.pixels import Images
from ris_bench.predictions import Maps
from ris_bench.protocols import CRIS
from ris_bench.resampling import cut
from ris_bench.training import reduced, segmentation_loss, settle
from ris_bench.transforms import CLIP_MEAN, CLIP_STD, Letterbox, restore


def by_onednn(x: torch.Size, packed: torch.Size, *rest: object, out_shape: torch.Size, **options: object) -> int:
    """What PyTorch does not count: for every number written, the products and sums over one row of the weight."""
    return 2 * out_shape.numel() * packed[1:].numel()


BY_ONEDNN = {
    getattr(torch.ops.mkldnn, name): by_onednn
    for name in ("_linear_pointwise", "_convolution_pointwise")
    if hasattr(torch.ops.mkldnn, name)
}
EXPRESSIONS = 7
"""Of an image: RefCOCO's val has 10,834 on 1,500."""
TRAIN_BATCH = {"cpu": 2, "cuda": 32}
REFERENTS = 42_404
"""That an epoch of RefCOCO passes through."""
MEASURES = ("forward", "grouped", "train", "postprocess", "load")
PHOTO = (480, 640)
"""Height and width of the usual image of COCO."""


class Case(NamedTuple):
    backbone: str
    method: str
    head: str = "etris"
    method_options: dict[str, Any] = {}
    paper: str | None = None
    """The case that is the paper's own model on this backbone; None where it is this one."""


CASES = {
    "etris-r101": Case("clip-r101", "bridger"),
    "etris-vit-b16": Case("clip-vit-b16", "bridger", method_options={"width": 128, "heads": 8}),
    "detris-b": Case("dinov2-b", "detris", "detris"),
    "frozen-r101": Case("clip-r101", "frozen", paper="etris-r101"),
    "frozen-vit-b16": Case("clip-vit-b16", "frozen", paper="etris-vit-b16"),
    "frozen-dinov2-b": Case("dinov2-b", "frozen", "detris", paper="detris-b"),
}
PAPERS = {"etris-r101": ETRIS_R101, "etris-vit-b16": ETRIS_VIT_B, "detris-b": DETRIS_B}


class Row(NamedTuple):
    """One way against another."""

    case: str
    what: str
    slow: str
    quick: str
    slow_ms: float
    quick_ms: float
    ratio: float
    """Slow over quick: the median of neighbouring runs."""
    least: float
    most: float
    per_second: float
    """Expressions (in training, images) of the quicker way."""
    epoch_minutes: float | None
    """That the quicker way would take to train an epoch of RefCOCO, if nothing but its steps took time."""
    slow_gflop: float | None
    """Of one run in products and sums of matrices, convolutions and attention; a product and a sum count as two."""
    quick_gflop: float | None
    ceiling: float | None
    """What the quicker way makes of the rate at which one large product of matrices runs, on a GPU."""
    slow_peak: int | None
    """Bytes that a run takes at most, over those held before; None where that is not known."""
    quick_peak: int | None


class Bench(NamedTuple):
    device: torch.device
    threads: int
    precision: str
    autocast: torch.dtype | None
    repeats: int
    rate: float
    """GFLOP a second of one large product of matrices."""

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def compare(self, case: str, what: str, runs: Mapping[str, Timed | Apart], number: int) -> Iterator[Row]:
        """The last of the runs against each of the others; a run does `number` expressions."""
        costs, taken = {name: run.cost() for name, run in runs.items()}, {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                taken[name].append(run.seconds())
        *others, quick = runs
        took = statistics.median(taken[quick])
        alone = self.device.type == "cuda"  # what a CPU can do changes with what else runs on it
        for slow in others:
            ratios = [one / other for one, other in zip(taken[slow], taken[quick], strict=True)]
            yield Row(
                case,
                what,
                slow,
                quick,
                slow_ms=1e3 * statistics.median(taken[slow]),
                quick_ms=1e3 * took,
                ratio=statistics.median(ratios),
                least=min(ratios),
                most=max(ratios),
                per_second=number / took,
                epoch_minutes=REFERENTS / number * took / 60 if what.startswith("training") else None,
                slow_gflop=costs[slow].gflop,
                quick_gflop=costs[quick].gflop,
                ceiling=costs[quick].gflop / took / self.rate if alone and costs[quick].gflop else None,
                slow_peak=costs[slow].peak,
                quick_peak=costs[quick].peak,
            )


class Cost(NamedTuple):
    gflop: float | None
    peak: int | None
    """Bytes that a run takes at most, over those held before; None where that is not known."""


class Timed:
    """What is measured of a run."""

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self._run, self._device = run, device

    def cost(self) -> Cost:
        with FlopCounterMode(display=False, custom_mapping=BY_ONEDNN) as counter:
            self._run()  # which warms up what is kept, too
        return Cost(counter.get_total_flops() / 1e9 or None, self._peak())

    def seconds(self) -> float:
        if self._device.type == "cuda":
            self._run()  # the memory that others had meanwhile is asked for again
        started = self._now()
        self._run()
        seconds = self._now() - started
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._run()
            return torch.cuda.max_memory_allocated() - before
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed, and the run would be given that
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
            before = _resident("VmRSS")
        except (OSError, AttributeError):  # another system, or another C library
            return None
        self._run()
        return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP a second of the best of a few large products of matrices."""
    side = 1536 if device.type == "cpu" else 8192
    one = torch.randn(side, side, device=device, dtype=dtype)
    product = Timed(lambda: one @ one, device)
    return 2e-9 * side**3 / min(product.seconds() for _ in range(5))


def build(case: Case, way: speed.Speed, device: torch.device) -> RISModel:
    torch.manual_seed(0)  # cases of one kind have the same weights
    backbone = BACKBONES[case.backbone](None)
    method = METHODS[case.method](backbone, **case.method_options)
    model = RISModel(backbone, method, HEADS[case.head](backbone)).to(device)
    speed.choose(model, way)
    return model


def _save(case: Case, path: Path) -> None:
    model = build(case, "plain", torch.device("cpu"))
    torch.save((model.backbone.image_size, model.backbone.vocab_size, to_official(model)), path)


class Way:
    """A model that computes in one way, and what is measured of it: `prepare` says of what."""

    timed: Timed

    def __init__(self, bench: Bench, label: str, way: str, clones: Sequence[Path]) -> None:
        torch.set_num_threads(bench.threads)
        settle(bench.precision, bench.device)
        self.bench, self.way, case = bench, way, CASES[label]
        if way == "released":
            # From a file, as it has its own weights: our model has left nothing in the memory of this process.
            label = case.paper or label
            with ProcessPoolExecutor(1, get_context("spawn")) as pool, tempfile.TemporaryDirectory() as folder:
                pool.submit(_save, CASES[label], path := Path(folder) / "model.pth").result()
                self.size, self.vocabulary, state = torch.load(path)
            paper = PAPERS[label]
            self.model = released(paper, clone_of(paper, clones), state).to(bench.device)
        else:
            self.model = build(case, way, bench.device)
            self.size, self.vocabulary = self.model.backbone.image_size, self.model.backbone.vocab_size

    def prepare(self, what: str, number: int) -> None:
        torch.manual_seed(0)
        self.timed = Timed(getattr(self, what)(number), self.bench.device)

    def cost(self) -> Cost:
        return self.timed.cost()

    def seconds(self) -> float:
        return self.timed.seconds()

    def logits(self) -> np.ndarray:
        torch.manual_seed(0)
        return self.evaluation(1)().float().cpu().numpy()

    def caches(self) -> bool:
        """Whether something of an image is on disk when it trains."""
        return self.quick and self.model.backbone.image.untouched > 1

    @property
    def quick(self) -> bool:
        return self.way not in ("released", "plain")

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        tokens_BL = torch.randint(1, self.vocabulary - 2, (batch, 17))
        tokens_BL[:, 0], tokens_BL[:, 9], tokens_BL[:, 10:] = self.vocabulary - 2, self.vocabulary - 1, 0
        images_B3HW = torch.randn(batch, 3, self.size, self.size)
        return images_B3HW.to(self.bench.device), tokens_BL.to(self.bench.device)

    def evaluation(self, expressions: int) -> Callable[[], Tensor]:
        """All expressions of one image: the logits of the last."""
        bench = self.bench
        image_13HW, _ = self.inputs(1)
        _, tokens_BL = self.inputs(expressions)
        row_B = torch.zeros(expressions, dtype=torch.long)

        def run() -> Tensor:
            if self.model.training:  # else what is folded would be folded again, which an evaluation does once
                self.model.eval()
            with torch.inference_mode(), bench.cast():
                if self.quick:
                    return forward(self.model, image_13HW, row_B, tokens_BL, bench.device, bench.autocast)[-1]
                for tokens_1L in tokens_BL.split(1):  # as the released test scripts do
                    logits_11hw = self.model(image_13HW, tokens_1L)
                return logits_11hw[0, 0]

        return run

    def training(self, batch: int) -> Callable[[], None]:
        """One step."""
        bench, model = self.bench, self.model
        images, tokens = self.inputs(batch)
        mask = (torch.rand(batch, 1, *images.shape[2:], device=bench.device) > 0.5).float()
        tuned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(tuned, lr=1e-5, fused=self.quick)
        kept = model.backbone.image.known(images) if self.caches() else None

        def loss() -> Tensor:
            with bench.cast():
                if self.way == "released":
                    return model(images, tokens, mask)[2]
                logits = model(model.known(images) if kept is None else kept, tokens)
            return segmentation_loss(logits, mask, dice=0.0)

        def run() -> None:
            if not model.training:
                model.train()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run


class Apart:
    """A way in a process of its own."""

    def __init__(self, *given: Any) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self._pool.submit(_begin, *given).result()

    def call(self, name: str, *given: Any) -> Any:
        return self._pool.submit(_call, name, *given).result()

    def cost(self) -> Cost:
        return self.call("cost")

    def seconds(self) -> float:
        return self.call("seconds")

    def end(self) -> None:
        self._pool.shutdown()


def _begin(*given: Any) -> None:
    global _there  # the way of such a process
    _there = Way(*given)


def _call(name: str, *given: Any) -> Any:
    return getattr(_there, name)(*given)


def measure(bench: Bench, label: str, way: str, measures: set[str], clones: Sequence[Path]) -> Iterator[Row]:
    ways = {name: Apart(bench, label, name, clones) for name in (*(("released",) if clones else ()), "plain", way)}
    own = CASES[label].paper is None
    if clones and own:
        theirs, ours = (ways[name].call("logits") for name in ("released", way))
        share = np.abs(theirs - ours).max() / theirs.std()
        print(f"  {label}: logits of {way} and released differ by {share:.1e} of their deviation", flush=True)
    batch = TRAIN_BATCH[bench.device.type]
    for name, what, title, number in (
        ("forward", "evaluation", "evaluation, 1 of an image", 1),
        ("grouped", "evaluation", f"evaluation, {EXPRESSIONS} of an image", EXPRESSIONS),
        ("train", "training", f"training step of {batch}", batch),
    ):
        if name not in measures:
            continue
        # No paper's code evaluates a frozen model; what it trains is what a study without it would train.
        runs = {way: run for way, run in ways.items() if own or what == "training" or way != "released"}
        for run in runs.values():
            run.call("prepare", what, number)
        if what == "training" and ways[way].call("caches"):
            runs["cached"] = runs.pop(way)
        yield from bench.compare(label, title, runs, number)
    for run in ways.values():
        run.end()


def postprocessing(bench: Bench) -> Iterator[Row]:
    """From the map of one expression to its counts, as ETRIS engine/engine.py:97-115 does it for `cris`, but without
    reading a mask from a file; and as our evaluation does it, by its own protocol."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    torch.manual_seed(0)
    # As smooth as what a network answers.
    map_1hw = F.interpolate(torch.randn(1, 1, 13, 13), (104, 104), mode="bicubic")[0] * 6
    target_HW = np.zeros(PHOTO, dtype=bool)
    target_HW[100:300, 200:400] = True
    target_WH, size = np.ascontiguousarray(target_HW.T), 416
    scale = min(size / PHOTO[0], size / PHOTO[1])
    borders = [(size - scale * side) / 2 for side in reversed(PHOTO)]
    there = np.array([[scale, 0, borders[0]], [0, scale, borders[1]]])
    back = cv2.invertAffineTransform(there)
    found = {}
    logits_1hw, target_1HW = map_1hw.to(bench.device), torch.from_numpy(target_HW)[None].to(bench.device)
    maps = Maps(values="logit", geometry="letterbox-exact", size=size)

    def official() -> None:
        probability = F.interpolate(
            logits_1hw[None].sigmoid(), size=(size, size), mode="bicubic", align_corners=True
        ).squeeze()
        flags = {"flags": cv2.INTER_CUBIC, "borderValue": 0.0}
        predicted = cv2.warpAffine(probability.cpu().numpy(), back, PHOTO[::-1], **flags) > CRIS.threshold
        inter, union = np.logical_and(predicted, target_HW), np.logical_or(predicted, target_HW)
        found["official"] = np.sum(inter) / (np.sum(union) + 1e-6)

    def separable() -> None:
        rules = CRIS.upsample, CRIS.restore, CRIS.threshold
        predicted_WH = cut(logits_1hw[0].cpu().numpy(), maps, PHOTO, PHOTO, *rules)
        both = np.count_nonzero(predicted_WH & target_WH)
        found["separable"] = both / (np.count_nonzero(predicted_WH) + np.count_nonzero(target_WH) - both)

    frame = Letterbox(size).frame(*PHOTO)

    def own() -> None:
        counts_14 = count(restore(logits_1hw, frame) > log_odds(CRIS.threshold), target_1HW)
        found["own"] = counts_14[0, 0].item() / counts_14[0, 1].item()

    repeats = bench._replace(repeats=20 * bench.repeats)
    with torch.inference_mode():
        runs = {name: Timed(run, bench.device) for name, run in (("official", official), ("separable", separable))}
        yield from repeats.compare("-", "post-processing by cris", runs, 1)
        runs = {"official": runs["official"], "own": Timed(own, bench.device)}
        yield from repeats.compare("-", "post-processing, own protocol", runs, 1)
    print(f"  IoU by cris: {found['official']:.7f} official, {found['separable']:.7f} separable", flush=True)


def loading(bench: Bench) -> Iterator[Row]:
    """One image as ETRIS utils/dataset.py:139-175 reads it, without its mask, and as a trial has it again."""
    import cv2

    cv2.setNumThreads(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(PHOTO[::-1], Image.Resampling.BICUBIC).save(path, quality=90)
        size = 416
        scale = min(size / PHOTO[0], size / PHOTO[1])
        there = np.array([[scale, 0, 0], [0, scale, (size - scale * PHOTO[0]) / 2]])
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

        def official() -> Tensor:
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            border = [255 * value for value in CLIP_MEAN]
            image = cv2.warpAffine(image, there, (size, size), flags=cv2.INTER_CUBIC, borderValue=border)
            tensor = torch.from_numpy(image.transpose((2, 0, 1))).float()
            return tensor.div_(255.0).sub_(mean).div_(std)

        sample = SimpleNamespace(image_path=path, image=lambda: Image.open(path).convert("RGB"))
        read, kept = Images(size), Images(size)
        repeats = bench._replace(repeats=20 * bench.repeats)
        with Room(Path(folder) / "kept", 1 << 30) as room:
            kept.keep([sample], room)
            runs = {"official": official, "from its file": lambda: read([sample]), "kept": lambda: kept([sample])}
            timed = {name: Timed(run, bench.device) for name, run in runs.items()}
            yield from repeats.compare("-", "loading", timed, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="(default: all)")
    parser.add_argument(
        "--released", nargs="+", type=Path, default=[], metavar="FOLDER", help="clones of the papers' repositories"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on a CPU (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="on a GPU (default: %(default)s)"
    )
    parser.add_argument("--speed", choices=("fast", "compiled"), default="fast", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also written there")
    args = parser.parse_args()
    if unknown := sorted({*args.cases} - {*CASES}):
        parser.error(f"there is no case {unknown[0]!r}; there are {', '.join(CASES)}")
    try:
        for label in args.cases if args.released else ():
            clone_of(PAPERS[CASES[label].paper or label], args.released)
    except UserError as error:
        parser.error(str(error))
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; give at least 1")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, autocast = settle(args.precision, device), reduced(args.precision, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()}, {args.threads} {'thread' if args.threads == 1 else 'threads'}"
    bench = Bench(
        device, args.threads, args.precision, autocast, args.repeats, ceiling(device, autocast or torch.float32)
    )
    print(f"{name}, torch {torch.__version__}: {bench.rate:.0f} GFLOP/s in a large product of matrices", flush=True)
    of_models = {"forward", "grouped", "train"} & {*args.measures}
    parts = [measure(bench, label, args.speed, of_models, args.released) for label in args.cases if of_models]
    parts += [
        make(bench) for what, make in (("postprocess", postprocessing), ("load", loading)) if what in args.measures
    ]
    found = []
    try:
        for row in chain.from_iterable(parts):
            found.append(row._asdict())
            spread = f"{row.ratio:.2f}x [{row.least:.2f}-{row.most:.2f}]"
            print(f"  {row.case}: {row.what}: {row.quick} over {row.slow}: {spread}", flush=True)
            if args.out:  # what was measured so far, should the rest be cut off
                record = {"device": name, "torch": torch.__version__, "precision": precision}
                record |= {"ceiling_gflops": bench.rate, "rows": found}
                write_whole(args.out, json.dumps(record, indent=1))
    except UserError as error:
        parser.error(str(error))
    print(tabulate(found, headers="keys", floatfmt=".2f"))


if __name__ == "__main__":
    main()
