"""Evaluation protocols as data: what turns pairs of masks into the numbers of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules on which published evaluations differ, once masks are compared."""

    name: str
    precision_at: tuple[float, ...]
    """The K of Pr@K."""
    strict: bool
    """Pr@K counts an IoU greater than K; otherwise also one that equals K."""
    empty_iou: float
    """IoU of an expression for which both the prediction and the ground truth are empty."""


RIS_BENCH = Protocol(name="ris-bench", precision_at=(0.5, 0.6, 0.7, 0.8, 0.9), strict=True, empty_iou=0.0)
"""Every expression of the split counts once, and masks are compared in the frame of the original image.

The ground truth is the union of the polygons of the referent. The model's logits are interpolated bilinearly
(align_corners=False) to its input size, the content of the letterbox is cropped, and that is interpolated in the same
way to the original image; a pixel is predicted where the logit exceeds the logit of the threshold, thus where the
probability exceeds the threshold. Logits are interpolated, not probabilities, which gives slightly other borders.
The IoU of an empty union is 0, as in CRIS, which divides by U + 1e-6; Pr@K is the share of IoUs greater than K.
"""
