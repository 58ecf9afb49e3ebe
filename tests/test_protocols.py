"""Each protocol against cases worked out by hand from the lines of code that it stands for.

Masks are rectangles in whole pixels, (x0, y0, x1, y1), which as polygons fill exactly their area. Citations are of the
commits named in ris_bench/protocols.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ris_bench import protocols, resampling, scoring
from ris_bench.data.samples import NO_TARGET, Sample
from ris_bench.errors import UserError
from ris_bench.predictions import Maps, Prediction, Predictions
from ris_bench.protocols import PROTOCOLS, RIS_BENCH, Protocol
from ris_bench.transforms import Letterbox, restore

Box = tuple[float, float, float, float]


class Asked(NamedTuple):
    """One expression: the polygons of its ground truth, and what is predicted."""

    truth: list[Box]
    predicted: list[Box]
    no_target: bool | None = None


def polygon(box: Box) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def filled(boxes: list[Box], height: int, width: int) -> np.ndarray:
    mask_HW = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask_HW[y0:y1, x0:x1] = True
    return mask_HW


def sample(truth: list[Box], height: int, width: int, ref_id: int = 0, sentence_index: int = 0) -> Sample:
    return Sample(
        dataset="boxes",
        split="val",
        ref_id=ref_id,
        sent_id=0,
        sentence_index=sentence_index,
        image_id=0,
        ann_id=0 if truth else NO_TARGET,
        category="box",
        expression="box",
        raw="box",
        image_path=Path("x"),
        height=height,
        width=width,
        segmentation=[polygon(box) for box in truth],
    )


def scored(
    protocol: Protocol | str, size: tuple[int, int], *referents: list[Asked] | Asked, stage: str = "test"
) -> dict[str, float]:
    """Metric -> value, of masks in images of (height, width)."""
    samples, rows = [], []
    for ref_id, sentences in enumerate(referents):
        for i, one in enumerate([sentences] if isinstance(sentences, Asked) else sentences):
            samples.append(sample(one.truth, *size, ref_id, i))
            rows.append(Prediction.of(samples[-1], mask_HW=filled(one.predicted, *size), no_target=one.no_target))
    return values(protocol, Predictions(rows, None, {}), samples, stage)


def mapped(protocol: str, map_hw: np.ndarray, maps: Maps, truth: list[Box], size: tuple[int, int]) -> dict[str, float]:
    one = sample(truth, *size)
    row = replace(Prediction.of(one, map_hw=map_hw), map=np.asarray(map_hw, np.float32))
    return values(protocol, Predictions([row], maps, {}), [one], "test")


def values(protocol: Protocol | str, given: Predictions, samples: list[Sample], stage: str) -> dict[str, float]:
    protocol = PROTOCOLS[protocol] if isinstance(protocol, str) else protocol
    found = scoring.score(given, {("boxes", "val"): samples}, [protocol], stage)
    return {one.metric: one.value for one in found if one.protocol == protocol.name}


def near(**expected: float) -> object:
    return pytest.approx({key.replace("_", "."): value for key, value in expected.items()}, abs=1e-12)


def only(found: dict[str, float], *names: str) -> dict[str, float]:
    return {name: found[name] for name in names}


HALF = Asked([(0, 0, 10, 10)], [(0, 0, 5, 10)])  # I = 50, U = 100: IoU 1/2, exactly K
NINE = Asked([(0, 0, 10, 10)], [(0, 0, 10, 9)])  # I = 90, U = 100
NOTHING = Asked([], [])  # U = 0
MISSED = Asked([(0, 0, 10, 10)], [])  # I = 0, U = 100
OVERLAP = Asked([(0, 0, 10, 10), (5, 0, 15, 10)], [(0, 0, 15, 10)])
"""Two polygons of 100 pixels share 50. The union has 150, all predicted; without what they share there are 100."""

SMALL = (20, 20)


# ris-bench: README, "Why"; ris_bench/protocols.py.


def test_ris_bench_by_hand():
    found = scored("ris-bench", SMALL, HALF, NINE, NOTHING)
    # oIoU (50 + 90 + 0) / (100 + 100 + 0); mIoU (1/2 + 9/10 + 0) / 3; Pr@0.5: of 1/2, 9/10, 0 one is greater than 1/2.
    assert only(found, "oIoU", "mIoU") == near(oIoU=140 / 200, mIoU=1.4 / 3)
    assert [found[f"Pr@0.{k}"] for k in (5, 6, 7, 8, 9)] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 0])


def test_ris_bench_unites_polygons_and_counts_every_sentence():
    assert scored("ris-bench", SMALL, OVERLAP)["mIoU"] == 1  # 150 / 150
    # Over expressions (1/2 + 9/10 + 0) / 3, not over referents ((1/2 + 9/10) / 2 + 0) / 2; and in validation too.
    for stage in ("test", "validation"):
        assert scored("ris-bench", SMALL, [HALF, NINE], MISSED, stage=stage)["mIoU"] == pytest.approx(1.4 / 3)


def test_ris_bench_cuts_logits_at_the_threshold():
    """Logits -12, 1 over 2 columns of an image of 4 x 4: bilinear at the centres -12, -8.75, -2.25, 1.

    The logit of 0.35 is -0.619, so that one column is predicted, of two that are true: I = 4, U = 8. Probabilities
    would be 0.000, 0.183, 0.548, 0.731: both columns.
    """
    maps = Maps(values="logit", geometry="letterbox", size=4)
    map_hw = np.array([[-12.0, 1.0], [-12.0, 1.0]])
    assert mapped("ris-bench", map_hw, maps, [(2, 0, 4, 4)], (4, 4))["mIoU"] == 4 / 8


# CRIS engine/engine.py:100-127 (val), 166-206 (test); utils/dataset.py:171.


def test_cris_by_hand():
    found = scored("cris", SMALL, HALF, NINE, NOTHING)
    # :117 I / (U + 1e-6) gives an empty union 0; :124 counts what is greater than K, so 1/2 is no hit at 0.5.
    assert only(found, "mIoU", "Pr@0.5", "Pr@0.8", "Pr@0.9") == near(
        **{"mIoU": 1.4 / 3, "Pr@0_5": 1 / 3, "Pr@0_8": 1 / 3, "Pr@0_9": 0}
    )


def test_cris_takes_any_value_but_zero_for_ground_truth():
    # The PNG holds 255, and 254 where two polygons lie; logical_or with both is the union: 150 / 150.
    assert scored("cris", SMALL, OVERLAP)["mIoU"] == 1


def test_cris_validates_the_first_sentence():
    # utils/dataset.py:171 sents[0]: (1/2 + 0) / 2; the test loops over all: (1/2 + 9/10 + 0) / 3.
    assert scored("cris", SMALL, [HALF, NINE], MISSED, stage="validation")["mIoU"] == 1 / 4
    assert scored("cris", SMALL, [HALF, NINE], MISSED)["mIoU"] == pytest.approx(1.4 / 3)


@pytest.mark.parametrize("probability, iou", [(0.36, 50 / 400), (0.34, 0)])
def test_cris_cuts_at_035(probability, iou):
    # An even map stays even, so 20 x 20 pixels are predicted or none; the truth has 50 of them.
    maps = Maps(values="probability", geometry="letterbox-exact", size=20)
    found = mapped("cris", np.full((5, 5), probability), maps, [(0, 0, 5, 10)], SMALL)
    assert found["mIoU"] == iou


def test_cris_warps_as_opencv_does():
    """cv2.warpAffine, OpenCV 4.10, of an 8 x 8 square into its image of 5 x 7, with INTER_CUBIC and a border of 0."""
    square = np.array([[(3 * i * i + 5 * j + i * j) % 17 for j in range(8)] for i in range(8)]) / 17
    expected = [
        [0.26374, 0.57177, 0.73913, 0.33015, 0.89611, 0.38844, 0.66979],
        [0.72305, 0.04165, 0.61347, 0.56749, 0.63299, 0.36289, 0.66289],
        [0.71040, 0.24148, 0.57622, 0.28818, 0.84687, 0.27432, 0.73847],
        [0.61385, 0.22067, 0.66069, 0.53642, 0.58510, 0.50574, 0.52166],
        [0.31858, 0.02132, 0.60759, 0.49914, 0.80516, 0.37102, 0.83070],
    ]
    rows, columns = (
        resampling._restoration(axis, "letterbox-exact", 8, (5, 7), (5, 7), protocols.CRIS.restore) for axis in (0, 1)
    )
    np.testing.assert_allclose(columns(rows(square).T).T, expected, atol=6e-6)


def cris_the_long_way(logit_hw: torch.Tensor, height: int, width: int, size: int) -> np.ndarray:
    """CRIS engine/engine.py:90-110 without OpenCV: every pixel is the sum of sixteen around its place in the square."""
    probability = F.interpolate(logit_hw.sigmoid()[None, None], (size, size), mode="bicubic", align_corners=True)[0, 0]
    square = np.pad(probability.numpy(), 4)  # beyond the square are zeros
    scale = min(size / height, size / width)
    y = (np.arange(height) * scale + (size - height * scale) / 2)[:, None]
    x = (np.arange(width) * scale + (size - width * scale) / 2)[None, :]

    def weight(distance: np.ndarray) -> np.ndarray:
        d, a = np.abs(distance), -0.75
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        return np.where(d <= 1, near, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a)

    total = np.zeros((height, width))
    for down in (-1, 0, 1, 2):
        for right in (-1, 0, 1, 2):
            row, column = np.floor(y).astype(int) + down, np.floor(x).astype(int) + right
            total += weight(y - row) * weight(x - column) * square[row + 4, column + 4]
    return total > 0.35


def cris_by_opencv(logit_hw: torch.Tensor, height: int, width: int, size: int) -> np.ndarray:
    """CRIS utils/dataset.py:193-208 (`getTransformMat`) and engine/engine.py:90-110."""
    import cv2

    probability = F.interpolate(logit_hw.sigmoid()[None, None], (size, size), mode="bicubic", align_corners=True)[0, 0]
    scale = min(size / height, size / width)
    down, right = (size - height * scale) / 2, (size - width * scale) / 2
    there = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    back = cv2.getAffineTransform(there * np.float32(scale) + np.array([right, down], np.float32), there)
    return cv2.warpAffine(probability.numpy(), back, (width, height), flags=cv2.INTER_CUBIC, borderValue=0.0) > 0.35


@pytest.mark.parametrize("pipeline", [cris_the_long_way, cris_by_opencv])
def test_cris_agrees_with_its_pipeline_on_smooth_logits(pipeline):
    maps = Maps(values="logit", geometry="letterbox-exact", size=416)
    differences = []
    sizes = [(480, 640), (640, 427), (333, 500), (612, 612), (640, 359), (375, 500)]
    for seed, (height, width) in enumerate(sizes * 2):
        generator = torch.Generator().manual_seed(seed)
        coarse = 4 * torch.randn(1, 1, 6, 6, generator=generator)
        logit_hw = F.interpolate(coarse, (104, 104), mode="bicubic", align_corners=True)[0, 0]
        box = (width // 5, height // 4, 4 * width // 5, 3 * height // 4)
        expected_HW, truth_HW = pipeline(logit_hw, height, width, 416), filled([box], height, width)
        expected = np.sum(expected_HW & truth_HW) / np.sum(expected_HW | truth_HW)
        found = mapped("cris", logit_hw.numpy(), maps, [box], (height, width))["mIoU"]
        differences.append(abs(found - expected))
        assert 0.05 < expected < 0.95
    assert max(differences) <= 2e-3 and np.mean(differences) <= 2e-4


# LAVT test.py:62-74, 83-88; transforms.py:36-39; train.py:38-48.


def test_lavt_by_hand():
    found = scored("lavt", SMALL, HALF, NINE, NOTHING)
    # Every pixel of 20 x 20 becomes 24 x 24 of 480 x 480, so ratios stay. :63 U == 0 gives 0; :70 counts IoU >= K.
    assert only(found, "oIoU", "mIoU", "Pr@0.5", "Pr@0.9") == near(
        **{"oIoU": 140 / 200, "mIoU": 1.4 / 3, "Pr@0_5": 2 / 3, "Pr@0_9": 1 / 3}
    )


def test_lavt_leaves_out_what_two_polygons_share():
    # annot[ref_mask == 1] = 1, and the sum is 2 there: I = 100, U = 150.
    assert scored("lavt", SMALL, OVERLAP)["mIoU"] == pytest.approx(100 / 150)


def test_lavt_compares_at_480_by_the_centres_of_pixels():
    """Of 960 columns Pillow keeps floor(2 (x + 1/2)), the odd ones.

    The truth is columns 100 to 109 and 101 to 110 are predicted. In the image I = 9 and U = 11; of the odd columns
    101, 103, 105, 107, 109 both hold all, so that at 480 the IoU is 1.
    """
    shifted = Asked([(100, 0, 110, 480)], [(101, 0, 111, 480)])
    assert scored("lavt", (480, 960), shifted)["mIoU"] == 1
    assert scored("ris-bench", (480, 960), shifted)["mIoU"] == 9 / 11


def test_lavt_validates_one_sentence_that_depends_on_the_referent_alone():
    found = {scored("lavt", SMALL, [HALF, NINE], MISSED, stage="validation")["mIoU"] for _ in range(3)}
    assert len(found) == 1 and found <= {1 / 4, 9 / 20}
    many = [[NINE, MISSED]] * 60  # about every second referent is asked its first sentence
    assert 0.25 < scored("lavt", SMALL, *many, stage="validation")["mIoU"] < 0.65


def test_lavt_takes_the_greater_of_two_logits():
    # argmax is foreground where the difference of the logits is positive: columns -1, 0, 1 of 3, and 0 is no winner.
    # With align_corners 3 columns over 480 are -1 + 2 x / 479, of which 240 are positive: I = 240, U = 480.
    maps = Maps(values="logit", geometry="stretch", size=480)
    found = mapped("lavt", np.array([[-1.0, 0.0, 1.0]] * 3), maps, [(0, 0, 480, 480)], (480, 480))
    assert found["mIoU"] == 240 / 480


# CGFormer engine/engine.py:112,131,166-195; utils/dataset.py:140,149,164-171.


def test_cgformer_by_hand():
    found = scored("cgformer", SMALL, HALF, NINE, NOTHING)
    # I / (U + 1e-6) gives an empty union 0; Pr@K counts what is greater.
    assert only(found, "oIoU", "mIoU", "Pr@0.5", "Pr@0.9") == near(
        **{"oIoU": 140 / 200, "mIoU": 1.4 / 3, "Pr@0_5": 1 / 3, "Pr@0_9": 0}
    )


def test_cgformer_leaves_out_what_two_polygons_share():
    # The PNG has 254 there, and np.uint8(254 / 255.) is 0: I = 100, U = 150.
    assert scored("cgformer", SMALL, OVERLAP)["mIoU"] == pytest.approx(100 / 150)


def test_cgformer_validates_the_last_sentence_at_its_input():
    # utils/dataset.py:149 sents[-1]: (9/10 + 0) / 2, over 480 x 480; in the test all, in the image.
    assert scored("cgformer", SMALL, [HALF, NINE], MISSED, stage="validation")["mIoU"] == 9 / 20
    shifted = Asked([(100, 0, 110, 480)], [(101, 0, 111, 480)])  # as for LAVT
    assert scored("cgformer", (480, 960), shifted, stage="validation")["mIoU"] == 1
    assert scored("cgformer", (480, 960), shifted)["mIoU"] == 9 / 11


def test_cgformer_interpolates_the_sigmoid_between_corners():
    """A square of 2 x 2 with logits -4, 2 in an image of 7 columns: bicubic with align_corners, column x at t = x / 6.

    p is 0.01799 and 0.88080, and 1/2 needs a weight of the right pixel above 0.5587. Its border is repeated, so that
    the weight is k(1 - t) + k(2 - t), with k(d) = 1.25 d^3 - 2.25 d^2 + 1 up to 1 and -0.75 d^3 + 3.75 d^2 - 6 d + 3
    beyond. Column 3: 0.59375 - 0.09375 = 0.5, no; column 4: 0.79630 - 0.11111 = 0.68519, yes. So 3 of 7 columns; the
    logit -4 + 6 t would be positive in 2.
    """
    maps = Maps(values="logit", geometry="stretch", size=2)
    found = mapped("cgformer", np.array([[-4.0, 2.0]] * 2), maps, [(0, 0, 7, 5)], (5, 7))
    assert found["mIoU"] == 3 / 7


# ReLA gres_model/evaluation/refer_evaluation.py:87, 129-168, 173, 190.


def test_rela_by_hand():
    found = scored(
        "rela",
        SMALL,
        NOTHING,  # rightly denied: IoU 1, nothing is added to the sums
        Asked([], [(0, 0, 10, 10)]),  # wrongly found: IoU 0, and U grows by 100
        MISSED,  # wrongly denied: I = 0, U = 100
        NINE,  # I = 90, U = 100
    )
    # At 480 x 480 all counts are 576 times as large. gIoU (1 + 0 + 0 + 0.9) / 4; cIoU 90 / (100 + 100 + 100).
    assert found == near(
        **{"gIoU": 1.9 / 4, "cIoU": 90 / 300, "Pr@0_7": 1 / 2, "Pr@0_8": 1 / 2, "Pr@0_9": 1 / 2, "N-acc": 1 / 2},
        **{"T-acc": 1 / 2},
    )


def test_rela_without_such_expressions_is_the_usual_mean():
    found = scored("rela", SMALL, HALF, NINE)
    # :87 Pr@.7, .8, .9 with >=, so that 9/10 is a hit at 0.9.
    assert found == near(**{"gIoU": 0.7, "cIoU": 0.7, "Pr@0_7": 1 / 2, "Pr@0_8": 1 / 2, "Pr@0_9": 1 / 2})


def test_rela_believes_the_model_before_its_mask():
    # :129-131, 147-149: its own label decides. A mask of 90 / 100 that is denied has I = 0; an empty one that is not
    # denied has IoU 0 on an expression without target (:137-143).
    found = scored("rela", SMALL, NINE._replace(no_target=True), NOTHING._replace(no_target=False))
    assert only(found, "gIoU", "cIoU", "N-acc", "T-acc") == near(**{"gIoU": 0, "cIoU": 0, "N-acc": 0, "T-acc": 0})
    # And one that is denied rightly adds nothing, whatever its mask (:133-135).
    found = scored("rela", SMALL, NINE, Asked([], [(0, 0, 10, 10)], no_target=True))
    assert only(found, "gIoU", "cIoU") == near(gIoU=1.9 / 2, cIoU=90 / 100)


def test_rela_draws_scaled_polygons():
    """refcoco_mapper.py:107: 10.5 to 20.5 in an image of 240 columns is 21 to 41 at 480.

    Predicted are columns 10 to 20 of the image, at 480 from 20 to 42: of 22 columns 20 are true, over all 480 rows.
    Drawn in the image first, the truth could have an even number of columns there only.
    """
    found = scored("rela", (240, 240), Asked([(10.5, 0, 20.5, 240)], [(10, 0, 21, 240)]))
    assert found["gIoU"] == pytest.approx(20 / 22)
    assert scored("rela", SMALL, OVERLAP)["gIoU"] == 1  # refcoco_mapper.py:41-57: any


# VLT callbacks/eval.py:105-119, 137-152.


def test_vlt_by_hand():
    found = scored("vlt", SMALL, HALF, NINE, NOTHING)
    # :141 (0 + 1e-10) / (0 + 1e-10) is 1. :144 K = 0.5, 0.55, ... 0.95, of which 1 exceeds all and 9/10 seven or eight.
    assert found["mIoU"] == pytest.approx(2.4 / 3)
    assert {key for key in found if key.startswith("Pr")} == {f"Pr@{k / 100}" for k in range(50, 100, 5)}
    assert only(found, "Pr@0.55", "Pr@0.85", "Pr@0.95") == near(
        **{"Pr@0_55": 2 / 3, "Pr@0_85": 2 / 3, "Pr@0_95": 1 / 3}
    )


def test_vlt_unites_polygons():
    assert scored("vlt", SMALL, OVERLAP)["mIoU"] == 1  # :139 gt > 0


def test_vlt_crops_a_letterbox_rounded_down():
    """:106-116: an image of 30 x 50 in a square of 8 has nh = int(4.8) = 4 rows after dy = 2.

    p is 1 in the upper 4 rows of the square, of which rows 2 and 3 are the upper half of the content: bilinear over 30
    rows, at (y + 1/2) 4 / 30 - 1/2, p is 1 up to position 1 and 0 from 2 on, and above 0.35 below 1.65, that is
    y < 15.6: rows 0 to 15. Rounded to 5 rows after dy = 1, position 2 to 3 would do: y < 18.4.
    """
    maps = Maps(values="probability", geometry="letterbox-floor", size=8)
    map_hw = np.repeat([1.0, 0.0], 4)[:, None] * np.ones(8)
    assert mapped("vlt", map_hw, maps, [(0, 0, 50, 16)], (30, 50))["mIoU"] == 1


# PolyFormer utils/eval_utils.py:58-86, evaluate.py:154, data/refcoco_dataset.py:89.


def test_polyformer_by_hand():
    # An image of 16 x 16 is 32 times as large at 512: ratios stay. U == 0 gives 0, and IoU >= K is a hit.
    found = scored("polyformer", (16, 16), HALF, NINE, NOTHING)
    assert only(found, "oIoU", "mIoU", "Pr@0.5", "Pr@0.9") == near(
        **{"oIoU": 140 / 200, "mIoU": 1.4 / 3, "Pr@0_5": 2 / 3, "Pr@0_9": 1 / 3}
    )


def test_polyformer_leaves_out_what_two_polygons_share():
    assert scored("polyformer", (16, 16), OVERLAP)["mIoU"] == pytest.approx(100 / 150)


def test_polyformer_compares_at_512_by_the_corners_of_pixels():
    """Of 1024 columns OpenCV keeps 2 x, the even ones: of 100 to 109 are left 100, ... 108, of 101 to 110 102, ... 110.

    Four are in both and six in either; of Pillow's odd ones the same five would be in both.
    """
    shifted = Asked([(100, 0, 110, 512)], [(101, 0, 111, 512)])
    assert scored("polyformer", (512, 1024), shifted)["mIoU"] == pytest.approx(4 / 6)


# LISA train_ds.py:547-573, utils/dataset.py:368-376.


def test_lisa_by_hand():
    found = scored("lisa", SMALL, HALF, NINE, NOTHING)
    # :563 adds 1 where the union is empty; the sums get nothing of it. There is no Pr@K.
    assert found == near(ciou=140 / 200, giou=2.4 / 3)


def test_lisa_leaves_out_what_two_polygons_share():
    # utils/utils.py, intersectionAndUnionGPU: value 2 falls out of both bins, and what is predicted there is in vain.
    assert scored("lisa", SMALL, OVERLAP)["giou"] == pytest.approx(100 / 150)


def test_lisa_crops_the_padding_below():
    """An image of 2 x 4 in a square of 4 fills its upper two rows; a logit of 0 is no foreground.

    The logits by row are 1, 0, 9, 9: row 0 of the image is predicted, row 1 is not, and the padding has no say.
    """
    maps = Maps(values="logit", geometry="longest-side", size=4)
    map_hw = np.array([1.0, 0.0, 9.0, 9.0])[:, None] * np.ones(4)
    assert mapped("lisa", map_hw, maps, [(0, 0, 4, 1)], (2, 4))["giou"] == 1


# All of them.


@pytest.mark.parametrize("geometry", protocols.GEOMETRIES)
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("size", [(100, 160), (160, 100)])
def test_a_map_of_any_geometry_lies_where_its_image_does(geometry, protocol, size):
    """A rectangle painted where each geometry puts it is found again, but for the border of a coarse map."""
    height, width = size
    scale = 64 / max(size)
    y, x = np.arange(64)[:, None], np.arange(64)[None, :]
    top, left = ((64 - height * scale) / 2, (64 - width * scale) / 2) if "letterbox" in geometry else (0, 0)
    down, across = (64 / height, 64 / width) if geometry == "stretch" else (scale, scale)
    inside = (abs(y + 0.5 - top - 0.5 * height * down) < 0.3 * height * down) & (
        abs(x + 0.5 - left - 0.5 * width * across) < 0.3 * width * across
    )
    maps = Maps(values="logit", geometry=geometry, size=64)
    box = (width // 5, height // 5, 4 * width // 5, 4 * height // 5)
    found = mapped(protocol.name, np.where(inside, 3.0, -3.0), maps, [box], size)
    assert found[protocol.mean] > 0.93


@pytest.mark.parametrize("height, width", [(480, 640), (333, 500), (500, 17), (40, 40), (1, 9)])
@pytest.mark.parametrize("stride", [4, 8])
def test_ris_bench_restores_maps_as_the_evaluation_does(height, width, stride):
    logit_hw = 3 * torch.randn(96 // stride, 96 // stride, generator=torch.Generator().manual_seed(0))
    expected_HW = restore(logit_hw[None], Letterbox(96).frame(height, width))[0] > math.log(0.35 / 0.65)
    frame, maps = (height, width), Maps(values="logit", geometry="letterbox", size=96)
    found_WH = resampling.cut(
        logit_hw.numpy(), maps, frame, frame, RIS_BENCH.upsample, RIS_BENCH.restore, RIS_BENCH.threshold
    )
    assert np.mean(expected_HW.numpy() != found_WH.T) < 1e-5  # float32 here, float64 there


def test_probabilities_and_logits_are_the_same_maps():
    logit_hw = np.random.default_rng(0).normal(0, 3, (12, 12)).astype(np.float32)
    probability_hw = 1 / (1 + np.exp(-logit_hw.astype(np.float64)))
    for name in PROTOCOLS:
        logits, probabilities = (
            mapped(name, map_hw, Maps(values=kind, geometry="stretch", size=48), [(20, 5, 60, 30)], (60, 80))
            for kind, map_hw in (("logit", logit_hw), ("probability", probability_hw))
        )
        assert logits == pytest.approx(probabilities, abs=1e-3)


@pytest.mark.parametrize("source", [1, 7, 333, 480, 640])
def test_nearest_neighbours(source):
    """Pillow takes the pixel at the centre, OpenCV that at the upper left corner."""
    mask_WH = np.outer(np.arange(source) % 3 == 0, np.ones(5, bool))
    resized = Image.fromarray(mask_WH.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(resampling.nearest(mask_WH, 480, "pillow"), np.asarray(resized) == 1)
    expected = mask_WH[[x * source // 480 for x in range(480)]][:, [0] * 480]
    np.testing.assert_array_equal(resampling.nearest(mask_WH, 480, "opencv"), expected)


def test_names_and_aliases():
    assert [protocols.find(name).name for name in ("ris-bench", "cris", "etris", "detris", "evf-sam")] == [
        *("ris-bench", "cris", "cris", "cris", "lisa")
    ]
    with pytest.raises(UserError, match=r"no protocol 'iou'; there are ris-bench, cris \(= etris, barleria, detris\)"):
        protocols.find("iou")
    names = [name for one in PROTOCOLS.values() for name in (one.name, *one.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_what_is_compared_in_the_input_can_be(protocol):
    if "input" in (protocol.test.frame, protocol.validation.frame):
        assert protocol.size and protocol.truth_resize
    assert protocol.prints and set(protocol.prints) <= {protocol.overall, protocol.mean}
    for stage in ("test", "validation"):
        assert "\n" not in protocol.describe(stage)
