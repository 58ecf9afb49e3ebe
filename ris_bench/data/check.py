"""Whether the files of a dataset are what they should be: split by split, in full, without stopping at the first fault.

What `read` refuses is counted here. Of images only the headers are read, and masks are made as run lengths only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask
from tabulate import tabulate

from ris_bench.data.dataset import Counts, Dataset, Part, Source, named, without_obligatory_options
from ris_bench.data.untrusted import missing_files, shown
from ris_bench.errors import UserError

SHOWN = 3
"""Messages of a kind that are told."""

NOTHING, UNPUBLISHED = Counts(0, 0, 0), Counts(None, None, None)
OK, UNUSED, ABSENT = "ok", "not used", "not there"
DIFFERS = "differs from published"


@dataclass(frozen=True)
class Faults:
    """What is wrong with a split, a message for each case."""

    bad_files: Sequence[str] = ()
    """They are damaged or have another layout, so that no split could be looked at."""
    bad_referents: Sequence[str] = ()
    """They point to an annotation or image that is not there, are there twice, or are no text."""
    missing_images: Sequence[str] = ()
    """Of which there is no file."""
    bad_images: Sequence[str] = ()
    """Their headers cannot be read, or say another size than the annotation."""
    bad_masks: Sequence[str] = ()
    """Polygons or run lengths are malformed."""

    def items(self) -> list[tuple[str, Sequence[str]]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]


@dataclass(frozen=True)
class Row:
    """One split of a dataset, as it was found."""

    dataset: str
    split: str
    counts: Counts = NOTHING
    """Of what can be used."""
    published: Counts | None = None
    """None where nothing is published of the split."""
    faults: Faults = Faults()
    empty_masks: int = 0
    """Referents whose annotations cover no pixel: outside the image, or thinner than a pixel. They count."""
    remark: str = ""
    """Why it was not looked at."""

    @property
    def differs(self) -> bool:
        """From what is published; what is not cannot differ."""
        pairs = zip(astuple(self.counts), astuple(self.published), strict=True) if self.published else ()
        return any(there is not None and found != there for found, there in pairs)

    @property
    def verdict(self) -> str:
        found = [DIFFERS] if self.differs else []
        found += [f"{kind.replace('_', ' ')}: {len(messages):,}" for kind, messages in self.faults.items() if messages]
        return self.remark or ", ".join(found) or OK

    @property
    def ok(self) -> bool:
        return self.verdict in (OK, UNUSED, ABSENT)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            "counts": asdict(self.counts),
            "published": self.published and asdict(self.published),
            "faults": {kind: {"count": len(m), "first": list(m[:SHOWN])} for kind, m in self.faults.items()},
            "empty_masks": self.empty_masks,
            "verdict": self.verdict,
            "ok": self.ok,
        }


def check(dataset: Dataset, data: Path) -> list[Row]:
    """A row for every split of the dataset, or of each dataset that it is mixed of; UserError where files are missing.

    A file that is damaged makes one row of the whole dataset. A split of the file that the dataset does not use makes
    a row too, but is only counted.
    """
    return [row for source in dataset.sources for row in _check(source, source.home or data)]


def check_all(data: Path) -> list[Row]:
    """The same for every dataset without obligatory options; UserError where `data` holds none of them."""
    rows, found = [], False
    for name in without_obligatory_options():
        dataset = named(name)
        if all(source.is_there(data) for source in dataset.sources):
            found = True
            rows += check(dataset, data)
        else:
            rows.append(Row(name, "-", remark=ABSENT))
    if not found:
        raise UserError(
            f"{Path(data).resolve()} holds none of {', '.join(row.dataset for row in rows)}; give --data DIR"
        )
    return rows


def text(rows: Sequence[Row]) -> str:
    """A table with a line per split and its verdict, and below it the first messages about what is wrong."""
    headers = ("Dataset", "Split", "Referents", "Expressions", "Images", "Verdict")
    table = [(row.dataset, shown(row.split), *_counts(row), row.verdict) for row in rows]
    lines = [tabulate(table, headers, disable_numparse=True, colalign=("left", "left", *["right"] * 3, "left")), ""]
    for row in rows:
        where = f"{row.dataset} {shown(row.split)}"
        for kind, messages in row.faults.items():
            lines += [f"{where}: {message}" for message in messages[:SHOWN]]
            if len(messages) > SHOWN:
                lines.append(f"{where}: {len(messages) - SHOWN:,} more {kind.replace('_', ' ')}")
        if row.empty_masks:
            lines.append(f"{where}: {row.empty_masks:,} referents whose annotations cover no pixel; they count")
    return "\n".join(lines).rstrip()


def _check(source: Source, data: Path) -> list[Row]:
    source.locate(data)
    try:
        parts = source.scan(data)
    except UserError as error:
        return [Row(source.name, "-", faults=Faults(bad_files=[str(error)]))]
    images: dict[Path, str | None] = {}
    rows = [_row(source, split, parts.get(split), images) for split in source.splits]
    unused = {split: part for split, part in parts.items() if split not in source.splits}
    return rows + [Row(source.name, str(split), _count(part), remark=UNUSED) for split, part in unused.items()]


def _row(source: Source, split: str, part: Part | None, images: dict[Path, str | None]) -> Row:
    published = source.published.get(split)
    if part is None:
        return Row(source.name, split, published=published, remark="no such split in the file")
    missing = set(missing_files(part.image_folder, (sample.image_path for sample in part.samples)))
    by_image = {sample.image_path: sample for sample in part.samples if sample.image_path not in missing}
    for path, sample in by_image.items():
        if path not in images:  # splits may share images
            try:
                images[path] = sample.check_image()
            except UserError as error:
                images[path] = str(error)
    bad_masks, empty = [], 0
    for sample in {sample.ref_id: sample for sample in part.samples}.values():
        try:
            empty += bool(sample.ann_ids) and int(coco_mask.area(sample.rle())) == 0
        except UserError as error:
            bad_masks.append(str(error))
    return Row(
        source.name,
        split,
        counts=_count(part),
        published=published,
        faults=Faults(
            bad_referents=part.problems,
            missing_images=[f"{shown(path)} is missing" for path in sorted(missing)],
            bad_images=[message for path in by_image if (message := images[path])],
            bad_masks=bad_masks,
        ),
        empty_masks=empty,
    )


def _count(part: Part) -> Counts:
    samples = part.samples
    return Counts(len({s.ref_id for s in samples}), len(samples), len({s.image_id for s in samples}))


def _counts(row: Row) -> list[str]:
    if row.counts == NOTHING and not row.published:
        return ["-"] * 3
    cells = []
    for found, published in zip(astuple(row.counts), astuple(row.published or UNPUBLISHED), strict=True):
        differs = published is not None and found != published
        said = "not published" if published is None else f"published {published:,}" if differs else ""
        cells.append(f"{found:,} ({said})" if said else f"{found:,}")
    return cells
