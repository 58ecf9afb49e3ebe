"""Letterbox and its way back: whole pixels, no shift, nothing lost but resolution."""

import numpy as np
import pytest
import torch
from PIL import Image

from ris_bench.transforms import CLIP_MEAN, CLIP_STD, Letterbox, normalise, restore

# (height, width): square, odd, COCO's, smaller and larger than the square, and strips that nearly vanish.
SHAPES = [(128, 128), (416, 416), (427, 640), (640, 427), (333, 500), (97, 131), (60, 41), (1200, 801), (7, 5), (1, 1)]
STRIPS = [(1, 2000), (2000, 3), (5, 640), (480, 1)]
SIZES = [128, 224, 416]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height, width", SHAPES + STRIPS)
def test_the_content_is_whole_pixels_centred_and_in_proportion(height: int, width: int, size: int) -> None:
    frame = Letterbox(size).frame(height, width)
    assert all(type(value) is int for value in frame)
    assert (frame.height, frame.width, frame.size) == (height, width, size)
    assert max(frame.content_height, frame.content_width) == size
    assert min(frame.content_height, frame.content_width) >= 1
    bottom = size - frame.top - frame.content_height
    right = size - frame.left - frame.content_width
    assert frame.top >= 0 and frame.left >= 0 and 0 <= bottom - frame.top <= 1 and 0 <= right - frame.left <= 1
    scale = size / max(height, width)
    for content, side in ((frame.content_height, height), (frame.content_width, width)):
        assert abs(content - side * scale) <= 0.5 or content == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height, width", SHAPES + STRIPS)
def test_padding_and_content_of_image_and_mask(height: int, width: int, size: int) -> None:
    letterbox = Letterbox(size)
    frame = letterbox.frame(height, width)
    image = letterbox.image(Image.new("RGB", (width, height), (0, 0, 0)))
    mask = letterbox.mask(np.ones((height, width), np.uint8))
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((size, size), np.float32)
    expected = np.zeros((size, size), np.float32)
    expected[frame.top : frame.top + frame.content_height, frame.left : frame.left + frame.content_width] = 1
    np.testing.assert_array_equal(mask, expected)
    padding = image[expected == 0].reshape(-1, 3)
    assert (image[expected == 1] == 0).all()
    assert (np.abs(padding - 255 * np.array(CLIP_MEAN)) <= 0.5).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height, width", SHAPES + STRIPS)
def test_restore_puts_every_point_back_where_it_was(height: int, width: int, size: int) -> None:
    frame = Letterbox(size).frame(height, width)
    # Each pixel of the content holds the coordinate, in the image, of its own centre; the padding holds nonsense.
    row_H = (torch.arange(size) - frame.top + 0.5) * (height / frame.content_height) - 0.5
    column_W = (torch.arange(size) - frame.left + 0.5) * (width / frame.content_width) - 0.5
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[frame.content] = True
    for ramp_HW, side, content, wanted_HW in (
        (row_H[:, None].expand(size, size), height, frame.content_height, torch.arange(height)[:, None]),
        (column_W[None, :].expand(size, size), width, frame.content_width, torch.arange(width)[None, :]),
    ):
        restored_HW = restore(torch.where(inside, ramp_HW, 1e9)[None], frame)[0]
        assert restored_HW.shape == (height, width)
        # Beyond the outermost centres there is nothing to interpolate with: the value there is the centre's.
        reach = max(0.0, 0.5 * side / content - 0.5)
        wanted_HW = wanted_HW.double().clamp(reach, side - 1 - reach).expand(height, width)
        torch.testing.assert_close(restored_HW, wanted_HW, atol=1e-2, rtol=1e-5)


def test_nothing_changes_at_scale_one() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 128, 3), dtype=np.uint8)
    mask_HW = rng.integers(0, 2, (90, 128), dtype=np.uint8)
    letterbox = Letterbox(128)
    frame = letterbox.frame(90, 128)
    np.testing.assert_array_equal(letterbox.image(Image.fromarray(pixels))[frame.content], pixels)
    np.testing.assert_array_equal(restore(torch.from_numpy(letterbox.mask(mask_HW))[None], frame)[0].numpy(), mask_HW)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "height, width", [(427, 640), (640, 427), (333, 501), (97, 131), (61, 43), (1201, 799), (90, 640)]
)
def test_a_smooth_mask_survives_the_round_trip(height: int, width: int, size: int) -> None:
    y, x = np.mgrid[:height, :width]
    ellipse = ((y - 0.55 * height) / (0.33 * height)) ** 2 + ((x - 0.4 * width) / (0.27 * width)) ** 2 < 1
    letterbox = Letterbox(size)
    frame = letterbox.frame(height, width)
    mask_1HW = torch.from_numpy(letterbox.mask(ellipse.astype(np.uint8)))[None]
    restored = restore(mask_1HW, frame)[0].numpy() > 0.5
    iou = (restored & ellipse).sum() / (restored | ellipse).sum()
    # Resolution that was thrown away does not return: half a pixel of the square, all along the outline, is allowed.
    assert iou > (0.985 if min(frame.content_height, frame.content_width) > 50 else 0.93)


@pytest.mark.parametrize("height, width", [(427, 640), (97, 131), (1201, 799)])
def test_image_and_mask_are_not_shifted(height: int, width: int) -> None:
    """The centre of mass of a blob, seen through the frame, is where it was, to a fifth of a pixel of the square."""
    y, x = np.mgrid[:height, :width]
    blob = ((y - 0.4 * height) ** 2 + (x - 0.6 * width) ** 2 < (0.2 * min(height, width)) ** 2).astype(np.uint8)
    letterbox = Letterbox(224)
    frame = letterbox.frame(height, width)
    image = letterbox.image(Image.fromarray(blob[..., None].repeat(3, 2) * np.uint8(255)))[..., 0]
    for weight in (image, letterbox.mask(blob)):
        weight = weight[frame.content].astype(np.float64)
        rows, columns = np.mgrid[: frame.content_height, : frame.content_width] + 0.5
        row = (rows * weight).sum() / weight.sum() * height / frame.content_height - 0.5
        column = (columns * weight).sum() / weight.sum() * width / frame.content_width - 0.5
        tolerance = 0.2 * height / frame.content_height
        assert row == pytest.approx((y * blob).sum() / blob.sum(), abs=tolerance)
        assert column == pytest.approx((x * blob).sum() / blob.sum(), abs=tolerance)


def test_a_soft_mask_keeps_the_area_when_it_shrinks() -> None:
    stripes = np.zeros((400, 400), np.uint8)
    stripes[:, ::4] = 1  # Thinner than a pixel of the square: picking the nearest would keep all of them or none.
    mask = Letterbox(100).mask(stripes)
    assert mask.mean() == pytest.approx(0.25, abs=0.01)
    assert mask[50].min() > 0.1 and mask[50].max() < 0.4


def test_normalise() -> None:
    image_BHW3 = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    before = image_BHW3.clone()
    image_B3HW = normalise(image_BHW3)
    assert (image_B3HW.shape, image_B3HW.dtype) == ((2, 3, 4, 5), torch.float32)
    expected = (image_BHW3[1, 2, 3] / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(image_B3HW[1, :, 2, 3], expected)
    assert torch.equal(image_BHW3, before)
