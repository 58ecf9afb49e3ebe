"""What a model predicts for every expression of a split: pixel counts in a table, and pictures for people."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from ris_bench import metrics
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.files import whole
from ris_bench.loading import Tokenizer, expression_batches
from ris_bench.parallel import ALONE, Team
from ris_bench.protocols import RIS_BENCH, Protocol
from ris_bench.records import Scores
from ris_bench.transforms import Frame, Letterbox, restore

COUNTS = ("intersection", "union", "predicted", "target")
"""Columns of pixel counts in the original frame, int64."""

BESIDE = ("distractors", "other_intersection", "other_union")
"""Columns of what a dataset knows of the image's other objects, Int64; they are absent where it knows of none.

The number of those of the referent's category, missing where that has no name; and the counts of the prediction with
the one that it overlaps best, by IoU: zeros where there is none.
"""

THRESHOLDS = tuple(k / 20 for k in range(1, 20))
"""Probabilities above which a pixel could be predicted too; columns such as "intersection@0.05" and "union@0.05"."""

_PIXELS_AT_ONCE = 416**2
"""Of the images of as many expressions as a CPU works on together: it is quickest when that fits its caches."""

_IDENTITY = ("dataset", "split", "ref_id", "sent_id", "sentence_index", "image_id", "ann_id", "category", "expression")

# Blue and orange of Okabe and Ito, which are told apart with any colour sense.
_PREDICTION, _TRUTH = (0, 114, 178), (230, 159, 0)


def evaluate(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    threshold: float,
    others: Sequence[float] = (),
    report: Callable[[int, int], None] = lambda done, total: None,
    team: Team = ALONE,
    **settings: Any,
) -> pd.DataFrame:
    """One row per expression, in the order of the samples: which it is, its `COUNTS`, and what is `BESIDE` it.

    Args:
        model: as `RISModel`; every module is left in the mode in which it came.
        threshold: a pixel belongs to the mask where its probability is greater.
        others: of THRESHOLDS, for each of which intersection and union are counted too.
        report: called with the number of expressions done and their total as the work goes on.
        team: of processes that share the expressions; each of them gets all rows.
        settings: those of `logits`.

    Raises FloatingPointError, naming the expression, where a logit is not finite; UserError for a bad image.
    """
    counts_N4 = torch.zeros(len(samples), len(COUNTS), dtype=torch.int64, device=settings["device"])
    swept_NT2 = torch.zeros(len(samples), len(others), 2, dtype=torch.int64, device=settings["device"])
    beside = {}
    done = 0
    with inference(model):
        for index, map_BHW in maps(model, samples, team=team, **settings):
            shown = [samples[i] for i in index]
            predicted_BHW, target_BHW = map_BHW > log_odds(threshold), _targets(shown, map_BHW.device)
            counts_N4[index] = count(predicted_BHW, target_BHW)
            if others:
                swept_NT2[index] = _sweep(map_BHW, target_BHW, others)
            beside.update(zip(index, _beside(predicted_BHW, shown), strict=True))
            report(done := done + len(index), len(samples))
    team.sum(counts_N4, swept_NT2)
    beside = {i: row for own in team.gather(beside) for i, row in own.items()}
    columns = {column: [getattr(sample, column) for sample in samples] for column in _IDENTITY}
    columns |= dict(zip(COUNTS, counts_N4.T.cpu().numpy(), strict=True))
    for one, swept_2N in zip(others, swept_NT2.permute(1, 2, 0).cpu().numpy(), strict=True):
        columns |= {f"intersection@{one:g}": swept_2N[0], f"union@{one:g}": swept_2N[1]}
    if any(sample.others is not None for sample in samples):
        rows = zip(*(beside[i] for i in range(len(samples))), strict=True)
        columns |= {name: pd.array(row, dtype="Int64") for name, row in zip(BESIDE, rows, strict=True)}
    return pd.DataFrame(columns)


def scores(frame: pd.DataFrame, protocol: Protocol = RIS_BENCH) -> Scores:
    """The metrics of the expressions in a table of `evaluate`; ValueError where there are none."""
    own = metrics.scores(frame["intersection"].to_numpy(), frame["union"].to_numpy(), protocol)
    swept = {}
    for one in (column.partition("@")[2] for column in frame.columns if column.startswith("union@")):
        each = metrics.scores(frame[f"intersection@{one}"].to_numpy(), frame[f"union@{one}"].to_numpy(), protocol)
        swept[one] = {"oiou": each.oiou, "miou": each.miou}
    return replace(own, by_threshold=swept)


def write(frames: Mapping[str, pd.DataFrame], path: Path) -> None:
    """All tables in one Parquet file, whole or not at all; `split` becomes the name under which a table is given.

    That is the name reported: "testA/shuffled" is not "testA", though its samples say so. Counts of other thresholds,
    which would be most of the file, are left out.
    """
    table = pd.concat([frame.assign(split=name) for name, frame in frames.items()], ignore_index=True)
    table = table.drop(columns=[column for column in table.columns if "@" in column])
    with whole(path) as temporary:
        table.to_parquet(temporary, index=False)


def overlays(
    model: nn.Module,
    samples: Sequence[Sample],
    folder: Path,
    *,
    limit: int = 24,
    **settings: Any,
) -> None:
    """Pictures `<ref_id>-<sentence_index>.png` of at most `limit` samples, spread evenly; raises as `evaluate` does.

    The prediction is tinted and outlined in blue, the ground truth outlined in orange; below stand expression and IoU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spread = np.linspace(0, len(samples) - 1, min(limit, len(samples))).round().astype(int)
    chosen = [samples[i] for i in spread]
    with inference(model):
        for index, predicted_BHW in masks(model, chosen, **settings):
            shown = [chosen[i] for i in index]
            intersection_B, union_B, _, _ = count(predicted_BHW, _targets(shown, predicted_BHW.device)).T.cpu().numpy()
            ious = metrics.iou(intersection_B, union_B, RIS_BENCH)
            for sample, predicted_HW, iou in zip(shown, predicted_BHW.cpu().numpy(), ious, strict=True):
                path = folder / f"{sample.ref_id}-{sample.sentence_index}.png"
                overlay = picture(sample.image(), predicted_HW, sample.expression, sample.mask(), iou)
                overlay.save(path, compress_level=3)  # a tenth larger than by default, in less than half the time


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module is left in the mode in which it came."""
    # Module by module, since a frozen part may be in eval mode while the model trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def logits(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    team: Team = ALONE,
    known: Callable[[Sequence[Sample]], Any] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Positions of samples, and the logits (B, h, w) that the model gives for them, on `device`; within `inference`.

    `autocast` is the arithmetic of the model; None is that of its weights. A process of a team gives its share only.
    `known` gives samples' images, or what stands in their place, if not from their files.

    Raises FloatingPointError, naming the expression, where a logit is not finite; UserError for a bad image.
    """
    size = model.backbone.image_size
    for batch in expression_batches(samples, tokenizer, size, batch_size, num_workers, team, known):
        index = batch.index_B.tolist()
        logits_BHW = forward(model, batch.image_U3HW, batch.row_B, batch.tokens_BL, device, autocast)
        for position, finite in zip(index, logits_BHW.isfinite().flatten(1).all(1).tolist(), strict=True):
            if not finite:  # Every comparison with NaN is false: it would pass for an empty mask.
                sample = samples[position]
                raise FloatingPointError(
                    f"the model's logits are not finite for {sample.expression!r}, sentence {sample.sentence_index} "
                    f"of referent {sample.ref_id} in {sample.dataset} {sample.split}"
                )
        yield index, logits_BHW


