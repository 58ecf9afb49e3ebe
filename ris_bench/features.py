"""What the untouched steps of an image tower make of a training set's images: worked out once, kept on disk.

A trial whose method leaves the first stages of the image tower alone would compute the same states in every epoch, and
so would every other trial of that kind: they share these files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ris_bench.backbones.base import ImageTower, Known
from ris_bench.data.samples import Sample
from ris_bench.kept import Mapped, Room
from ris_bench.pixels import CHUNK, Images, chunks, named, one_per_image, state_of

FEWEST_STEPS = 2
"""To read what the stem makes would cost as much as to make it."""


@dataclass(frozen=True)
class _File:
    """One kept state of all images: rows of one size, after each other, nothing else."""

    shape: tuple[int, ...]
    """Of all rows, as they lie."""
    kept: torch.dtype
    given: torch.dtype
    order: tuple[int, ...]
    """The dimensions of the state as they lie in memory: a kernel that follows may sum in the order that it meets."""

    @classmethod
    def of(cls, state: Tensor, number: int, precision: torch.dtype | None) -> _File:
        order = (0, *sorted(range(1, state.dim()), key=state.stride, reverse=True))
        shape = (number, *state.permute(order).shape[1:])
        return cls(shape, precision if precision and state.dtype == torch.float32 else state.dtype, state.dtype, order)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.kept.itemsize

    def raw(self, state: Tensor) -> memoryview:
        return memoryview(state.permute(self.order).contiguous().cpu().to(self.kept).view(torch.uint8).numpy())

    def mapped(self, path: Path) -> Mapped:
        return Mapped(path, self.kept, self.shape)

    def rows(self, mapped: Mapped, row_B: Tensor) -> Tensor:
        rows = mapped.tensor.index_select(0, row_B).to(self.given)
        return rows.permute(tuple(map(self.order.index, range(len(self.order)))))


class FrozenFeatures:
    """Samples -> what is known of their images: a `Known` with a row for each of them, in the main memory."""

    def __init__(self, folder: Path, images: Sequence[Sample], files: Sequence[_File | None]) -> None:
        self._row = {sample.image_path: row for row, sample in enumerate(images)}
        self._files = files
        self._mapped = [file and file.mapped(folder / str(i)) for i, file in enumerate(files)]

    def __call__(self, samples: Sequence[Sample]) -> Known:
        row_B = torch.tensor([self._row[sample.image_path] for sample in samples])
        pairs = zip(self._files, self._mapped, strict=True)
        return Known(None, tuple(file and file.rows(mapped, row_B) for file, mapped in pairs))


def frozen_features(
    tower: ImageTower,
    samples: Sequence[Sample],
    pixels: Images,
    weights: Mapping[str, str],
    room: Room,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    precision: torch.dtype | None = None,
    num_workers: int = 0,
) -> FrozenFeatures | None:
    """The features of all images of the samples, made if they are not there; processes that want the same wait for it.

    None where they are of no use, as fewer than `FEWEST_STEPS` steps are untouched (none are if norm statistics move),
    or where there is no room. Raises UserError for a photo that is missing or damaged.

    Args:
        tower: on `device`, in evaluation mode.
        pixels: the images of samples as the tower takes them.
        weights: the sha256 of every file that the tower's weights came from.
        precision: as `ImageTower.known` has it.
    """
    if tower.untouched < FEWEST_STEPS or not (room and samples):
        return None
    images = one_per_image(samples)

    def states(pixels_B3HW: Tensor) -> tuple[Tensor | None, ...]:
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            return tower.known(pixels_B3HW.to(device), precision).following

    first = states(pixels(images[:CHUNK]))
    files = [None if state is None else _File.of(state, len(images), precision) for state in first]

    def raw(states: Sequence[Tensor | None]) -> dict[str, memoryview]:
        return {str(i): file.raw(states[i]) for i, file in enumerate(files) if file}

    def make() -> Iterator[Mapping[str, memoryview]]:
        for pixels_B3HW in chunks(images, pixels, num_workers):
            yield raw(states(pixels_B3HW))

    # The first features stand for all the rest that they depend on: code, size, precision, device and library, which
    # change the last bits at least.
    parts = [repr((sorted(weights.items()), files)).encode(), *raw(first).values(), *state_of(images)]
    size = sum(file.bytes for file in files if file)
    folder = room.get(named("features", parts), f"frozen features of {len(images):,} images", size, make)
    return folder and FrozenFeatures(folder, images, files)
