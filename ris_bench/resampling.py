"""Maps and masks brought into the frame in which a protocol compares them, as the code that it stands for does it.

Every step (an interpolation, a letterbox undone) is linear and acts on rows and columns alike, so that each axis has
one matrix, and a map costs two products with matrices that are nearly empty.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ris_bench.predictions import Maps
from ris_bench.protocols import Geometry, Resize
from ris_bench.transforms import Letterbox

Values = Literal["logit", "probability"]

_LEAST = 1e-7  # A probability of 0 or 1 has no finite logit.


def cut(
    map_hw: np.ndarray,
    maps: Maps,
    image: tuple[int, int],
    frame: tuple[int, int],
    upsample: Resize,
    restore: Resize,
    threshold: float,
) -> np.ndarray:
    """The mask that a protocol makes of a map: bool (frame width, frame height), by columns.

    Args:
        map_hw: logits or probabilities over the network's input, of any resolution.
        maps: what they are and how the image lies in that input.
        image, frame: (height, width) of the image, and that in which masks are compared, stretched over the image.
        upsample, restore, threshold: as `Protocol` has them.
    """
    map_hw = converted(map_hw, maps.values, upsample.of)
    lies = (maps.geometry, maps.size, image, frame, restore)
    if upsample.of == restore.of:
        rows, columns = (_both(axis, source, upsample, *lies) for axis, source in enumerate(map_hw.shape))
    else:
        rows, columns = (_upsampling(source, maps.size, upsample) for source in map_hw.shape)
        map_hw = converted(rows(columns(map_hw.T).T), upsample.of, restore.of)
        rows, columns = (_restoration(axis, *lies) for axis in (0, 1))
    found_WH = columns(rows(map_hw).T)
    return found_WH > np.float32(threshold if restore.of == "probability" else math.log(threshold / (1 - threshold)))


def nearest(mask_WH: np.ndarray, size: int, library: str) -> np.ndarray:
    """A mask by columns -> (size, size), by the nearest neighbour of Pillow ("pillow") or of OpenCV ("opencv")."""
    columns, rows = (_nearest(source, size, library) for source in mask_WH.shape)
    return mask_WH[columns][:, rows]


@lru_cache(maxsize=4096)
def _nearest(source: int, target: int, library: str) -> np.ndarray:
    if library == "opencv":  # imgproc/src/resize.cpp: the upper left corner of a pixel
        return np.minimum(np.arange(target) * source // target, source - 1)
    positions = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    return np.asarray(positions.resize((target, 1), Image.Resampling.NEAREST))[0]


def converted(values: np.ndarray, given: Values, wanted: Values) -> np.ndarray:
    """Logits or probabilities as either of them, float32."""
    values = values.astype(np.float32, copy=False)
    if wanted == given:
        return values
    if wanted == "probability":
        return 0.5 * (1 + np.tanh(0.5 * values))  # the sigmoid, which never overflows in this form
    values = np.clip(values, _LEAST, 1 - _LEAST)
    return np.log(values) - np.log1p(-values)


class _Line(NamedTuple):
    """One axis of an image in the square: pixel x of the image lies at scale * x + start there."""

    scale: float
    start: float
    first: int
    last: int
    """The pixels of the square that the image fills; beyond them its border is repeated."""


def _line(axis: int, geometry: Geometry, size: int, image: tuple[int, int], target: int, corners: bool) -> _Line:
    """For an image that is stretched to `target` pixels along the axis; with `corners`, outermost pixels coincide."""
    length, longer = image[axis], max(image)
    scale = size / longer
    if geometry == "letterbox-exact":
        content, offset = length * scale, (size - length * scale) / 2
        if not corners:  # CRIS maps pixel indices, not the centres of pixels (utils/dataset.py:193-208)
            step = length / target
            return _Line(scale * step, scale * (step - 1) / 2 + offset, 0, size - 1)
        return _Line((content - 1) / max(target - 1, 1), offset, 0, size - 1)
    if geometry == "letterbox":
        frame = Letterbox(size).frame(*image)
        content = (frame.content_height, frame.content_width)[axis]
        offset = (frame.top, frame.left)[axis]
    elif geometry == "letterbox-floor":  # VLT callbacks/eval.py:106-113
        content = max(1, int(length * scale))
        offset = (size - content) // 2
    elif geometry == "longest-side":  # SAM utils/transforms.py, get_preprocess_shape
        content, offset = max(1, int(length * scale + 0.5)), 0
    else:
        content, offset = size, 0
    if corners:
        return _Line((content - 1) / max(target - 1, 1), offset, offset, offset + content - 1)
    return _Line(content / target, offset + (content / target - 1) / 2, offset, offset + content - 1)


class _Banded:
    """A matrix (targets, source) of which every row has a few weights side by side: an interpolation along an axis.

    Rows are taken `BLOCK` at a time with the columns that any of them has weights in. That is a twentieth of the
    products of the whole matrix, and each is so small that BLAS does not start threads for it, which under load wait
    longer for each other than they work.
    """

    BLOCK = 16

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        targets, source = matrix.shape
        padded = np.pad(matrix, ((0, -targets % self.BLOCK), (0, 0))).reshape(-1, self.BLOCK, source)
        used = (padded != 0).any(axis=1)
        first = used.argmax(axis=1)
        width = max(1, int((source - used[:, ::-1].argmax(axis=1) - first)[used.any(axis=1)].max(initial=1)))
        self._columns = np.minimum(first, source - width)[:, None] + np.arange(width)
        self._blocks = np.take_along_axis(padded, self._columns[:, None], axis=2)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(source, any) -> (targets, any)."""
        found = self._blocks @ values[self._columns]
        return found.reshape(-1, values.shape[1])[: len(self.matrix)]


