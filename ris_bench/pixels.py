"""Letterboxed photos and masks as a model takes them: from their files, or from what all trials of a machine share."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ris_bench.data.samples import Sample, referents
from ris_bench.errors import UserError
from ris_bench.kept import Mapped, Room
from ris_bench.transforms import Letterbox, normalise

CHUNK = 32
"""Photos or masks that are worked out at once."""
WITNESSES = 4
"""Photos or masks of which the pixels take part in a name: they stand for code and library."""


class Images:
    """Samples -> their photos (B, 3, S, S), float32, normalised."""

    def __init__(self, size: int) -> None:
        self._letterbox = Letterbox(size)
        self._row: dict[Any, int] = {}
        self._kept: Mapped | None = None

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        if self._kept is None:
            pixels_B3SS = self._read(samples)
        else:
            pixels_B3SS = self._kept.tensor.index_select(0, torch.tensor([self._row[s.image_path] for s in samples]))
        return normalise(pixels_B3SS.permute(0, 2, 3, 1))

    def keep(self, samples: Sequence[Sample], room: Room, num_workers: int = 0) -> None:
        """From now on give the photos of these samples alone, from the disk, where there is room.

        Raises UserError for a photo that is missing or damaged.
        """
        if not (room and samples):
            return
        images, side = one_per_image(samples), self._letterbox.size
        name = named("images", chain([self._read(images[:WITNESSES]).numpy()], state_of(images)))

        def make() -> Iterator[Mapping[str, memoryview]]:
            for pixels_B3SS in chunks(images, self._read, num_workers):
                yield {"images": memoryview(pixels_B3SS.numpy())}

        shape = (len(images), 3, side, side)
        if folder := room.get(name, f"letterboxed images of {len(images):,} photos", math.prod(shape), make):
            self._row = {sample.image_path: row for row, sample in enumerate(images)}
            self._kept = Mapped(folder / "images", torch.uint8, shape)

    def _read(self, samples: Sequence[Sample]) -> Tensor:
        """(B, 3, S, S) uint8, of which each channel lies by itself, as it is asked for."""
        pixels_BSS3 = np.stack([self._letterbox.image(sample.image()) for sample in samples])
        return torch.from_numpy(np.ascontiguousarray(pixels_BSS3.transpose(0, 3, 1, 2)))


class _Runs(NamedTuple):
    """Masks, one after the other, as runs of one value.

    At 416 pixels these are a twenty-fifth of the bytes, and are read in a third of the time.
    """

    values: Tensor
    """uint8."""
    lengths: Tensor
    """int32."""
    ends: Tensor
    """int64, where the runs of each mask end."""

    @classmethod
    def of(cls, mask_BSS: np.ndarray) -> _Runs:
        values, lengths, numbers = [], [], []
        for flat in mask_BSS.reshape(len(mask_BSS), -1):
            starts = np.concatenate([[0], 1 + np.flatnonzero(flat[1:] != flat[:-1])])
            values.append(flat[starts])
            lengths.append(np.diff(starts, append=flat.size))
            numbers.append(len(starts))
        runs = np.concatenate(values), np.concatenate(lengths).astype(np.int32), np.cumsum(numbers)
        return cls(*map(torch.from_numpy, runs))

    def raw(self, before: int = 0) -> dict[str, memoryview]:
        """The files, or, where there are runs `before`, what comes next in them."""
        return {name: memoryview(t.numpy()) for name, t in self._replace(ends=self.ends + before)._asdict().items()}

    @classmethod
    def mapped(cls, folder: Path, masks: int) -> tuple[Mapped, Mapped, Mapped]:
        ends = Mapped(folder / "ends", torch.int64, (masks,))
        number = (int(ends.tensor[-1]),)
        return Mapped(folder / "values", torch.uint8, number), Mapped(folder / "lengths", torch.int32, number), ends


class Masks:
    """Samples -> their masks (B, 1, S, S), float32 in [0, 1]."""

    def __init__(self, size: int) -> None:
        self._letterbox = Letterbox(size)
        self._row: dict[tuple[str, int], int] = {}
        self._kept: tuple[Mapped, Mapped, Mapped] | None = None

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        mask_BSS = (self._read if self._kept is None else self._unpacked)(samples)
        return torch.from_numpy(mask_BSS)[:, None].float().div_(255)

    def keep(self, samples: Sequence[Sample], room: Room, num_workers: int = 0) -> None:
        """From now on give the masks of these samples alone, from the disk, where there is room.

        Raises UserError for a malformed segmentation.
        """
        if not (room and samples):
            return
        firsts = [samples[positions[0]] for positions in referents(samples)]
        few = self._runs(firsts[:WITNESSES]).raw()
        outlines = (repr((one.height, one.width, one.segmentation)).encode() for one in firsts)
        expected = sum(raw.nbytes for raw in few.values()) * len(firsts) // len(firsts[:WITNESSES])

        def make() -> Iterator[Mapping[str, memoryview]]:
            before = 0
            for runs in chunks(firsts, self._runs, num_workers):
                yield runs.raw(before)
                before += len(runs.values)

        name = named("masks", chain(few.values(), outlines))
        if folder := room.get(name, f"letterboxed masks of {len(firsts):,} referents", expected, make):
            self._row = {sample.referent: row for row, sample in enumerate(firsts)}
            self._kept = _Runs.mapped(folder, len(firsts))

    def _read(self, samples: Sequence[Sample]) -> np.ndarray:
        """(B, S, S) uint8."""
        return np.stack([np.rint(255 * self._letterbox.mask(sample.mask())).astype(np.uint8) for sample in samples])

    def _runs(self, samples: Sequence[Sample]) -> _Runs:
        return _Runs.of(self._read(samples))

    def _unpacked(self, samples: Sequence[Sample]) -> np.ndarray:
        """What `_read` gave."""
        values, lengths, ends = (mapped.tensor.numpy() for mapped in self._kept)
        rows = [self._row[sample.referent] for sample in samples]
        runs = [slice(ends[row - 1] if row else 0, ends[row]) for row in rows]
        flat = np.repeat(*(np.concatenate([file[run] for run in runs]) for file in (values, lengths)))
        return flat.reshape(len(rows), self._letterbox.size, self._letterbox.size)


def one_per_image(samples: Iterable[Sample]) -> list[Sample]:
    """One sample for each image, in the order of first appearance."""
    return list({sample.image_path: sample for sample in samples}.values())


def state_of(images: Iterable[Sample]) -> Iterator[bytes]:
    """What tells that a photo was exchanged; UserError for one that is missing."""
    for sample in images:
        try:
            stat = os.stat(sample.image_path)
        except OSError as error:
            raise UserError(f"{sample.image_path} cannot be read ({error.strerror}); download it again") from error
        yield repr((str(sample.image_path.absolute()), stat.st_size, stat.st_mtime_ns)).encode()


def named(kind: str, parts: Iterable[bytes | memoryview]) -> str:
    """A name for what depends on these parts alone."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())  # where one ends and the next begins is told apart
    return f"{kind}-{digest.hexdigest()[:16]}"


