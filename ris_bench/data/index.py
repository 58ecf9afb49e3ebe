"""The samples of a dataset, kept once they were parsed: RefCOCO opens again in a second, and in less memory.

Indices lie in $RIS_BENCH_CACHE/index or ~/.cache/ris-bench/index and may be deleted at any time. The name of one holds
the sha256 of all that its samples depend on: the whole content of the source files, since size and time of change do
not tell archives apart that were unpacked alike, and to hash 150 MB takes a fifth of a second; the name of the dataset;
and the code that parses, so that nobody has to remember to count up a version.

An index is a Parquet file, with a row for each referent, behind the sha256 of that. What is large and asked for one by
one, outlines and what else is in the image, stays text until then. Nothing in it is executed, and one that is damaged
or holds anything else is made anew.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ris_bench import cache
from ris_bench.data.samples import NO_TARGET, Other, Sample
from ris_bench.errors import UserError
from ris_bench.files import whole

Splits = dict[str, list[Sample]]
"""Samples of every split, also of one that has none, ordered by (ref_id, sentence_index)."""

_CODE = ("index", "refer", "samples", "untrusted")
"""The modules on which samples depend, beside the one of the dataset's own class."""
_DIGEST = hashlib.sha256().digest_size
_SPLITS = b"ris-bench splits"
_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "ref_id": pa.int64(),
        "image_id": pa.int64(),
        "ann_ids": pa.list_(pa.int64()),
        "category": pa.string(),
        "file_name": pa.string(),
        "height": pa.int64(),
        "width": pa.int64(),
        "sent_ids": pa.list_(pa.int64()),
        "expressions": pa.list_(pa.string()),
        "raws": pa.list_(pa.string()),
        "segmentation": pa.binary(),
        "others": pa.binary(),
    }
)


def folder() -> Path:
    """Where indices lie."""
    return cache.folder() / "index"


def key(name: str, kind: type, files: Iterable[Path]) -> str:
    """What identifies the samples that `kind`, a class of datasets, makes of files under the name of a dataset.

    Raises UserError where a file cannot be read.
    """
    code = [inspect.getfile(kind), *(Path(__file__).with_name(f"{module}.py") for module in _CODE)]
    parts = [name, kind.__qualname__, *(_sha256(Path(path)) for path in (*code, *files))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load(name: str, key: str, image_folder: Path, split: str | None = None) -> Splits | None:
    """The samples of a dataset, or of one split, whose images are in a folder; None where there is no sound index."""
    try:
        content = memoryview(_path(name, key).read_bytes())
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            return None
        table = pq.read_table(pa.BufferReader(content[_DIGEST:]), filters=split and [("split", "==", split)])
        table.validate(full=True)
        # Whoever wrote it, it has to have our columns.
        return _samples(table, name, image_folder, split) if table.schema.equals(_SCHEMA) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        return None


def save(name: str, key: str, image_folder: Path, splits: Splits) -> Splits:
    """Write the index of a dataset, whole or not at all; gives the samples as `load` will.

    Nothing is written, and the samples given back as they are, where they would not come out of it the same: numbers
    that are none, or text that is no Unicode. Where the folder cannot be written they are parsed again next time.
    """
    try:
        table = _table(splits, image_folder)
        stored = _samples(table, name, image_folder, None)
    except (ValueError, TypeError, OverflowError, RecursionError, pa.ArrowException):
        return splits
    if list(stored) != list(splits) or not all(_same(stored[split], splits[split]) for split in splits):
        return splits
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue()
    path = _path(name, key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary, temporary.open("wb") as file:  # what another process may make is the same
            file.write(hashlib.sha256(content).digest())
            file.write(content)
    return stored


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, which takes longer to look through a million new objects than it takes to make them
    (RefCOCO opens in two thirds of the time); none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Stored(Sequence):
    """A list that is kept as JSON, and made when it is asked for."""

    __slots__ = ("_text",)
    __hash__ = None

    def __init__(self, text: bytes) -> None:
        self._text = text

    @abstractmethod
    def _list(self) -> list[Any]: ...

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._list())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, _Stored)) and self._list() == list(other)

    def __repr__(self) -> str:
        return repr(self._list())


class _Parts(_Stored):
    """Polygons and run lengths."""

    __slots__ = ()

    def _list(self) -> list[Any]:
        return json.loads(self._text)


class _Others(_Stored):
    __slots__ = ()

    def _list(self) -> list[Other]:
        return [Other(*values) for values in json.loads(self._text)]


def _table(splits: Splits, image_folder: Path) -> pa.Table:
    rows = []
    for samples in splits.values():
        for _, sentences in groupby(samples, attrgetter("ref_id")):
            first, *_ = sentences = list(sentences)
            rows.append(
                {
                    "split": first.split,
                    "ref_id": first.ref_id,
                    "image_id": first.image_id,
                    "ann_ids": first.ann_ids,
                    "category": first.category,
                    "file_name": str(first.image_path.relative_to(image_folder)),
                    "height": first.height,
                    "width": first.width,
                    "sent_ids": [one.sent_id for one in sentences],
                    "expressions": [one.expression for one in sentences],
                    "raws": [one.raw for one in sentences],
                    "segmentation": _json(first.segmentation),
                    "others": None if first.others is None else _json(first.others),
                }
            )
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    return table.replace_schema_metadata({_SPLITS: json.dumps(list(splits)).encode()})


def _samples(table: pa.Table, name: str, image_folder: Path, split: str | None) -> Splits:
    splits: Splits = {one: [] for one in json.loads(table.schema.metadata[_SPLITS]) if split in (None, one)}
    paths: dict[str, Path] = {}
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        of, ref_id, image_id, ann_ids, category, file_name, height, width, sent_ids, expressions, raws, *texts = row
        if (image_path := paths.get(file_name)) is None:
            image_path = paths[file_name] = image_folder / file_name
        segmentation = _Parts(texts[0]) if texts[0].startswith(b"[") else json.loads(texts[0])
        others = None if texts[1] is None else _Others(texts[1])
        ann_id, *further = ann_ids or [NO_TARGET]
        shared = {
            "dataset": name,
            "split": of,
            "ref_id": ref_id,
            "image_id": image_id,
            "ann_id": ann_id,
            "category": category,
            "image_path": image_path,
            "height": height,
            "width": width,
            "segmentation": segmentation,
            "further_ann_ids": tuple(further),
            "others": others,
        }
        for index, (sent_id, expression, raw) in enumerate(zip(sent_ids, expressions, raws, strict=True)):
            # A frozen dataclass sets its fields one by one, which would take three times as long.
            sample = Sample.__new__(Sample)
            own = {"sent_id": sent_id, "sentence_index": index, "expression": expression, "raw": raw}
            sample.__dict__.update(shared, **own)
            splits[of].append(sample)
    return splits


def _same(stored: Sequence[Sample], parsed: Sequence[Sample]) -> bool:
    """With what two samples are not compared by; that of a referent is looked at once."""
    return list(stored) == list(parsed) and all(
        one.sentence_index > 0 or (one.segmentation == other.segmentation and one.others == other.others)
        for one, other in zip(stored, parsed, strict=True)
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _path(name: str, key: str) -> Path:
    return folder() / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', name)}-{key[:32]}"
