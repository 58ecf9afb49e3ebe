"""One file of predictions under several protocols: every number with the name of its metric and of its protocol.

Maps are cut as each protocol cuts them. Masks are taken as they are: their threshold is the model's own, and where a
protocol compares in the square input of its network they are resampled by the nearest neighbour, as that code resamples
its ground truth; the tables mark such numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask
from tabulate import tabulate

from ris_bench import metrics
from ris_bench.data.dataset import DATASETS, Dataset
from ris_bench.data.samples import Sample, draw, referents
from ris_bench.errors import UserError
from ris_bench.predictions import Maps, Prediction, Predictions, decode, encode, match
from ris_bench.protocols import MARKS, PROTOCOLS, RIS_BENCH, Protocol, Resize
from ris_bench.resampling import converted, cut, nearest

Stage = Literal["test", "validation"]
Split = tuple[str, str]
"""Names of a dataset and of one of its splits."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a table."""

    protocol: str
    metric: str
    """As the protocol's code calls it: oIoU, cIoU, ..., Pr@0.5."""
    kind: str
    """What it is, by one name in all protocols: "overall", "mean", "Pr@0.5", "N-acc", "T-acc"."""
    dataset: str
    split: str
    value: float
    """In [0, 1]."""
    difference: float | None
    """To the value of ris-bench of the same kind, on the same predictions; None where that has none."""
    num_expressions: int
    """That the value is taken over."""
    marks: tuple[str, ...]
    """Keys of `MARKS`."""


def load(predictions: Predictions, data: Path) -> dict[Split, list[Sample]]:
    """The samples of every split that the predictions name. UserError where a data set or split is not there."""
    # A data set of one's own has a name of its own, by which rows call it; and those of a mix are its parts'.
    known: dict[str, Dataset] = {}
    for registered, options in predictions.dataset_options.items():
        dataset = DATASETS.build(DATASETS.resolve(registered, options))
        known |= {one.name: one for one in (dataset, *dataset.sources)}
    for name in dict.fromkeys(row.dataset for row in predictions.rows):
        if name not in known and name not in DATASETS:
            raise UserError(
                f"there is no dataset {name!r}; there are {', '.join(DATASETS)}; where it is your own, say so in the "
                f'file\'s header: "dataset_options": {{"own": {{"file": FILE, "name": "{name}"}}}}'
            )
        if name not in known:
            known[name] = DATASETS.build(DATASETS.resolve(name, {}))
    return {
        (name, split): known[name].read(data, split)
        for name, split in dict.fromkeys((row.dataset, row.split) for row in predictions.rows)
    }


