"""Evaluation protocols as data: what turns the answers of a model into the numbers of a table.

Each is the evaluation of one public repository, read from its code at the commit named; `file:line` is of that commit.
The constants that these add against a division by zero (1e-5 and less) are left out: they change an IoU by less than
1e-5, except where the union is empty, and `empty_iou` says what that gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ris_bench.errors import UserError
from ris_bench.records import Evaluation

Geometry = Literal["letterbox", "letterbox-exact", "letterbox-floor", "longest-side", "stretch"]
GEOMETRIES: tuple[Geometry, ...] = ("letterbox", "letterbox-exact", "letterbox-floor", "longest-side", "stretch")
"""How an image is brought into the square input of a network.

    letterbox        centred; its sides and the padding before it are whole pixels, rounded (transforms.py)
    letterbox-exact  centred by an affine map without rounding; pixel 0 goes to the padding before it (CRIS)
    letterbox-floor  centred; its sides are rounded down (VLT)
    longest-side     at the top left, the padding below or on the right (SAM)
    stretch          fills the square, whatever its shape
"""


@dataclass(frozen=True, kw_only=True)
class Resize:
    """One interpolation of a map; the kernels are PyTorch's and OpenCV's (bicubic: A = -0.75)."""

    kernel: Literal["bilinear", "bicubic"]
    of: Literal["logit", "probability"]
    """What is interpolated; the sigmoid comes before or after."""
    align_corners: bool = False
    warp: bool = False
    """As cv2.warpAffine has it: positions to 1/32 pixel, and zeros beyond the square instead of its border."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way in which a repository goes over a split."""

    sentences: Literal["all", "first", "last", "random"]
    """Of every referent. So an average is over expressions where it is "all", else over referents."""
    frame: Literal["original", "input"]
    """Where masks are compared: in the original image, or in the square that the network gets."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules on which published evaluations differ."""

    name: str
    aliases: tuple[str, ...] = ()
    """Other repositories with the same rules."""
    geometry: Geometry
    size: int | None
    """Side of the square in pixels; None where any will do."""
    upsample: Resize
    """From the map that the network gives to its square."""
    restore: Resize
    """From the part of the square that the image fills to the frame in which masks are compared."""
    threshold: float
    """A pixel is predicted where its probability is greater. 0.5 is also argmax over background and foreground."""
    test: Pass
    """How the numbers of a paper are made, those of val included."""
    validation: Pass
    """How the training code watches val, by which it selects the checkpoint."""
    text: Literal["sent", "raw"]
    """Which form of a sentence the model is asked: normalised, or as typed."""
    truth: Literal["union", "hole"]
    """What is in several polygons of a referent: part of it, or not."""
    truth_resize: Literal["pillow", "opencv", "polygons"] | None
    """How the ground truth gets into the square: nearest neighbour as one of them has it (Pillow looks at the centre of
    a pixel, OpenCV at its upper left corner), or its polygons are scaled and rasterised there."""
    precision_at: tuple[float, ...]
    """The K of Pr@K."""
    strict: bool
    """Pr@K counts an IoU greater than K; otherwise also one that equals K."""
    empty_iou: float
    """IoU of an expression for which both the prediction and the ground truth are empty."""
    no_target: bool = False
    """Whether "there is nothing" is an answer of its own, as in gRefCOCO: given rightly its IoU is `empty_iou` and adds
    nothing to the sums, given wrongly the intersection is empty; and Pr@K is of the expressions that have a target."""
    overall: str = "oIoU"
    """What the repository calls the sum of intersections over the sum of unions."""
    mean: str = "mIoU"
    """What it calls the mean of the IoUs."""
    prints: tuple[str, ...] = ("oIoU", "mIoU")
    """Which of the two its code prints."""

    def describe(self, stage: Literal["test", "validation"]) -> str:
        """The rules in one line of English."""
        one = getattr(self, stage)
        sentences = "every sentence" if one.sentences == "all" else f"the {one.sentences} sentence of a referent"
        where = "the original image" if one.frame == "original" else f"the {self.size} x {self.size} input"
        several = "united" if self.truth == "union" else "cut out where they overlap"
        ties = "greater than" if self.strict else "at least"
        square = "input" if self.size is None else f"input of {self.size} x {self.size}"
        precision = f", Pr@K: an IoU {ties} K" if self.precision_at else ", no Pr@K"
        return (
            f"{sentences} (`{self.text}`), compared in {where}; {self.geometry} {square}; {self.upsample.of} upsampled "
            f"{self.upsample.kernel}, align_corners {'on' if self.upsample.align_corners else 'off'}, then "
            f"{self.restore.of} {'warped' if self.restore.warp else 'resized'} {self.restore.kernel}, greater than "
            f"{self.threshold:g}; polygons {several}{precision}; both masks empty: {self.empty_iou:g}"
            f"{'; an answer of no target counts' if self.no_target else ''}"
        )


