"""What the untouched steps of an image tower make of a training set's images: worked out once, kept on disk.

A trial whose method leaves the first stages of the image tower alone would compute the same states in every epoch, and
so would every other trial of that kind: they share these files. A folder is named after all that its numbers depend on,
has that name only when it is complete, and gives way, the one used longest ago first, when the room is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from ris_bench.backbones.base import ImageTower, Known
from ris_bench.data.samples import Sample

BATCH_SIZE = 32
"""Images per forward pass."""
FEWEST_STEPS = 2
"""To read what the stem makes would cost as much as to make it."""


class Room(NamedTuple):
    """Where features lie, and how many bytes of them at most: with 0 there are none."""

    folder: Path
    bytes: int


@dataclass(frozen=True)
class _File:
    """One kept state of all images: rows of one size, after each other, nothing else."""

    shape: tuple[int, ...]
    """Of all rows, as they lie."""
    dtype: str
    order: tuple[int, ...]
    """The dimensions of the state as they lie in memory: a kernel that follows may sum in the order that it meets."""

    @classmethod
    def of(cls, state: Tensor, number: int) -> _File:
        order = (0, *sorted(range(1, state.dim()), key=state.stride, reverse=True))
        shape = (number, *state.permute(order).shape[1:])
        return cls(shape, str(state.dtype).removeprefix("torch."), order)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def raw(self, state: Tensor) -> memoryview:
        return memoryview(state.permute(self.order).contiguous().cpu().view(torch.uint8).numpy())

    def mapped(self, path: Path) -> Tensor:
        dtype = getattr(torch, self.dtype)
        return torch.from_file(str(path), shared=False, size=math.prod(self.shape), dtype=dtype).view(self.shape)

    def rows(self, mapped: Tensor, row_B: Tensor) -> Tensor:
        return mapped[row_B].permute(tuple(map(self.order.index, range(len(self.order)))))


class FrozenFeatures:
    """Samples -> what is known of their images: a `Known` with a row for each of them, in the main memory."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        self._row = {sample.image_path: row for row, sample in enumerate(_images(samples))}
        described = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        self._files = [None if file is None else _File(**file) for file in described]
        # At once: what is mapped stays, even if the folder has to give way.
        self._mapped = [file and file.mapped(folder / str(i)) for i, file in enumerate(self._files)]

    def __call__(self, samples: Sequence[Sample]) -> Known:
        row_B = torch.tensor([self._row[sample.image_path] for sample in samples])
        pairs = zip(self._files, self._mapped, strict=True)
        return Known(None, tuple(file and file.rows(mapped, row_B) for file, mapped in pairs))


def frozen_features(
    tower: ImageTower,
    samples: Sequence[Sample],
    pixels: Callable[[Sequence[Sample]], Tensor],
    weights: Mapping[str, str],
    room: Room,
    *,
    device: torch.device,
    autocast: torch.dtype | None,
    log: Callable[[str], None],
    report: Callable[[], None] = lambda: None,
) -> FrozenFeatures | None:
    """The features of all images of the samples, made if they are not there; processes that want the same wait for it.

    None where they are of no use: fewer than `FEWEST_STEPS` steps are untouched (none are if norm statistics move), or,
    and this is said, there is no room on the disk or in what is allowed.

    Args:
        tower: on `device`, in evaluation mode.
        pixels: the images of samples as the tower takes them, (B, 3, H, W).
        weights: the sha256 of every file that the tower's weights came from.
        log: is told in a line what was found, made or left.
        report: called now and then while it works.
    """
    if tower.untouched < FEWEST_STEPS or not room.bytes:
        return None
    images = _images(samples)

    def known(start: int) -> tuple[Tensor | None, ...]:
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            return tower.known(pixels(images[start : start + BATCH_SIZE]).to(device)).following

    first = known(0)
    files = [None if state is None else _File.of(state, len(images)) for state in first]
    size = sum(file.bytes for file in files if file)
    folder = room.folder / _name(images, weights, files, first)
    room.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(room.folder / f"{folder.name}.lock"):
        if not folder.is_dir():
            try:
                _make_room(room, size)
                _write(folder, files, (known(start) for start in range(0, len(images), BATCH_SIZE)), report)
            except OSError as error:
                log(f"no frozen features are kept ({error}): every epoch works them out anew")
                return None
            log(f"frozen features of {len(images)} images, {size:,} bytes, kept in {folder}")
        os.utime(folder)  # used last
        return FrozenFeatures(folder, samples)


def _images(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each image."""
    return list({sample.image_path: sample for sample in samples}.values())


def _name(
    images: Sequence[Sample],
    weights: Mapping[str, str],
    files: Sequence[_File | None],
    first: Sequence[Tensor | None],
) -> str:
    """From the files that weights and pixels come from, and from what the first images give here and now.

    The latter stands for all the rest: code, size, precision, device and library, which change the last bits at least.
    """
    digest = hashlib.sha256()
    for sample in images:
        stat = os.stat(sample.image_path)
        digest.update(repr((str(sample.image_path.absolute()), stat.st_size, stat.st_mtime_ns)).encode())
    digest.update(repr((sorted(weights.items()), files)).encode())
    for file, state in zip(files, first, strict=True):
        digest.update(file.raw(state) if file else b"")
    return f"features-{digest.hexdigest()[:16]}"


def _make_room(room: Room, size: int) -> None:
    """Throw out what was used longest ago until `size` more bytes fit; OSError if they never do."""
    if size > room.bytes:
        raise OSError(f"they take {size:,} bytes, and {room.bytes:,} are allowed")
    with FileLock(room.folder / "room.lock"):
        kept = {folder: folder.stat().st_mtime for folder in room.folder.glob("features-*") if folder.is_dir()}
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in kept}
        free = shutil.disk_usage(room.folder).free
        if size > free + sum(sizes.values()):
            raise OSError(f"they take {size:,} bytes, and the disk of {room.folder} has {free:,}")
        for folder in sorted(kept, key=kept.get):
            if sum(sizes.values()) + size <= room.bytes and size <= shutil.disk_usage(room.folder).free:
                break
            shutil.rmtree(folder)
            del sizes[folder]


def _write(
    folder: Path, files: Sequence[_File | None], batches: Iterable[Sequence[Tensor | None]], report: Callable[[], None]
) -> None:
    """Whole or not at all."""
    for remains in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed: this one holds the lock
        shutil.rmtree(remains, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        with ExitStack() as stack:
            opened = [file and stack.enter_context(open(temporary / str(i), "wb")) for i, file in enumerate(files)]
            for states in batches:
                for file, out, state in zip(files, opened, states, strict=True):
                    if file:
                        out.write(file.raw(state))
                report()
        described = [file and vars(file) for file in files]
        (temporary / "files.json").write_text(json.dumps(described), encoding="utf-8")
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
