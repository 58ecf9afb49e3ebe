"""Which differences between methods would outlive other images and other seeds.

In the shapes I is images, M metrics, R resamples; ... is any further axes, such as trials and metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ris_bench.errors import UserError
from ris_bench.metrics import iou
from ris_bench.protocols import RIS_BENCH

SAMPLE = ("dataset", "image_id", "ref_id", "sentence_index")
"""Columns that name an expression, and its image first."""
COLUMNS = (*SAMPLE, "expression", "target", "intersection", "union")
"""Of expressions.parquet: what is needed here."""

CONFIDENCE = 0.95

_WEIGHTS = 1 << 21
"""At a time: they and what they are made of take some 64 MiB."""


class Difference(NamedTuple):
    """Of two metrics on the same images; all but p in the unit of the metric."""

    value: float
    low: float
    high: float
    p: float


class Sums(NamedTuple):
    """What the metrics of one trial on one split are ratios of, summed over the expressions of each image; float64."""

    numerator_IM: np.ndarray
    denominator_IM: np.ndarray
    expressions: int


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The expressions of one split in one order, image by image. ValueError where one is there twice."""
    if frame.duplicated(list(SAMPLE)).any():
        raise ValueError("an expression is there twice")
    return frame.sort_values(list(SAMPLE), ignore_index=True)


def check_same(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> None:
    """UserError, naming what differs, unless two `ordered` tables have the same expressions with the same targets."""
    keys = [pd.MultiIndex.from_frame(frame[list(SAMPLE)]) for frame in (first, second)]
    what = ""
    if not keys[0].equals(keys[1]):
        only = zip(names, (keys[0].difference(keys[1]), keys[1].difference(keys[0])), strict=True)
        what = " and ".join(f"{len(key)} only in {name}, as {_named(key[0])}" for name, key in only if len(key))
    else:
        for column, meaning in (("expression", "text"), ("target", "number of ground-truth pixels")):
            ours, theirs = first[column].tolist(), second[column].tolist()
            if differ := [row for row, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]:
                row = differ[0]
                pair = f"{ours[row]!r} and {theirs[row]!r} of {_named(keys[0][row])}"
                what = f"the {meaning} of {len(differ)} differs, as {pair}"
    if what:
        raise UserError(
            f"{names[0]} and {names[1]} were not evaluated on the same expressions: {what}; compare results that "
            "come from the same files"
        )


def _named(key: tuple) -> str:
    return ", ".join(f"{column} {value}" for column, value in zip(SAMPLE, key, strict=True))


def sums(frame: pd.DataFrame, metrics: Sequence[str]) -> Sums:
    """Of expressions that are `ordered`, for keys of layout.METRICS.

    mIoU is the sum of the IoUs over the number of expressions, oIoU that of the intersections over that of the unions,
    Pr@K that of the hits over the number of expressions.
    """
    intersection_N, union_N = frame["intersection"].to_numpy(), frame["union"].to_numpy()
    iou_N, one_N = iou(intersection_N, union_N, RIS_BENCH), np.ones(len(frame))
    parts = {
        "oiou": (intersection_N, union_N),
        "miou": (iou_N, one_N),
        **{f"pr@{k}": (iou_N > k, one_N) for k in RIS_BENCH.precision_at},
    }
    image = frame[["dataset", "image_id"]]
    starts = np.flatnonzero((image != image.shift()).any(axis=1))

    def by_image(part: int) -> np.ndarray:
        part_NM = np.stack([parts[metric][part] for metric in metrics], axis=1)
        return np.add.reduceat(part_NM.astype(np.float64), starts)

    return Sums(by_image(0), by_image(1), len(frame))


def ratios(weights_RI: np.ndarray, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Metrics (R, ...) of sums (I, ...) where each image counts so often; 0, as RIS_BENCH has it, of empty unions."""
    numerator, denominator = (np.tensordot(weights_RI, part, axes=1) for part in (numerator, denominator))
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Metrics (R, ...) of sums (I, ...) on resamples: as many images as there are, drawn with replacement.

    An image comes with all its expressions, because these are not independent: they share pixels, and often a referent.
    All that is given sees the same draws, so that differences are paired.
    """
    generator = np.random.default_rng(seed)
    images = len(numerator)
    at_a_time = max(1, _WEIGHTS // images)
    values = np.empty((resamples, *numerator.shape[1:]))
    for start in range(0, resamples, at_a_time):
        rows = min(at_a_time, resamples - start)
        drawn_RI = generator.integers(images, size=(rows, images))
        drawn_RI += images * np.arange(rows)[:, None]
        weights_RI = np.bincount(drawn_RI.ravel(), minlength=rows * images).reshape(rows, images)
        values[start : start + rows] = ratios(weights_RI.astype(np.float64), numerator, denominator)
    return values


def difference(value: float, resampled_R: np.ndarray) -> Difference:
    """A difference with its percentile interval and two-sided p-value, from its values on the resamples.

    Percentiles, not BCa (Efron, JASA 1987): a difference of such ratios has little bias to correct, and BCa estimates
    its skewness from the few largest objects. In simulations of 150 images 95% intervals of oIoU covered 94.4% and
    92.4%, of mIoU 94.8% and 94.7%; and BCa is undefined where no resample differs. The p-value is that of the same
    interval: below 0.05 where it leaves out 0. It counts the data as one more resample (Davison and Hinkley, "Bootstrap
    Methods and their Application", 1997, section 4.2), so it is never 0.
    """
    resampled_R = np.round(resampled_R, 12)  # a tie must not be decided by the last bit of a mean over seeds
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_R, [tail, 1 - tail], method="weibull")
    rarer = min(np.count_nonzero(resampled_R <= 0), np.count_nonzero(resampled_R >= 0))
    return Difference(value, float(low), float(high), min(1.0, 2 * (rarer + 1) / (len(resampled_R) + 1)))


def smallest_p(resamples: int) -> float:
    """Of `difference`."""
    return 2 / (resamples + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of as many tests, corrected so that any false rejection at all has the probability that is claimed.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979; it asks
    nothing of how the tests depend on each other.
    """
    ascending = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[ascending] = np.minimum(1, np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p)[ascending]))
    return corrected.tolist()


def seed_noise(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The difference of two means over seeds that other seeds alone could produce between equal methods.

    In 95% of such repetitions it is smaller. It is the half-width of the interval of Welch (Biometrika 1947): standard
    deviations between the seeds of each method, of which three seeds tell little, so that it is wide. None where a
    method has a single seed: then nothing is known of it.
    """
    if min(len(first), len(second)) < 2:
        return None
    errors = [np.var(scores, ddof=1) / len(scores) for scores in (first, second)]
    if not sum(errors):
        return 0.0
    each = sum(error**2 / (len(scores) - 1) for error, scores in zip(errors, (first, second), strict=True))
    return float(student(sum(errors) ** 2 / each) * math.sqrt(sum(errors)))


def student(freedom: float) -> float:
    """What |t| of Student's distribution is below with the probability CONFIDENCE; freedom is at least 1.

    With t = sqrt(freedom) tan(angle) the density becomes cos(angle) ** (freedom - 1), which is summed numerically.
    """
    edges, width = np.linspace(0, np.pi / 2, 100_001, retstep=True)
    below = np.cumsum(np.cos(edges[:-1] + width / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(CONFIDENCE * below[-1], below, edges[1:]))
