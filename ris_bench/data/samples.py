"""One typed sample per expression, with its image and mask; and how samples are grouped and drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ris_bench.errors import UserError

NO_TARGET = -1
"""The annotation of an expression that refers to nothing, as gRefCOCO writes it."""

MOST_PIXELS = 1 << 26
"""Of an image: a larger one, or a header that claims it, is refused before memory is asked for."""

_ORIENTATION = 0x0112  # The EXIF tag; above 4, width and height change places.
_LONGEST = 2e6  # Pixels and points of an outline: rasterising takes some 100 bytes for each of them.


class Other(NamedTuple):
    """An annotated object of a sample's image that its expression does not refer to."""

    ann_id: int
    category: str
    """Empty where the dataset does not name it."""
    segmentation: Any
    """As a sample has it."""


@dataclass(frozen=True)
class Sample:
    """One expression of one referent. Sentences of a referent share its segmentation."""

    dataset: str
    split: str
    ref_id: int
    """Unique in its dataset."""
    sent_id: int
    sentence_index: int
    """Position among the sentences of the referent: (dataset, ref_id, sentence_index) names a sample."""
    image_id: int
    ann_id: int
    """Where the referent is several objects, the first of them; `NO_TARGET` where it is none."""
    category: str
    """Several different ones are joined by "+"; empty where there is no target."""
    expression: str
    """The normalised sentence, stripped. It may be empty: it is kept and scored, or the denominator would change."""
    raw: str
    """The sentence as it was typed."""
    image_path: Path
    height: int
    width: int
    segmentation: Sequence[Sequence[float] | Mapping[str, Any]] | Mapping[str, Any] = field(compare=False, repr=False)
    """What the mask is the union of: polygons as [x0, y0, x1, y1, ...] in pixels and run-length dictionaries of COCO,
    compressed or not, of all objects that the expression refers to; or one such dictionary."""
    further_ann_ids: tuple[int, ...] = ()
    """Where the referent is several objects, all but the first."""
    others: Sequence[Other] | None = field(default=None, compare=False, repr=False)
    """What else is annotated in the image, crowds aside; None where the dataset does not tell."""

    @property
    def referent(self) -> tuple[str, int]:
        """What it is an expression of: datasets number their referents alike, so the name of its own takes part."""
        return self.dataset, self.ref_id

    @property
    def ann_ids(self) -> tuple[int, ...]:
        """All annotations that the expression refers to: none, one or several."""
        return () if self.ann_id == NO_TARGET else (self.ann_id, *self.further_ann_ids)

    def image(self) -> Image.Image:
        """The RGB photo, (height, width), with the pixels as they are stored: no EXIF orientation is applied.

        Grey, palette and CMYK become RGB as Pillow does it. UserError names a file that is damaged, has another size,
        more than `MOST_PIXELS`, or grey values of more than 8 bits, which Pillow would clip.
        """
        with self._opened() as file:
            return file.convert("RGB")

    def check_image(self) -> None:
        """Raise what `image` would for the header of the file; its pixels are not read."""
        with self._opened():
            pass

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.image_path) as file:
                if file.size != (self.width, self.height):
                    # Not file.getexif(): that of a PNG looks behind the pixels, and so decodes them.
                    turned = Image.Image.getexif(file).get(_ORIENTATION, 1) > 4
                    advice = "turn its pixels and remove that" if turned else "replace it with the original image"
                    raise UserError(
                        f"{self.image_path} has {file.width} x {file.height} pixels"
                        f"{', before its EXIF orientation turns them,' if turned else ''} where its annotation says "
                        f"{self.width} x {self.height}; {advice}"
                    )
                if self.width * self.height > MOST_PIXELS:
                    raise UserError(
                        f"{self.image_path} has {file.width} x {file.height} pixels, and at most {MOST_PIXELS:,} are "
                        "read; scale image and annotation down"
                    )
                if file.mode.startswith(("I", "F")):
                    raise UserError(f"{self.image_path} has grey values of more than 8 bits; save it with 8 bits")
                yield file
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.image_path} cannot be decoded ({error}); download it again") from error

    def mask(self) -> np.ndarray:
        """The referent's pixels, (height, width) uint8 in {0, 1}: the union of its polygons and run lengths.

        What lies outside the frame is cut off, so a polygon that is wholly outside gives an empty mask. Polygons of
        fewer than three points have no area and are left out. Without target the mask is empty. UserError names an
        annotation whose segmentation is malformed, or so long that rasterising it would take gigabytes.
        """
        return coco_mask.decode(self.rle())

    def rle(self) -> dict[str, Any]:
        """The mask as a compressed run-length dictionary of pycocotools; raises as `mask` does."""
        try:
            if self.height * self.width > MOST_PIXELS:
                raise ValueError(f"an image of {self.width} x {self.height} pixels is too large")
            parts = [self.segmentation] if isinstance(self.segmentation, Mapping) else self.segmentation
            rles = []
            for part in parts:
                if isinstance(part, Mapping):
                    rles.append(_run_lengths(part, self.height, self.width))
                elif len(part) >= 6 or isinstance(part, str):
                    # One at a time: a list whose first polygon has four numbers would be taken for boxes.
                    rles += coco_mask.frPyObjects([_polygon(part)], self.height, self.width)
            if not rles:
                nothing = {"size": [self.height, self.width], "counts": [self.height * self.width]}
                rles = [_run_lengths(nothing, self.height, self.width)]
            return coco_mask.merge(rles)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise UserError(
                f"the segmentation of annotation {self.ann_id} of {self.dataset} (image {self.image_id}) is malformed "
                f"({error}); replace instances.json with the original"
            ) from error