MARKS = {
    "resampled": "the masks are resampled to the frame of the protocol by the nearest neighbour",
    "geometry": "the maps were made in another geometry than the protocol's, and are brought over from it",
    "text": "the model was not asked the form of the sentence (`sent` or `raw`) that the protocol asks",
    "unprinted": "the code that the protocol stands for does not print this metric",
}
"""What a reader must know of a score, that a file of predictions was given by a protocol."""

_FIVE = (0.5, 0.6, 0.7, 0.8, 0.9)
_EVERY_SENTENCE = Pass(sentences="all", frame="original")
_BILINEAR = Resize(kernel="bilinear", of="logit")
_STRETCHED = Pass(sentences="all", frame="input")

RIS_BENCH = Protocol(
    name="ris-bench",
    geometry="letterbox",
    size=None,
    upsample=_BILINEAR,
    restore=_BILINEAR,
    threshold=Evaluation.threshold,
    test=_EVERY_SENTENCE,
    validation=_EVERY_SENTENCE,
    text="sent",
    truth="union",
    truth_resize=None,
    precision_at=_FIVE,
    strict=True,
    empty_iou=0.0,
)
"""Every expression of the split counts once, and masks are compared in the frame of the original image.

The ground truth is the union of the polygons of the referent. The model's logits are interpolated bilinearly
(align_corners=False) to its input size, the content of the letterbox is cropped, and that is interpolated in the same
way to the original image; a pixel is predicted where the logit exceeds the logit of the threshold, thus where the
probability exceeds the threshold. Logits are interpolated, not probabilities, which gives slightly other borders.
The IoU of an empty union is 0, as in CRIS, which divides by U + 1e-6; Pr@K is the share of IoUs greater than K.
"""

CRIS = Protocol(
    name="cris",
    aliases=("etris", "barleria", "detris"),
    geometry="letterbox-exact",
    size=416,
    upsample=Resize(kernel="bicubic", of="probability", align_corners=True),
    restore=Resize(kernel="bicubic", of="probability", warp=True),
    threshold=0.35,
    test=_EVERY_SENTENCE,
    validation=Pass(sentences="first", frame="original"),
    text="sent",
    truth="union",
    truth_resize=None,
    precision_at=_FIVE,
    strict=True,
    empty_iou=0.0,
    prints=("mIoU",),
)
"""CRIS e596332, ETRIS cdc6d8e, BarLeRIa 8632568; DETRIS c94b1e1 at 448, which maps of that size say for themselves.

engine/engine.py:83-127 (val) and :133-206 (test); geometry utils/dataset.py:193-208; first sentence of val :171. PNGs
of the ground truth hold m * 255 modulo 256 and count where they are not zero, which is the union. DETRIS prints oIoU in
test too (engine/engine.py:178-192,206,210). Distributed validation repeats samples to fill its batches, ours does not.
"""

LAVT = Protocol(
    name="lavt",
    geometry="stretch",
    size=480,
    upsample=Resize(kernel="bilinear", of="logit", align_corners=True),
    restore=_BILINEAR,
    threshold=0.5,
    test=_STRETCHED,
    validation=Pass(sentences="random", frame="input"),
    text="raw",
    truth="hole",
    truth_resize="pillow",
    precision_at=_FIVE,
    strict=False,
    empty_iou=0.0,
)
"""LAVT 1da0af9: test.py:62-74 (argmax, IoU, an empty union is 0, Pr@K with >=), :83-88 (480 x 480), :93 (I and U).

transforms.py:36-39 resizes the ground truth by Pillow's nearest neighbour; lib/_utils.py upsamples two logits, whose
difference is the one logit here; train.py:38-48 validates on a random sentence; data/dataset_refer_bert.py keeps pixels
where the summed polygons are 1. The way back to the original image does not occur: `restore` serves maps that were
made in another geometry.
"""

CGFORMER = Protocol(
    name="cgformer",
    geometry="stretch",
    size=480,
    upsample=Resize(kernel="bilinear", of="logit", align_corners=True),
    restore=Resize(kernel="bicubic", of="probability", align_corners=True),
    threshold=0.5,
    test=_EVERY_SENTENCE,
    validation=Pass(sentences="last", frame="input"),
    text="sent",
    truth="hole",
    truth_resize="pillow",
    precision_at=_FIVE,
    strict=True,
    empty_iou=0.0,
)
"""CGFormer 67d3390: engine/engine.py:100-131 (val: the 480 x 480 input), :166-195 (test: bicubic to the original).

model/segmenter.py upsamples the logit to the input. utils/dataset.py:149 takes the last sentence in val, :164-171
resizes the ground truth there; np.uint8(254 / 255) is 0, so that what lies in two polygons is background (:140,166).
"""

