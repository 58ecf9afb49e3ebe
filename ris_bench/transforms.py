"""Letterbox: an image of any shape centred in a square, and the exact way back to its own frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Frame(NamedTuple):
    """Where an image of (height, width) lies in a square of `size`: whole pixels, so cropping is exact."""

    height: int
    width: int
    top: int
    left: int
    content_height: int
    content_width: int
    size: int

    @property
    def content(self) -> tuple[slice, slice]:
        """Rows and columns of the square that the image fills."""
        return slice(self.top, self.top + self.content_height), slice(self.left, self.left + self.content_width)


@dataclass(frozen=True)
class Letterbox:
    """The longer side is brought to `size`, the shorter one in proportion (at least one pixel), the rest is padding."""

    size: int

    def frame(self, height: int, width: int) -> Frame:
        longer = max(height, width)
        content_height = max(1, round(height * self.size / longer))
        content_width = max(1, round(width * self.size / longer))
        top, left = (self.size - content_height) // 2, (self.size - content_width) // 2
        return Frame(height, width, top, left, content_height, content_width, self.size)

    def image(self, image: Image.Image) -> np.ndarray:
        """RGB -> (size, size, 3) uint8: bicubic, with CLIP's mean colour around it."""
        mean = np.rint(255 * np.array(CLIP_MEAN)).astype(np.uint8)
        return self._place(np.tile(mean, (self.size, self.size, 1)), image, Image.Resampling.BICUBIC)

    def mask(self, mask_HW: np.ndarray) -> np.ndarray:
        """{0, 1} -> (size, size) float32 in [0, 1]: the covered share of a pixel, up to 1/255; padding is zero."""
        square = np.zeros((self.size, self.size), dtype=np.uint8)
        square = self._place(square, Image.fromarray(mask_HW * np.uint8(255)), Image.Resampling.BILINEAR)
        return square.astype(np.float32) / 255

    def _place(self, square: np.ndarray, image: Image.Image, resampling: Image.Resampling) -> np.ndarray:
        frame = self.frame(image.height, image.width)
        square[frame.content] = image.resize((frame.content_width, frame.content_height), resampling)
        return square


def restore(logits_BHW: Tensor, frame: Frame) -> Tensor:
    """Maps of any resolution over the square -> (B, height, width) float64 in the frame of the image.

    Bilinear (align_corners=False) to the size of the square; the padding is cut off; bilinear to the image. All three
    are linear and separable, so that one matrix per axis does them at once, which on small images takes a fifth of the
    time. In float64, since a setting of TensorFloat-32 must not change a mask.
    """
    (_, h, w), device = logits_BHW.shape, logits_BHW.device
    down_Hh = _axis(h, frame.size, frame.top, frame.content_height, frame.height, device)
    across_Ww = _axis(w, frame.size, frame.left, frame.content_width, frame.width, device)
    return down_Hh @ (logits_BHW.double() @ across_Ww.T)


@lru_cache(maxsize=64)
def _axis(source: int, size: int, start: int, length: int, target: int, device: torch.device) -> Tensor:
    """(target, source): `source` points stretched over `size`, of which `length` after `start` fill `target`."""
    identity = torch.eye(source, dtype=torch.float64)[None]
    content = F.interpolate(identity, size, mode="linear", align_corners=False)[..., start : start + length]
    return F.interpolate(content, target, mode="linear", align_corners=False)[0].T.contiguous().to(device)


def normalise(image_BHW3: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) with CLIP's mean and standard deviation."""
    mean_311, std_311 = (255 * torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return image_BHW3.permute(0, 3, 1, 2).contiguous().float().sub_(mean_311).div_(std_311)