def masks(
    model: nn.Module, samples: Sequence[Sample], *, threshold: float, **settings: Any
) -> Iterator[tuple[list[int], Tensor]]:
    """Positions of samples whose images have one frame, and their masks in it: bool (B, height, width).

    A pixel belongs to the mask where its probability is greater than `threshold`, in (0, 1). The other settings are
    those of `logits`; it raises as that does.
    """
    for index, map_BHW in maps(model, samples, **settings):
        yield index, map_BHW > log_odds(threshold)


def maps(model: nn.Module, samples: Sequence[Sample], **settings: Any) -> Iterator[tuple[list[int], Tensor]]:
    """The same with their logits in the frame of the image, float64."""
    letterbox = Letterbox(model.backbone.image_size)
    for index, logits_BHW in logits(model, samples, **settings):
        groups: dict[Frame, list[int]] = {}
        for row, position in enumerate(index):
            frame = letterbox.frame(samples[position].height, samples[position].width)
            groups.setdefault(frame, []).append(row)
        for frame, rows in groups.items():
            yield [index[row] for row in rows], restore(logits_BHW[rows], frame)


def forward(
    model: nn.Module,
    image_U3HW: Tensor,
    row_B: Tensor,
    tokens_BL: Tensor,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Tensor:
    """Logits (B, h, w), on `device`, of expressions of images that lie anywhere: each of the one in its row."""
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        known = model.known(image_U3HW.to(device, non_blocking=True))
        size = len(row_B) if device.type != "cpu" else max(1, _PIXELS_AT_ONCE // model.backbone.image_size**2)
        parts = zip(row_B.to(device).split(size), tokens_BL.to(device).split(size), strict=True)
        return torch.cat([model(known[part_B], part_BL) for part_B, part_BL in parts])[:, 0]


def log_odds(probability: float) -> float:
    """The logit that a probability in (0, 1) is of."""
    return math.log(probability / (1 - probability))


def _targets(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """The masks of samples whose images have one size: bool (B, height, width)."""
    truth: dict[tuple[str, int], np.ndarray] = {}
    for sample in samples:
        # The sentences of a referent share its mask, and to decode it costs more than to compare.
        if sample.referent not in truth:
            truth[sample.referent] = sample.mask()
    # pycocotools decodes column by column, and to compare two orders is slow.
    target_BHW = np.array([truth[sample.referent] for sample in samples], dtype=bool, order="C")
    return torch.from_numpy(target_BHW).to(device)


def count(predicted_BHW: Tensor, target_BHW: Tensor) -> Tensor:
    """(B, 4) int64: the `COUNTS` of every sample."""
    intersection_B, predicted_B, target_B = map(_area, (predicted_BHW & target_BHW, predicted_BHW, target_BHW))
    return torch.stack([intersection_B, predicted_B + target_B - intersection_B, predicted_B, target_B], dim=1)


def _area(mask_BHW: Tensor) -> Tensor:
    """(B,) int64: the pixels of every mask."""
    # On a CPU PyTorch adds up bool, and to int64, in three times the time.
    return mask_BHW.view(torch.uint8).sum((1, 2), dtype=torch.int32).long()


def _sweep(map_BHW: Tensor, target_BHW: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(B, T, 2) int64: intersection and union of every sample at each of some rising thresholds."""
    bounds_T = torch.tensor([log_odds(one) for one in thresholds], dtype=map_BHW.dtype, device=map_BHW.device)
    # How many of them a pixel exceeds, and whether it is of the target: every pixel is looked at once, however many
    # thresholds there are.
    levels = len(thresholds) + 1
    level_BHW = torch.bucketize(map_BHW, bounds_T)
    level_BHW += levels * torch.arange(len(map_BHW), device=map_BHW.device)[:, None, None]
    kind_BHW = level_BHW.mul_(2).add_(target_BHW)
    found_BL2 = torch.bincount(kind_BHW.flatten(), minlength=2 * levels * len(map_BHW)).view(-1, levels, 2)
    outside_BT, hits_BT = found_BL2.flip(1).cumsum(1).flip(1)[:, 1:].unbind(2)
    return torch.stack([hits_BT, outside_BT + _area(target_BHW)[:, None]], dim=2)


def _beside(predicted_BHW: Tensor, samples: Sequence[Sample]) -> Iterator[tuple[int | None, int | None, int | None]]:
    """What is `BESIDE` each sample; None where its dataset does not know."""
    rles: dict[tuple[str, int], list[dict[str, Any]]] = {}  # by referent, as others are
    for predicted_HW, sample in zip(predicted_BHW.cpu().numpy(), samples, strict=True):
        if sample.others is None:
            yield None, None, None
            continue
        if sample.referent not in rles:
            rles[sample.referent] = list(_rles(sample))
        own = set(sample.category.split("+")) - {""}
        distractors = sum(other.category in own for other in sample.others) if own else None
        intersection = union = 0
        if others := rles[sample.referent]:
            predicted = coco_mask.encode(np.asfortranarray(predicted_HW, dtype=np.uint8))
            best = others[int(coco_mask.iou([predicted], others, [False] * len(others)).argmax())]
            intersection = int(coco_mask.area(coco_mask.merge([predicted, best], intersect=True)))
            union = int(coco_mask.area(predicted)) + int(coco_mask.area(best)) - intersection
        yield distractors, intersection, union


def _rles(sample: Sample) -> Iterator[dict[str, Any]]:
    for other in sample.others:
        # No expression refers to it, so that it need not be well-formed to score one: `data check` tells of it.
        with suppress(UserError):
            yield replace(sample, ann_id=other.ann_id, segmentation=other.segmentation).rle()


def picture(
    photo: Image.Image,
    predicted_HW: np.ndarray,
    expression: str,
    truth_HW: np.ndarray | None = None,
    iou: float | None = None,
) -> Image.Image:
    """The photo with the prediction tinted and outlined in blue and, where given, the ground truth outlined in orange.

    Below stand the expression, in at most four lines, and the legend. A photo narrower than 400 pixels is enlarged by a
    whole factor, one whose longer side exceeds 1600 is shrunk to that.
    """
    scale = min(max(1, math.ceil(400 / photo.width)), 1600 / max(photo.size))
    size = (max(1, round(scale * photo.width)), max(1, round(scale * photo.height)))
    photo = photo.resize(size, Image.Resampling.BICUBIC)

    def resized(mask_HW: np.ndarray) -> Image.Image:
        # Nearest neighbour shows every pixel that was counted.
        return Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)

    predicted = resized(predicted_HW)
    photo.paste(Image.blend(photo, Image.new("RGB", size, _PREDICTION), 0.4), mask=predicted)
    # One outline runs outside its mask and one inside, so that both are seen where the masks are equal.
    photo.paste(_PREDICTION, mask=ImageChops.subtract(predicted.filter(ImageFilter.MaxFilter(5)), predicted))
    legend = [("prediction", _PREDICTION)]
    if truth_HW is not None:
        truth = resized(truth_HW)
        photo.paste(_TRUTH, mask=ImageChops.subtract(truth, truth.filter(ImageFilter.MinFilter(5))))
        legend.append(("ground truth", _TRUTH))
    if iou is not None:
        legend.insert(0, (f"IoU {iou:.3f}", "black"))

    font, margin, line = ImageFont.load_default(18), 8, 24
    width = max(photo.width, 400)
    letters = int((width - 2 * margin) / font.getlength("n"))
    lines = textwrap.wrap(expression, letters, max_lines=4, placeholder=" ...") or ["(no expression)"]
    whole = Image.new("RGB", (width, photo.height + line * (len(lines) + 1) + 2 * margin), "white")
    whole.paste(photo)
    draw = ImageDraw.Draw(whole)
    draw.text((margin, photo.height + margin), "\n".join(lines), "black", font, spacing=line - 18)
    left, top = margin, whole.height - margin - line
    for text, colour in legend:
        draw.text((left, top), text, colour, font)
        left += int(font.getlength(text)) + 3 * margin
    return whole