def referents(samples: Sequence[Sample]) -> list[list[int]]:
    """For each referent the positions of its expressions, in the order of first appearance."""
    positions: dict[tuple[str, int], list[int]] = {}
    for position, sample in enumerate(samples):
        positions.setdefault(sample.referent, []).append(position)
    return list(positions.values())


def draw(*key: int | str) -> int:
    """A random integer in [0, 2**64) that depends on the key alone: on no state, package or machine."""
    return int.from_bytes(sha256(repr(key).encode()).digest()[:8], "big")


def draw_keys(samples: Sequence[Sample]) -> list[tuple[int | str, ...]]:
    """For each sample what a draw should know its referent by: its id, and its dataset too where there are several.

    In a mix the ids alone would not do: the same object often has nearly the same id in RefCOCO and RefCOCO+.
    """
    mixed = len({sample.dataset for sample in samples}) > 1
    return [sample.referent if mixed else (sample.ref_id,) for sample in samples]


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same samples with their expressions dealt out: every one is used once, and none by its own referent.

    Raises UserError where that cannot be: one referent has more than half of the expressions.
    """
    groups, keys = referents(samples), draw_keys(samples)
    largest = max(map(len, groups), default=0)
    if 2 * largest > len(samples) or not samples:
        raise UserError(
            f"the {len(samples)} expressions of {len(groups)} referents cannot be dealt out to others: one has "
            f"{largest} of them, and at most half is possible; use a larger split"
        )
    groups.sort(key=lambda group: draw(seed, *keys[group[0]]))
    # Referents lie side by side, so a turn by the size of the largest takes every expression out of its own.
    taker = [position for group in groups for position in group]
    giver = taker[largest:] + taker[:largest]
    dealt = list(samples)
    for to, of in zip(taker, giver, strict=True):
        dealt[to] = replace(samples[to], expression=samples[of].expression, raw=samples[of].raw)
    return dealt


def united(segmentations: Sequence[Any]) -> Any:
    """One segmentation that is the union of several: what they are made of, side by side."""
    if len(segmentations) == 1:
        return segmentations[0]
    parts: list[Any] = []
    for segmentation in segmentations:
        parts += segmentation if isinstance(segmentation, list) else [segmentation]
    return parts


def _polygon(coordinates: Sequence[float]) -> list[float]:
    points = np.asarray(coordinates)
    if points.ndim != 1 or points.dtype.kind not in "iuf" or len(points) % 2:
        raise ValueError("a polygon is an even number of coordinates")
    corners = points.reshape(-1, 2).astype(np.float64)
    sides = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1)
    # Also where it is no number: no comparison with NaN is true.
    if not sides.sum() + len(sides) + np.abs(corners).max() < _LONGEST:
        raise ValueError("a coordinate is not a number or far outside any image, or the outline is too long")
    return coordinates


def _run_lengths(rle: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """COCO's run-length dictionary, compressed (a string) or not (a list), as pycocotools decodes it.

    pycocotools reads beyond the end of runs that are too short for the image, so ValueError where they do not fill it.
    """
    counts = rle["counts"]
    if isinstance(counts, str):
        runs: list[int] = []
        value = shift = 0
        # Five bits each, lowest first; bit 5 says that more follow, bit 4 of the last is the sign.
        for letter in counts:
            digit = ord(letter) - 48
            value |= (digit & 31) << shift
            shift += 5
            if not digit & 32:
                value -= (digit & 16) << (shift - 4)
                runs.append(value + runs[-2] if len(runs) > 2 else value)  # From the fourth on, a difference.
                value = shift = 0
            elif shift > 60:
                raise ValueError("a run length has too many digits")
        counts = runs
    if list(rle["size"]) != [height, width] or sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"its run lengths do not fill an image of {height} x {width}")
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
