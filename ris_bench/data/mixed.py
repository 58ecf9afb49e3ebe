"""Several data sets as one: trained on together, and scored each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ris_bench.data.dataset import DATASETS, Dataset, Leakage, Source, chosen
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError


class Mixed(Dataset):
    """The parts side by side. A sample keeps the name of its own dataset, which its ids belong to.

    Its splits are `train` and `val`, of all parts together, and SPLIT/PART of each by itself: `testA/refcoco`. One part
    trains on images that another evaluates on; the released code leaves them in (DETRIS tools/mix.py:35-70), which is
    `leakage: allow`.
    """

    name = "mixed"
    train_splits = ("train",)

    def __init__(self, parts: Sequence[Source], leakage: Leakage) -> None:
        self._parts, self.leakage = tuple(parts), leakage
        self.word_len = max(part.word_len for part in parts)
        together = ("val",) if any("val" in part.splits for part in parts) else ()
        self.eval_splits = together + tuple(f"{split}/{part.name}" for part in parts for split in part.eval_splits)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self._parts

    def locate(self, data: Path) -> None:
        for part in self._parts:
            part.locate(data)

    def read(self, data: Path, split: str) -> list[Sample]:
        """Every expression of a split, part by part in their order; raises as `Dataset.read` says."""
        self.require(split)
        own, _, name = split.partition("/")
        parts = [part for part in self._parts if name in ("", part.name) and own in part.splits]
        return [sample for part in parts for sample in part.read(data, own)]


@DATASETS("mixed")
def mixed(*, parts: tuple[str | dict[str, dict[str, Any]], ...], leakage: Leakage = "forbid") -> Dataset:
    """Several data sets at once, written as `dataset` is: `mixed: {parts: [refcoco, refcoco+, refcocog-umd]}`."""
    choices = [chosen(part) for part in parts]
    for choice in choices:
        if choice.code is not None:  # it would be no part of what identifies the trial
            raise UserError(f"dataset 'mixed' cannot have the part {choice.name}, which a plug-in made; mix it there")
    datasets = [DATASETS.build(choice) for choice in choices]
    names = [dataset.name for dataset in datasets]
    if len(datasets) < 2 or len(set(names)) < len(names):
        raise UserError(f"dataset 'mixed' has the parts {', '.join(names) or 'none'}; name two or more, each once")
    for dataset in datasets:
        if not isinstance(dataset, Source):
            raise UserError(f"dataset 'mixed' cannot have the part {dataset.name}, which is none with files of its own")
    return Mixed(datasets, leakage)