def chunks(samples: Sequence[Sample], make: Callable[[Sequence[Sample]], Any], num_workers: int) -> Iterator[Any]:
    """What is made of `CHUNK` samples each."""
    return in_order(_Made(samples, make), num_workers)


def in_order(items: Dataset, num_workers: int) -> Iterator[Any]:
    """The items of a dataset, each worked out by one of so many processes, or by this one if there are none."""
    # Its own generator: DataLoader would draw from torch's, and with it shift every dropout mask that follows.
    generator = torch.Generator()
    # From pinned memory a GPU copies for itself, without this process.
    pinned = num_workers > 0 and torch.cuda.is_available()
    loader = DataLoader(_Told(items), batch_size=None, num_workers=num_workers, generator=generator, pin_memory=pinned)
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


class _Made(Dataset):
    def __init__(self, samples: Sequence[Sample], make: Callable[[Sequence[Sample]], Any]) -> None:
        self._samples, self._make = samples, make

    def __len__(self) -> int:
        return -(-len(self._samples) // CHUNK)

    def __getitem__(self, number: int) -> Any:
        return self._make(self._samples[number * CHUNK : (number + 1) * CHUNK])


class _Told(Dataset):
    """The items, or the UserError that they met: raised in another process it would come wrapped in a traceback."""

    def __init__(self, items: Dataset) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._items[number]
        except UserError as error:
            return error
