"""What a score can hide: images that are both trained on and evaluated, ground truths on which the released evaluations
differ, and expressions that are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask
from tabulate import tabulate

from ris_bench.data.dataset import Leakage, Source, named, without_obligatory_options
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.loading import Tokenizer


def separate(training: Sequence[Sample], evaluated: Mapping[str, Sequence[Sample]], leakage: Leakage) -> list[Sample]:
    """The samples to train on: without those of images in `evaluated`, by split, where `leakage` is "filter".

    Raises UserError where there are such and it is "forbid", or where none are left.
    """
    own = _images(training)
    shared = own & _images(sample for samples in evaluated.values() for sample in samples)
    if not shared or leakage == "allow":
        return list(training)
    if leakage == "forbid":
        where = ", ".join(split for split, samples in evaluated.items() if _images(samples) & shared)
        raise UserError(
            f"{len(shared):,} of the {len(own):,} images to train on are evaluated too, in {where}; give the dataset "
            "the option leakage: filter, to train without them, or allow, as the papers do, which marks the scores"
        )
    kept = [sample for sample in training if sample.image_path not in shared]
    if not kept:
        raise UserError(f"all {len(own):,} images to train on are evaluated too; train on another split")
    return kept


@dataclass(frozen=True)
class Overlap:
    """Images that one split is to be trained on with and another evaluated with."""

    training: str
    """DATASET SPLIT."""
    evaluated: str
    images: int
    of: int
    """Images of the evaluated split."""


@dataclass(frozen=True)
class Split:
    """What of a split depends on rules that no table states."""

    name: str
    """DATASET SPLIT."""
    referents: int
    holes: int
    """Referents with pixels in several of their polygons: LAVT, CGFormer and LISA take these for background (PROTOCOLS,
    `truth`), CRIS and we for the referent."""
    expressions: int
    cut: int
    """Expressions that are longer than the dataset's `word_len`, whose end no model sees."""


def present(data: Path) -> list[Source]:
    """Every source without obligatory options whose files are in `data`; UserError where there is none."""
    names = without_obligatory_options()
    found = [source for name in names for source in named(name).sources if not source.home and source.is_there(data)]
    if not found:
        raise UserError(f"{Path(data).resolve()} holds none of {', '.join(names)}; give --data DIR")
    return found


def audit(sources: Iterable[Source], data: Path) -> tuple[list[Overlap], list[Split]]:
    """Every pair of a training and an evaluated split that share images, and every split by itself.

    Raises UserError where files are missing or damaged; `check` says more about those.
    """
    images: dict[str, dict[str, set[Path]]] = {"training": {}, "evaluated": {}}
    splits = []
    for source in sources:
        parts = source.scan(source.home or data)
        for split in (split for split in source.splits if split in parts):
            name, samples = f"{source.name} {split}", parts[split].samples
            for use, of_use in (("training", source.train_splits), ("evaluated", source.eval_splits)):
                if split in of_use:
                    images[use][name] = _images(samples)
            splits.append(_split(name, samples, source.word_len))
    overlaps = [
        Overlap(training, evaluated, len(shared), len(held))
        for training, own in images["training"].items()
        for evaluated, held in images["evaluated"].items()
        if training != evaluated and (shared := own & held)
    ]
    return overlaps, splits


def text(overlaps: Sequence[Overlap], splits: Sequence[Split]) -> str:
    """Two tables: what leaks, and what depends on rules."""
    leaks = [(o.training, o.evaluated, f"{o.images:,} of {o.of:,} ({o.images / o.of:.1%})") for o in overlaps]
    rules = [
        (s.name, f"{s.holes:,} of {s.referents:,}", f"{s.cut:,} of {s.expressions:,}") for s in splits if s.referents
    ]
    left = tabulate(leaks, ("Trained on", "Evaluated on", "Images of the latter"), colalign=("left", "left", "right"))
    right = tabulate(
        rules,
        ("Split", "Ground truths that differ between union and hole", "Expressions cut"),
        colalign=("left", "right", "right"),
    )
    return f"{left if leaks else 'No training split shares an image with an evaluated one.'}\n\n{right}"


def to_dict(overlaps: Sequence[Overlap], splits: Sequence[Split]) -> dict[str, Any]:
    """The same for machines."""
    return {"overlaps": [asdict(each) for each in overlaps], "splits": [asdict(each) for each in splits]}


def _images(samples: Iterable[Sample]) -> set[Path]:
    return {sample.image_path for sample in samples}


def _split(name: str, samples: Sequence[Sample], word_len: int) -> Split:
    referents = {sample.ref_id: sample for sample in samples}.values()
    # With room for one token more, a row is full where the expression is too long.
    tokens_NL = Tokenizer(word_len + 1)([sample.expression for sample in samples])
    return Split(
        name,
        len(referents),
        sum(_has_hole(sample) for sample in referents),
        len(samples),
        int((tokens_NL[:, -1] != 0).sum()),
    )


def _has_hole(sample: Sample) -> bool:
    if isinstance(sample.segmentation, Mapping) or len(sample.segmentation) < 2:
        return False
    parts = [replace(sample, segmentation=[part]).rle() for part in sample.segmentation]
    return int(sum(coco_mask.area(part) for part in parts)) != int(coco_mask.area(sample.rle()))