@lru_cache(maxsize=256)
def _upsampling(source: int, size: int, resize: Resize) -> _Banded:
    """(size, source) float32."""
    line = _line(0, "stretch", source, (source, source), size, resize.align_corners)
    return _Banded(_taps(line.scale * np.arange(size) + line.start, source, resize, line))


@lru_cache(maxsize=1024)
def _restoration(
    axis: int, geometry: Geometry, size: int, image: tuple[int, int], frame: tuple[int, int], resize: Resize
) -> _Banded:
    """(frame's side, size) float32."""
    line = _line(axis, geometry, size, image, frame[axis], resize.align_corners)
    positions = line.scale * np.arange(frame[axis]) + line.start
    if resize.warp:
        # imgproc/src/imgwarp.cpp, warpAffine: in 1/1024 pixel, of which 1/32 are kept.
        steps = np.rint(1024 * line.scale * np.arange(frame[axis])) + np.rint(1024 * line.start) + 16
        positions = np.floor(steps / 32) / 32
    return _Banded(_taps(positions, size, resize, line))


@lru_cache(maxsize=1024)
def _both(
    axis: int,
    source: int,
    upsample: Resize,
    geometry: Geometry,
    size: int,
    image: tuple[int, int],
    frame: tuple[int, int],
    restore: Resize,
) -> _Banded:
    """(frame's side, source) float32: one interpolation after the other."""
    return _Banded(
        _restoration(axis, geometry, size, image, frame, restore).matrix @ _upsampling(source, size, upsample).matrix
    )


def _taps(positions: np.ndarray, source: int, resize: Resize, line: _Line) -> np.ndarray:
    """(targets, source) float32: the weights with which the pixels around a position are summed."""
    base = np.floor(positions)
    t = positions - base
    if resize.kernel == "bilinear":
        weights = {0: 1 - t, 1: t}
    else:
        a = -0.75

        def outer(x: np.ndarray) -> np.ndarray:  # 1 to 2 pixels away
            return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

        def inner(x: np.ndarray) -> np.ndarray:
            return ((a + 2) * x - (a + 3)) * x * x + 1

        weights = {-1: outer(t + 1), 0: inner(t), 1: inner(1 - t), 2: outer(2 - t)}
    matrix = np.zeros((len(positions), source), dtype=np.float32)
    targets = np.arange(len(positions))
    for offset, weight in weights.items():
        pixels = base.astype(int) + offset
        if resize.warp:  # zeros all around the square
            weight = np.where((pixels >= 0) & (pixels < source), weight, 0)
            pixels = np.clip(pixels, 0, source - 1)
        else:
            pixels = np.clip(pixels, line.first, line.last)
        np.add.at(matrix, (targets, pixels), weight)
    return matrix