def score(
    predictions: Predictions,
    samples: Mapping[Split, Sequence[Sample]],
    protocols: Sequence[Protocol],
    stage: Stage = "test",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """The scores by protocol, metric and split; those of ris-bench, with which all are compared, come first.

    Args:
        samples: every expression of each split that is predicted.
        stage: "test" is how papers make their numbers, also those of val; "validation" how checkpoints are selected.
        report: called with the number of expressions done and their total.

    Raises UserError where the predictions are not exactly those of the samples (see `predictions.match`), or a mask
    is not one of its image.
    """
    protocols = [RIS_BENCH, *(one for one in protocols if one != RIS_BENCH)]
    rows: dict[Split, list[Prediction]] = {split: [] for split in samples}
    for row in predictions.rows:
        rows[row.dataset, row.split].append(row)
    total, done, found = sum(map(len, samples.values())), 0, []
    for split, expected in samples.items():
        matched = match(rows[split], expected)
        tallies = [_Tally() for _ in protocols]

        groups = referents(expected)
        parts = [groups[start : start + _AT_A_TIME] for start in range(0, len(groups), _AT_A_TIME)]
        counted = partial(
            _counted,
            samples=expected,
            rows=matched,
            maps=predictions.maps,
            protocols=protocols,
            stage=stage,
        )
        # NumPy leaves the lock of Python while it works, so that threads use every core; results come in order.
        with ThreadPoolExecutor(_cores()) as pool:
            for part, counts in zip(parts, pool.map(counted, parts), strict=True):
                for tally, some in zip(tallies, counts, strict=True):
                    tally.counts += some
                for group in part:
                    report(done := done + len(group), total)
        asked = _asked(expected, matched)
        for protocol, tally in zip(protocols, tallies, strict=True):
            marks = tuple(_marks(protocol, stage, predictions.maps, asked))
            found += tally.scores(protocol, split, marks)
    ours = {(one.kind, one.dataset, one.split): one.value for one in found if one.protocol == RIS_BENCH.name}
    return [
        one
        if (known := ours.get((one.kind, one.dataset, one.split))) is None or one.protocol == RIS_BENCH.name
        else replace(one, difference=one.value - known)
        for one in found
    ]


def chosen(referent: Sequence[Sample], protocol: Protocol, stage: Stage) -> list[int]:
    """Positions of the sentences of a referent, given in order, that are scored.

    The random one depends on the referent alone, where the repositories draw another in every epoch.
    """
    sentences = getattr(protocol, stage).sentences
    if sentences == "all":
        return list(range(len(referent)))
    if sentences == "random":
        return [draw("sentence", *referent[0].referent) % len(referent)]
    return [0 if sentences == "first" else len(referent) - 1]


_AT_A_TIME = 16
"""Referents that a thread is given: to hand out one would take as long as to score a small one."""


def _counted(
    groups: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    rows: Sequence[Prediction],
    maps: Maps | None,
    protocols: Sequence[Protocol],
    stage: Stage,
) -> list[list[_Counts]]:
    """For each protocol the counts of the expressions of some referents, of which the positions are given."""
    counts: list[list[_Counts]] = [[] for _ in protocols]
    for group in groups:
        referent = _Referent([samples[i] for i in group], [rows[i] for i in group], maps)
        for found, protocol in zip(counts, protocols, strict=True):
            found += referent.count(protocol, stage)
    return counts


class _Counts(NamedTuple):
    """Of one expression."""

    intersection: int
    union: int
    denied: bool
    targeted: bool


class _Tally:
    """The counts of a protocol over the expressions of a split."""

    def __init__(self) -> None:
        self.counts: list[_Counts] = []

    def scores(self, protocol: Protocol, split: Split, marks: tuple[str, ...]) -> Iterator[Score]:
        intersection, union, denied, targeted = map(np.array, zip(*self.counts, strict=True))
        found = metrics.scores(intersection, union, protocol, denied=denied, targeted=targeted)

        def one(metric: str, kind: str, value: float, number: int, *more: str) -> Score:
            return Score(
                protocol=protocol.name,
                metric=metric,
                kind=kind,
                dataset=split[0],
                split=split[1],
                value=value,
                difference=None,
                num_expressions=number,
                marks=(*marks, *more),
            )

        number = found.num_expressions
        for metric, kind, value in ((protocol.overall, "overall", found.oiou), (protocol.mean, "mean", found.miou)):
            yield one(metric, kind, value, number, *(() if metric in protocol.prints else ("unprinted",)))
        judged = int(targeted.sum()) if protocol.no_target else number
        for k, value in found.precision_at.items():
            yield one(f"Pr@{k}", f"Pr@{k}", value, judged)
        if protocol.no_target and not targeted.all():
            yield one("N-acc", "N-acc", float(denied[~targeted].mean()), number - judged)
            if judged:
                yield one("T-acc", "T-acc", float(1 - denied[targeted].mean()), judged)


class _Referent:
    """The expressions of one referent with their predictions; masks and maps are made once in each form asked for."""

    def __init__(self, samples: list[Sample], rows: list[Prediction], maps: Maps | None) -> None:
        self.samples, self.rows, self.maps = samples, rows, maps
        self.sample = samples[0]
        self.image = (self.sample.height, self.sample.width)
        self._made: dict[tuple, _Mask] = {}
        self._values: dict[tuple[int, str], np.ndarray] = {}
        self._both: dict[tuple[int, int], int] = {}  # by the identity of masks, which `_made` keeps

    def count(self, protocol: Protocol, stage: Stage) -> Iterator[_Counts]:
        inside = getattr(protocol, stage).frame == "input"
        square = (protocol.size, protocol.truth_resize) if inside else (None, None)
        truth = self._once(self._truth, protocol.truth, *square)
        for i in chosen(self.samples, protocol, stage):
            if self.maps is None:
                # Where the ground truth is drawn anew from its polygons, a mask can but be resampled.
                predicted = self._once(self._given, i, *(square if square[1] != "polygons" else (square[0], "pillow")))
                empty = not self._once(self._given, i, None, None).area
            else:
                frame = (protocol.size, protocol.size) if inside else self.image
                predicted = self._once(self._cut, i, frame, protocol.upsample, protocol.restore, protocol.threshold)
                empty = not predicted.area
            pair = (id(predicted.mask_WH), id(truth.mask_WH))
            if pair not in self._both:
                self._both[pair] = int(np.count_nonzero(predicted.mask_WH & truth.mask_WH))
            both = self._both[pair]
            denied = empty if self.rows[i].no_target is None else self.rows[i].no_target
            targeted = self._once(self._truth, "union", None, None).area > 0
            yield _Counts(both, predicted.area + truth.area - both, denied, targeted)

    def _once(self, make: Callable[..., np.ndarray], *arguments: Any) -> _Mask:
        key = (make.__name__, *arguments)
        if key not in self._made:
            mask_WH = make(*arguments)
            self._made[key] = _Mask(mask_WH, int(np.count_nonzero(mask_WH)))
        return self._made[key]

    def _truth(self, rule: str, size: int | None, resize: str | None) -> np.ndarray:
        """The ground truth by columns, in the image or in a square of `size`."""
        if resize == "polygons":
            return self._scaled(size)
        if size is not None:
            return nearest(self._once(self._truth, rule, None, None).mask_WH, size, resize)
        if rule == "union":
            return self.sample.mask().T.view(bool)
        union, segmentation = self._once(self._truth, "union", None, None), self.sample.segmentation
        parts = (
            [] if isinstance(segmentation, Mapping) else [replace(self.sample, segmentation=[p]) for p in segmentation]
        )
        # To rasterise is cheap and to decode is not, and most polygons of a referent lie apart.
        if sum(int(coco_mask.area(part.rle())) for part in parts) <= union.area:
            return union.mask_WH
        return sum(part.mask().T for part in parts) == 1

    def _scaled(self, size: int) -> np.ndarray:
        """The union of the polygons, scaled to a square and drawn there; run lengths can only be resampled."""
        segmentation = self.sample.segmentation
        scale = (size / self.sample.width, size / self.sample.height)
        parts: list[Any] = []
        for part in [segmentation] if isinstance(segmentation, Mapping) else segmentation:
            if isinstance(part, Mapping):
                mask_WH = replace(self.sample, segmentation=part).mask().T
                parts.append({"size": [size, size], "counts": encode(nearest(mask_WH, size, "pillow").T)})
            else:
                parts.append([coordinate * scale[i % 2] for i, coordinate in enumerate(part)])
        return replace(self.sample, segmentation=parts, height=size, width=size).mask().T.view(bool)

    def _given(self, i: int, size: int | None, resize: str | None) -> np.ndarray:
        """The mask that was predicted, by columns."""
        if size is not None:
            return nearest(self._once(self._given, i, None, None).mask_WH, size, resize)
        row = self.rows[i]
        try:
            return decode(row.counts, row.height, row.width)
        except ValueError as error:
            raise UserError(f"the mask of {row.name} {error}; encode it with pycocotools") from None

    def _cut(self, i: int, frame: tuple[int, int], upsample: Resize, restore: Resize, threshold: float) -> np.ndarray:
        if (i, upsample.of) not in self._values:
            self._values[i, upsample.of] = converted(self.rows[i].map, self.maps.values, upsample.of)
        maps = replace(self.maps, values=upsample.of)
        return cut(self._values[i, upsample.of], maps, self.image, frame, upsample, restore, threshold)


def _cores() -> int:
    """That this process may use, up to 8, beyond which memory is too slow for more."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


class _Mask(NamedTuple):
    mask_WH: np.ndarray
    """bool, by columns, as run lengths go."""
    area: int


def _asked(samples: Sequence[Sample], rows: Sequence[Prediction]) -> set[str] | None:
    """The forms of a sentence of which the model was asked every one; None where a row does not say."""
    if any(row.expression is None for row in rows):
        return None
    pairs = [(sample, row.expression.strip()) for sample, row in zip(samples, rows, strict=True)]
    forms = {"sent": lambda sample: sample.expression, "raw": lambda sample: sample.raw.strip()}
    return {form for form, of in forms.items() if all(of(sample) == asked for sample, asked in pairs)}


def _marks(protocol: Protocol, stage: Stage, maps: Maps | None, asked: set[str] | None) -> Iterator[str]:
    inside = getattr(protocol, stage).frame == "input"
    if maps is None and inside:
        yield "resampled"
    if maps is not None and (maps.geometry != protocol.geometry or (inside and maps.size != protocol.size)):
        yield "geometry"
    if asked is not None and protocol.text not in asked:
        yield "text"


_SIGNS = {"resampled": "†", "geometry": "‡", "text": "§", "unprinted": "°"}


def markdown(scores: Sequence[Score], stage: Stage, *, masks: bool) -> str:
    """A table with a row for each metric of each protocol, and what they mean; `masks` says that masks were scored."""
    splits = list(dict.fromkeys((one.dataset, one.split) for one in scores))
    by_row: dict[tuple[str, str], dict[Split, Score]] = {}
    for one in scores:
        by_row.setdefault((one.protocol, one.metric), {})[one.dataset, one.split] = one
    lines, used = [], set()
    for (protocol, metric), cells in by_row.items():
        line = [protocol, metric]
        for split in splits:
            if (one := cells.get(split)) is None:
                line += ["", "", ""]
                continue
            used |= set(one.marks)
            # A difference that rounds to nothing is still one.
            difference = "" if one.difference is None else f"{100 * one.difference:+.3f}" if one.difference else "0"
            signs = "".join(_SIGNS[mark] for mark in one.marks)
            line += [f"{100 * one.value:.2f}{signs and ' ' + signs}", difference, f"{one.num_expressions:,}"]
        lines.append(line)
    headers = ["Protocol", "Metric"]
    for dataset, split in splits:
        headers += [f"{dataset} {split}", f"− {RIS_BENCH.name}", "of"]
    table = tabulate(
        lines,
        headers=headers,
        tablefmt="pipe",
        colalign=("left", "left", *["right"] * 3 * len(splits)),
        disable_numparse=True,
    )
    notes = [
        "oIoU, cIoU, ciou: sum of intersections / sum of unions; mIoU, gIoU, giou: mean of intersection / union. In "
        "percent; N-acc, T-acc: how often the absence and the presence of a target are told.",
        f"− {RIS_BENCH.name}: the difference to {RIS_BENCH.name} on the same predictions, in points; of: expressions.",
    ]
    if masks:
        notes.append("Masks are scored as they are: no protocol's interpolation or threshold acts on them.")
    if stage == "validation":
        notes.append("As checkpoints are selected during training, not as results are reported.")
    notes += [f"{_SIGNS[mark]} {text}." for mark, text in MARKS.items() if mark in used]
    notes += [f"{name}: {PROTOCOLS[name].describe(stage)}." for name in dict.fromkeys(name for name, _ in by_row)]
    return f"{table}\n\n" + "".join(f"- {note}\n" for note in notes)


def record(scores: Sequence[Score], stage: Stage) -> dict[str, Any]:
    """The scores as JSON takes them."""
    return {"stage": stage, "scores": [asdict(one) for one in scores]}
