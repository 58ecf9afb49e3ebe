"""The figures of files of predictions: qualitative sheets, and the scores at every threshold."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageChops, ImageFilter

from ris_bench import metrics
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.layout import METRICS
from ris_bench.predictions import Maps, Prediction, Predictions, decode, match
from ris_bench.protocols import RIS_BENCH
from ris_bench.records import Scores
from ris_bench.report.drawing import Drawing, Look, appearance, clean, legend_below, make_panels, named, styled

THRESHOLDS = np.arange(1, 100) / 100
"""Of the sweep; a pixel is predicted where its probability is greater."""
PIXELS = 400
"""Of the longer side of a picture in a sheet, at most: what print can show."""

# Blue and orange of Okabe and Ito, as in the overlays of a trial.
_PREDICTION, _TRUTH = (0, 114, 178), (230, 159, 0)
_GAP, _LINE = 0.06, 0.16  # inches: between pictures, and of a line of text


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one model answers to some samples."""

    label: str
    rows: Sequence[Prediction]
    """In the order of the samples."""
    maps: Maps | None
    """None where the rows are masks."""

    @classmethod
    def of(cls, label: str, predictions: Predictions, samples: Sequence[Sample]) -> Answers:
        """Those of a file to all samples of a split. UserError as `predictions.match` raises it."""
        splits = {(sample.dataset, sample.split) for sample in samples}
        rows = [row for row in predictions.rows if (row.dataset, row.split) in splits]
        return cls(label=label, rows=match(rows, samples), maps=predictions.maps)

    def mask(self, position: int, threshold: float) -> np.ndarray:
        """bool (height, width), in the frame of the image; the threshold cuts maps and leaves masks alone.

        UserError for run lengths that are none of the image.
        """
        row = self.rows[position]
        if self.maps is None:
            try:
                return decode(row.counts, row.height, row.width).T
            except ValueError as error:
                raise UserError(f"the mask of {row.name} {error}; encode it with pycocotools") from None
        from ris_bench.resampling import cut  # only now: it imports torch

        image = (row.height, row.width)
        return cut(row.map, self.maps, image, image, RIS_BENCH.upsample, RIS_BENCH.restore, threshold).T


def at_random(samples: Sequence[Sample], number: int, seed: int) -> list[int]:
    """Positions of so many samples of different images, in their order; all images where there are no more."""
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    return sorted(_of_different_images(order, samples)[:number])


def in_dispute(samples: Sequence[Sample], answers: Sequence[Answers], number: int, threshold: float) -> list[int]:
    """Positions of the samples on which the answers differ most, the most disputed first, of different images.

    They differ by 1 - IoU of two masks, averaged over the pairs of answers. UserError where there is one answer.
    """
    if len(answers) < 2:
        raise UserError("one model cannot disagree with itself: give the predictions of several")

    def disputed(position: int) -> float:
        masks = [answer.mask(position, threshold) for answer in answers]
        return float(np.mean([_difference(*pair) for pair in combinations(masks, 2)]))

    dispute = [disputed(position) for position in range(len(samples))]
    order = sorted(range(len(samples)), key=lambda position: -dispute[position])
    return _of_different_images(order, samples)[:number]


@styled()
def sheet(
    samples: Sequence[Sample],
    answers: Sequence[Answers],
    chosen: Sequence[int],
    *,
    threshold: float = RIS_BENCH.threshold,
    name: str = "",
    why: str = "",
) -> Drawing:
    """A row for each chosen sample: the image, the ground truth and what every model answers, with its IoU.

    `why` says in the caption how they were chosen. UserError where none is, and for an image that cannot be read.
    """
    if not chosen:
        raise UserError("there is nothing to be shown")
    headers = ["Image", "Ground truth", *(answer.label for answer in answers)]
    width = max(7.0, 1.3 * len(headers))
    cell = (width - _GAP * (len(headers) + 1)) / len(headers)
    # A letter of 8 points is 0.064 inches wide on average, one of East Asia twice as much.
    texts = [_wrapped(samples[position].expression, int(width / 0.064)) for position in chosen]
    heights = [cell * min(1.2, samples[position].height / samples[position].width) for position in chosen]
    rows = [_LINE * (len(text) + 1) + height + 2 * _GAP for text, height in zip(texts, heights, strict=True)]
    total = 1.5 * _LINE + sum(rows)
    figure = Figure(figsize=(width, total))

    def axes(left: float, top: float, wide: float, high: float):
        # A place in inches, from the top left. What does not fit into it is cut off.
        made = figure.add_axes((left / width, 1 - (top + high) / total, wide / width, high / total))
        made.set_axis_off()
        return made

    def write(text: str, left: float, top: float, wide: float, high: float, **font: object) -> None:
        centred = font.pop("centred", False)
        place = axes(left, top, wide, high)
        place.text(0.5 * centred, 0.5, text, ha="center" if centred else "left", va="center", clip_on=True, **font)

    lefts = [_GAP + k * (cell + _GAP) for k in range(len(headers))]
    for header, left in zip(headers, lefts, strict=True):
        write(clean(header, int(cell / 0.075)), left, 0, cell, 1.5 * _LINE, centred=True, fontweight="bold")
    top = 1.5 * _LINE
    for position, text, height, row in zip(chosen, texts, heights, rows, strict=True):
        sample = samples[position]
        high = _LINE * len(text)
        write("\n".join(text), lefts[0], top, width - 2 * _GAP, high, linespacing=1.15)
        photo, truth_HW = sample.image(), sample.mask().astype(bool)
        pictures = [(photo, None, None, ""), (photo, truth_HW, _TRUTH, "")]
        for answer in answers:
            predicted_HW = answer.mask(position, threshold)
            pictures.append((photo, predicted_HW, _PREDICTION, f"IoU {_iou(predicted_HW, truth_HW):.3f}"))
        for left, (image, mask_HW, colour, below) in zip(lefts, pictures, strict=True):
            place = axes(left, top + high + _GAP / 2, cell, height)
            place.imshow(_painted(image, mask_HW, colour), interpolation="antialiased")
            write(below, left, top + high + height + _GAP / 2, cell, _LINE, centred=True, fontsize=7)
        top += row
    shown = "; ".join(answers[0].rows[position].name for position in chosen)
    cut = f" Maps are cut where the probability is greater than {threshold:g}." if any(a.maps for a in answers) else ""
    caption = f"What the models answer to {len(chosen)} expressions{why and f', {why}'}: {shown}.{cut}"
    return Drawing(name=name, figure=figure, caption=clean(caption, len(caption)))


