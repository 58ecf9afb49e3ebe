"""What every data set offers: its splits, its samples, and what is known of both."""

from __future__ import annotations

import os
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ris_bench.data import index
from ris_bench.data.samples import Sample
from ris_bench.data.untrusted import missing_files, shown
from ris_bench.errors import UserError
from ris_bench.records import Choice
from ris_bench.registry import Registry

DATASETS = Registry("dataset", "ris_bench.data")

Leakage = Literal["forbid", "filter", "allow"]
"""What becomes of images to train on that an evaluated split holds too: an error, left out, or kept and marked."""


@dataclass(frozen=True)
class Counts:
    """How much a split holds; None is not published."""

    referents: int | None
    expressions: int | None
    images: int | None


@dataclass
class Part:
    """One split as its files have it."""

    image_folder: Path
    """All images lie in it or below."""
    samples: list[Sample] = field(default_factory=list)
    """Ordered by (ref_id, sentence_index)."""
    problems: list[str] = field(default_factory=list)
    """Why referents of the split could not become samples, a line for each."""


class Dataset(ABC):
    """A dataset with one of its partitions into splits."""

    name: str
    word_len: int
    """Tokens per expression, start and end included."""
    train_splits: tuple[str, ...]
    eval_splits: tuple[str, ...]
    leakage: Leakage = "forbid"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.train_splits + self.eval_splits))

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """What it is read from."""

    @abstractmethod
    def locate(self, data: Path) -> None:
        """Raise a UserError that names everything missing under `data`; quick, so that a sweep can ask first."""

    @abstractmethod
    def read(self, data: Path, split: str) -> list[Sample]:
        """Every expression of a split.

        Raises UserError for an unknown or empty split, a file that is missing or damaged, a pickle that holds more
        than plain data, a referent without annotation or image, and image files that are not there.
        """

    def require(self, split: str) -> None:
        """Raises UserError for a split that the dataset does not have."""
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}; its splits are {', '.join(self.splits)}")


class Source(Dataset):
    """A dataset with files of its own."""

    published: Mapping[str, Counts] = MappingProxyType({})
    """What its splits are known to hold."""
    get_images: str
    """What to do about images that are missing."""
    home: Path | None = None
    """Where its files lie if not in the data folder."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self,)

    @abstractmethod
    def is_there(self, data: Path) -> bool:
        """Whether `data` holds anything of it."""

    @abstractmethod
    def files(self, data: Path) -> list[Path]:
        """What `parse` reads, once `locate` has found it."""

    @abstractmethod
    def image_folder(self, data: Path) -> Path:
        """All images lie in it or below."""

    @abstractmethod
    def parse(self, data: Path) -> dict[str, Part]:
        """Every split that the files hold; the samples depend on these files and on the dataset's name alone.

        UserError where a file is damaged.
        """

    def scan(self, data: Path, split: str | None = None) -> dict[str, Part]:
        """Every split that the files hold, or only the one named. UserError where a file is missing or damaged."""
        self.locate(data)
        folder, key = self.image_folder(data), self._key(data)
        with index.uncollected():
            splits = index.load(self.name, key, folder, split)
            if splits is None:
                parts = self.parse(data)
                # Messages name paths, and files that have changed meanwhile would pass for those that were hashed.
                if any(part.problems for part in parts.values()) or self._key(data) != key:
                    return {name: part for name, part in parts.items() if split in (None, name)}
                splits = index.save(self.name, key, folder, {name: part.samples for name, part in parts.items()})
        return {name: Part(folder, samples) for name, samples in splits.items() if split in (None, name)}

    def _key(self, data: Path) -> str:
        return index.key(self.name, type(self), self.files(data))

    def read(self, data: Path, split: str) -> list[Sample]:
        """Every expression of a split, ordered by (ref_id, sentence_index); raises as `Dataset.read` says."""
        self.require(split)
        part = self.scan(data, split).get(split)
        if part is None or not (part.samples or part.problems):
            there = ", ".join(shown(name) for name in sorted(map(str, self.scan(data))))
            raise UserError(f"{self.name} has no referent in the split {split!r}; it has {there or 'none at all'}")
        if part.problems:
            raise UserError(part.problems[0])
        if missing := missing_files(part.image_folder, (sample.image_path for sample in part.samples)):
            names = [shown(os.path.relpath(path, part.image_folder)) for path in missing[:3]]
            some = ", ".join(names) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"{part.image_folder} lacks {len(missing)} of the images: {some}; {self.get_images}")
        return part.samples


def chosen(value: Any) -> Choice:
    """A dataset as an experiment writes it: a name, or {name: {option: value}}. UserError where there is none such."""
    if isinstance(value, str):
        value = {value: {}}
    if not (isinstance(value, Mapping) and len(value) == 1 and isinstance(options := [*value.values()][0], Mapping)):
        raise UserError(f"a dataset is {reprlib.repr(value)}; write a name, or {{name: {{option: value}}}}")
    [name] = value
    return DATASETS.resolve(name, options)


def named(value: Any) -> Dataset:
    """The dataset of what `chosen` reads."""
    return DATASETS.build(chosen(value))


def without_obligatory_options() -> list[str]:
    """Names that are a dataset by themselves."""
    return [name for name in DATASETS if all(o.default is not o.empty for o in DATASETS.options(name).values())]
