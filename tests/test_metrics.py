"""The metrics against numbers worked out by hand."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from ris_bench.metrics import iou, scores
from ris_bench.protocols import RIS_BENCH


def test_by_hand():
    # IoUs 9/10, 1/2, 0/40 and, both masks empty, 0.
    found = scores(np.array([9, 5, 0, 0]), np.array([10, 10, 40, 0]), RIS_BENCH)
    assert found.oiou == 14 / 60
    assert found.miou == pytest.approx(1.4 / 4, abs=1e-15)
    assert found.precision_at == {"0.5": 0.25, "0.6": 0.25, "0.7": 0.25, "0.8": 0.25, "0.9": 0.0}
    assert found.num_expressions == 4


@pytest.mark.parametrize("k", RIS_BENCH.precision_at)
@pytest.mark.parametrize("multiple", [1, 3, 7, 30_720])
def test_precision_is_exact_at_k(k, multiple):
    exact = Fraction(str(k))
    counts = np.array([exact.numerator * multiple]), np.array([exact.denominator * multiple])
    assert scores(*counts, RIS_BENCH).precision_at[str(k)] == 0
    assert scores(*counts, replace(RIS_BENCH, strict=False)).precision_at[str(k)] == 1
    above = counts[0] * 10**6 + 1, counts[1] * 10**6
    assert scores(*above, RIS_BENCH).precision_at[str(k)] == 1


def test_what_an_empty_union_is_worth_is_up_to_the_protocol():
    generous = replace(RIS_BENCH, empty_iou=1.0)
    assert iou(np.array([0, 1]), np.array([0, 2]), generous).tolist() == [1, 0.5]
    assert scores(np.array([0, 1]), np.array([0, 2]), generous).oiou == 0.5
    assert scores(np.array([0]), np.array([0]), generous).oiou == 1
    assert scores(np.array([0]), np.array([0]), RIS_BENCH).oiou == 0


def test_sums_beyond_the_integers_of_float32_and_int32():
    # In float32 the ones would vanish beside 2^30, and in int32 the sum would be negative.
    intersection = np.array([2**30, 1, 1, 2**30], dtype=np.int32)
    union = np.full(4, 2**30 + 1, dtype=np.int32)
    assert scores(intersection, union, RIS_BENCH).oiou == (2**31 + 2) / (2**32 + 4)


def test_the_order_of_the_expressions_does_not_matter():
    random = np.random.default_rng(0)
    union = random.integers(1, 300_000, 5_000)
    intersection = random.integers(0, union + 1)
    order = random.permutation(len(union))
    assert scores(intersection, union, RIS_BENCH) == scores(intersection[order], union[order], RIS_BENCH)


@pytest.mark.parametrize(
    "intersection, union",
    [([], []), ([3], [2]), ([-1], [2]), ([1], [2, 2]), ([0.5], [1.0]), ([[1]], [[2]])],
    ids=["none", "too many", "negative", "unequal", "fractions", "a table"],
)
def test_impossible_counts_are_refused(intersection, union):
    with pytest.raises(ValueError):
        scores(np.array(intersection), np.array(union), RIS_BENCH)


def test_no_expressions_are_refused():
    with pytest.raises(ValueError, match="no expressions"):
        scores(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), RIS_BENCH)