@styled()
def sweep(samples: Sequence[Sample], answers: Sequence[Answers], *, name: str = "") -> Drawing:
    """mIoU and oIoU of a split at every threshold, with the oracle: the threshold that is best on this very split.

    Answers with masks are left out, as the caption says. UserError where none has maps, or these are not logits over a
    letterbox, as `ris-bench evaluate --maps` writes them.
    """
    swept = [answer for answer in answers if answer.maps]
    if not swept:
        raise UserError(
            "the predictions are masks, whose threshold is past: write maps, with ris-bench evaluate --maps"
        )
    figure, [(left, right)] = make_panels(1, 2, width=3.2, height=2.4)
    where = " and ".join(dict.fromkeys(f"{sample.dataset} {sample.split}" for sample in samples))
    pairs: list[tuple[Line2D, str]] = []
    told = []
    for place, answer in enumerate(swept):
        counted = scores_by_threshold(samples, answer)
        look = appearance(place)
        pairs.append((_line(look), clean(answer.label)))
        for axes, metric in ((left, "miou"), (right, "oiou")):
            percent = 100 * np.array([getattr(scores, metric) for scores in counted])
            best = int(percent.argmax())
            axes.plot(THRESHOLDS, percent, linestyle=look.dash, color=look.colour)
            axes.plot(THRESHOLDS[best], percent[best], look.marker, color=look.colour, ms=look.size)
            told.append(f"{clean(answer.label)} {METRICS[metric]} {percent[best]:.2f} at {THRESHOLDS[best]:g}")
    for axes, metric in ((left, "miou"), (right, "oiou")):
        axes.axvline(RIS_BENCH.threshold, color="0.4", linewidth=0.8, linestyle=":", zorder=1)
        axes.set_xlim(0, 1)
        axes.set_xlabel("Threshold of the probability")
        axes.set_ylabel(named(metric, where))
    dotted = Line2D([], [], color="0.4", linewidth=0.8, linestyle=":")
    marker = Line2D([], [], linestyle="", marker="o", color="0.3")
    shared = [(marker, "oracle: best on this split"), (dotted, f"{RIS_BENCH.threshold:g}: {RIS_BENCH.name} protocol")]
    legend_below(figure, [*pairs, *shared])
    masks = [clean(answer.label) for answer in answers if not answer.maps]
    caption = (
        f"mIoU and oIoU on {where} at every threshold from {THRESHOLDS[0]:g} to {THRESHOLDS[-1]:g}. A marker is the "
        f"oracle, the threshold that is best on this split, which no model may know: {'; '.join(told)}."
    )
    caption += f" Left out, being masks: {', '.join(masks)}." if masks else ""
    return Drawing(name=name, figure=figure, caption=clean(caption, len(caption)))