RELA = Protocol(
    name="rela",
    geometry="stretch",
    size=480,
    upsample=_BILINEAR,
    restore=_BILINEAR,
    threshold=0.5,
    test=_STRETCHED,
    validation=_STRETCHED,
    text="raw",
    truth="union",
    truth_resize="polygons",
    precision_at=(0.7, 0.8, 0.9),
    strict=False,
    empty_iou=1.0,
    no_target=True,
    overall="cIoU",
    mean="gIoU",
    prints=("cIoU", "gIoU"),
)
"""ReLA 3ca9551, for gRefCOCO and RefCOCO alike: gres_model/evaluation/refer_evaluation.py:87 (Pr@.7,.8,.9), :129-168.

An expression without target that is answered so has IoU 1 and adds nothing to the sums; otherwise IoU 0, and its
prediction joins the unions. A target that is denied has an empty intersection. gIoU is the mean over all (:190), Pr@K
is over those with a target (:173). data/dataset_mappers/refcoco_mapper.py:41-57,107 scales the polygons and unites
their masks; GRES.py:157-162 upsamples. ReLA has a head for "no target"; where a file says nothing of it, an empty mask
denies the target.
"""

VLT = Protocol(
    name="vlt",
    geometry="letterbox-floor",
    size=416,
    upsample=Resize(kernel="bilinear", of="probability"),
    restore=Resize(kernel="bilinear", of="probability"),
    threshold=0.35,
    test=_EVERY_SENTENCE,
    validation=_EVERY_SENTENCE,
    text="sent",
    truth="union",
    truth_resize=None,
    precision_at=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    strict=True,
    empty_iou=1.0,
    prints=("mIoU",),
)
"""VLT 9b24015: callbacks/eval.py:92-98 (every sentence), :105-119 (sigmoid, resize, crop, resize), :137-152 (IoU).

Its IoU is (I + 1e-10) / (U + 1e-10), so that two empty masks have 1. `segment_thresh` is 0.35 in
config/refcoco/example.yaml. It calls the mean "seg_iou".
"""

POLYFORMER = Protocol(
    name="polyformer",
    geometry="stretch",
    size=512,
    upsample=_BILINEAR,
    restore=_BILINEAR,
    threshold=0.5,
    test=_STRETCHED,
    validation=_STRETCHED,
    text="sent",
    truth="hole",
    truth_resize="opencv",
    precision_at=_FIVE,
    strict=False,
    empty_iou=0.0,
)
"""PolyFormer 69fc728: utils/eval_utils.py:58-86 (IoU, an empty union is 0), evaluate.py:154 (Pr@K with >=).

data/refcoco_dataset.py:89 resizes the ground truth to 512 x 512 by OpenCV's nearest neighbour. The model draws polygons
and no map: how a map of another model is resampled and cut is ours.
"""

LISA = Protocol(
    name="lisa",
    aliases=("evf-sam",),
    geometry="longest-side",
    size=1024,
    upsample=_BILINEAR,
    restore=_BILINEAR,
    threshold=0.5,
    test=_EVERY_SENTENCE,
    validation=_EVERY_SENTENCE,
    text="sent",
    truth="hole",
    truth_resize=None,
    precision_at=(),
    strict=True,
    empty_iou=1.0,
    overall="ciou",
    mean="giou",
    prints=("ciou", "giou"),
)
"""LISA 3cb2d43: train_ds.py:547-573 (logit > 0; an empty union has IoU 1), utils/dataset.py:368-376 (every sentence).

SAM resizes to 1024, cuts the padding off and resizes to the original image, bilinearly (model/LISA.py:289-292). The
histogram of intersectionAndUnionGPU has bins for 0 and 1, so that a pixel in two polygons is predicted in vain. EVF-SAM
9935dc5, eval.py:157-182.
"""

PROTOCOLS = {one.name: one for one in (RIS_BENCH, CRIS, LAVT, CGFORMER, RELA, VLT, POLYFORMER, LISA)}


def find(name: str) -> Protocol:
    """The protocol of a name or alias; UserError where there is none."""
    for one in PROTOCOLS.values():
        if name in (one.name, *one.aliases):
            return one
    known = [f"{one.name} (= {', '.join(one.aliases)})" if one.aliases else one.name for one in PROTOCOLS.values()]
    raise UserError(f"there is no protocol {name!r}; there are {', '.join(known)}")
