"""oIoU, mIoU and Pr@K from the integer counts of every expression; ratios are taken once, at the end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ris_bench.protocols import Protocol
from ris_bench.records import Scores


def iou(intersection: np.ndarray, union: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Intersection over union of every expression, float64 in [0, 1].

    Args:
        intersection, union: pixels, integers of shape (N,).
        protocol: says what an empty union is worth.

    Raises ValueError where the counts cannot be those of two masks.
    """
    intersection, union = np.asarray(intersection), np.asarray(union)
    for counts in (intersection, union):
        if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"counts are integers of shape (N,), not {counts.dtype} of shape {counts.shape}")
    if intersection.shape != union.shape or (intersection < 0).any() or (intersection > union).any():
        raise ValueError("there must be as many intersections as unions, each at least 0 and at most its union")
    # One division of exact integers: 7 / 10 is the float nearest to 0.7, as the literal is, so Pr@K is exact at K.
    return np.where(union > 0, intersection / np.maximum(union, 1), protocol.empty_iou)


def scores(
    intersection: np.ndarray,
    union: np.ndarray,
    protocol: Protocol,
    *,
    denied: np.ndarray | None = None,
    targeted: np.ndarray | None = None,
) -> Scores:
    """The metrics of one split; arguments as for `iou`, and ValueError also where there is no expression.

    A protocol with `no_target` needs to know where the model `denied` that there is a target, and which expressions
    are `targeted`, both bool of shape (N,); its Pr@K is of the latter, and 0 where there is none.
    """
    if protocol.no_target:
        # ReLA gres_model/evaluation/refer_evaluation.py:129-168: a label beside the mask decides, right or wrong.
        right = denied & ~targeted
        intersection, union = np.where(denied, 0, intersection), np.where(right, 0, union)
        ious = np.where(right, protocol.empty_iou, iou(intersection, union, replace(protocol, empty_iou=0.0)))
        judged = ious[targeted]
    else:
        judged = ious = iou(intersection, union, protocol)
    if not ious.size:
        raise ValueError("there are no scores of no expressions")
    total_union = int(np.sum(union, dtype=np.int64))
    hit = np.greater if protocol.strict else np.greater_equal
    return Scores(
        # Where every union is empty, the overall one is an empty union too.
        oiou=int(np.sum(intersection, dtype=np.int64)) / total_union if total_union else protocol.empty_iou,
        miou=math.fsum(ious) / ious.size,  # correctly rounded, so the order of the expressions does not matter
        precision_at={str(k): float(hit(judged, k).mean()) if judged.size else 0.0 for k in protocol.precision_at},
        num_expressions=ious.size,
    )