def scores_by_threshold(samples: Sequence[Sample], answer: Answers) -> list[Scores]:
    """The scores of the maps of all samples, cut at each of THRESHOLDS as the protocol ris-bench cuts them."""
    if (answer.maps.values, answer.maps.geometry) != ("logit", "letterbox"):
        raise UserError(
            f"the maps of {clean(answer.label)} are a {answer.maps.values} in the geometry {answer.maps.geometry}: "
            "thresholds are swept over logits in a letterbox, as ris-bench evaluate --maps writes them"
        )
    import torch  # only now

    from ris_bench.transforms import Letterbox, restore

    letterbox, cuts = Letterbox(answer.maps.size), np.log(THRESHOLDS) - np.log1p(-THRESHOLDS)
    intersection_NT, union_NT = (np.zeros((len(samples), len(cuts)), dtype=np.int64) for _ in range(2))
    for position, (sample, row) in enumerate(zip(samples, answer.rows, strict=True)):
        logits_1hw = torch.from_numpy(row.map.astype(np.float32))[None]
        logits_HW = restore(logits_1hw, letterbox.frame(sample.height, sample.width))[0].numpy()
        # A pixel is in the masks of the first so many thresholds: of those that its logit exceeds.
        exceeded_HW = np.searchsorted(cuts, logits_HW)
        truth_HW = sample.mask().astype(bool)
        predicted_T, both_T = (
            np.bincount(exceeded.ravel(), minlength=len(cuts) + 1)[::-1].cumsum()[::-1][1:]
            for exceeded in (exceeded_HW, exceeded_HW[truth_HW])
        )
        intersection_NT[position], union_NT[position] = both_T, predicted_T + truth_HW.sum() - both_T
    columns = zip(intersection_NT.T, union_NT.T, strict=True)
    return [metrics.scores(intersection_N, union_N, RIS_BENCH) for intersection_N, union_N in columns]


def draw(
    samples: Mapping[tuple[str, str], Sequence[Sample]],
    files: Mapping[str, Predictions],
    *,
    rows: int,
    seed: int,
    disputed: bool,
    threshold: float = RIS_BENCH.threshold,
) -> tuple[list[Drawing], list[str]]:
    """A sheet and a sweep for every split, and for each figure that cannot be a line that says why.

    Args:
        samples: by dataset and split, all that are predicted.
        files: by the label of the model.
        rows, seed: so many samples, drawn at random from the seed; where `disputed`, those with most disagreement.
    """
    drawn, absent = [], []
    for (dataset, split), expected in samples.items():
        answers = [Answers.of(label, predictions, expected) for label, predictions in files.items()]
        if disputed:
            chosen, why = in_dispute(expected, answers, rows, threshold), "those on which they differ most"
        else:
            chosen, why = at_random(expected, rows, seed), f"drawn at random with seed {seed}"
        tail = f"{dataset}-{split}".replace("/", "-")
        drawn.append(sheet(expected, answers, chosen, threshold=threshold, name=f"sheet-{tail}", why=why))
        try:
            drawn.append(sweep(expected, answers, name=f"threshold-{tail}"))
        except UserError as error:
            absent.append(f"no figure threshold-{tail}: {error}")
    return drawn, absent


def read(arguments: Iterable[str]) -> dict[str, Path]:
    """Files by label, out of LABEL=FILE or FILE, whose label is its name. UserError where two have one label."""
    found: dict[str, Path] = {}
    for argument in arguments:
        label, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            label, path = Path(argument).stem, argument
        if label in found:
            raise UserError(f"two files of predictions are called {label!r}: write LABEL=FILE, with a label for each")
        found[label] = Path(path)
    return found


def _of_different_images(order: Iterable[int], samples: Sequence[Sample]) -> list[int]:
    first: dict[tuple[str, int], int] = {}
    for position in order:
        first.setdefault((samples[position].dataset, samples[position].image_id), position)
    return list(first.values())


def _difference(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    union = np.count_nonzero(one_HW | other_HW)
    return 1 - np.count_nonzero(one_HW & other_HW) / union if union else 0.0


def _iou(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    counts = (np.array([np.count_nonzero(both)]) for both in (predicted_HW & truth_HW, predicted_HW | truth_HW))
    return float(metrics.iou(*counts, RIS_BENCH)[0])


def _wrapped(expression: str, columns: int) -> list[str]:
    """At most two lines."""
    text = clean(expression, 1000)
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    lines = textwrap.wrap(text, columns // 2 if wide else columns, max_lines=2, placeholder=" …")
    return lines or ["(no expression)"]


def _painted(photo: Image.Image, mask_HW: np.ndarray | None, colour: tuple[int, int, int] | None) -> np.ndarray:
    """The photo, shrunk, with a mask tinted and outlined: uint8 (height, width, 3)."""
    scale = min(1.0, PIXELS / max(photo.size))
    size = (max(1, round(scale * photo.width)), max(1, round(scale * photo.height)))
    photo = photo.resize(size, Image.Resampling.LANCZOS)
    if mask_HW is not None:
        mask = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        photo.paste(Image.blend(photo, Image.new("RGB", size, colour), 0.45), mask=mask)
        # The white line around it shows a blue outline on a blue object.
        photo.paste("white", mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(5)), mask))
        photo.paste(colour, mask=ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5))))
    return np.asarray(photo)


def _line(look: Look) -> Line2D:
    kind = {"linestyle": look.dash, "marker": look.marker, "ms": look.size}
    return Line2D([], [], color=look.colour, **kind)
