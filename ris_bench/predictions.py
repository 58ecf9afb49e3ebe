"""Files of predictions: what this harness or any other model answers to every expression of a split, to be scored.

A file is JSON or Parquet, and both hold the same rows. A row names an expression by `dataset`, `split`, `ref_id` and
`sentence_index` (its position among the sentences of the referent, from 0) or `sent_id`, gives the `height` and `width`
of the image, and has one of

    counts                          the mask, a compressed run-length string of COCO, in the frame of the image
    map, map_height, map_width      what the network gave: float16 or float32, little-endian, row by row, from the top;
                                    bytes in Parquet, base64 in JSON

It may have `no_target` (the model says that there is nothing to be found) and `expression` (what it was asked, so that
rows of another data set are noticed). JSON is a list of rows or, where there is more to say, an object:

    {"maps": {"values": "logit", "geometry": "letterbox", "size": 416}, "dataset_options": {}, "predictions": [...]}

Parquet has that object, without the predictions, as text under the key `ris-bench` of its schema's metadata. `maps`
says how all maps lie over their images: `values` is "logit" or "probability", `geometry` one of `protocols.GEOMETRIES`
and `size` the side of the network's square input. `dataset_options` are those of data sets that have some, by the name
under which an experiment gives them: {"own": {"file": "cups.json", "name": "cups"}} is for rows of `dataset` "cups".
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.files import whole
from ris_bench.protocols import GEOMETRIES, Geometry
from ris_bench.registry import checked

MOST_BYTES = 2**32
"""Of a file, and of what a compressed file holds."""
MOST_ROWS = 1_000_000
"""The largest data set has 280,000 expressions."""
MOST_SIDE = 4096
"""Of a map or of a network's input, in pixels."""

_KEY = b"ris-bench"
_CHUNK = 256  # Rows that are written and read at a time.

_SCHEMA = {
    "dataset": pa.string(),
    "split": pa.string(),
    "ref_id": pa.int64(),
    "sentence_index": pa.int64(),
    "sent_id": pa.int64(),
    "height": pa.int64(),
    "width": pa.int64(),
    "counts": pa.string(),
    "map": pa.binary(),
    "map_height": pa.int64(),
    "map_width": pa.int64(),
    "no_target": pa.bool_(),
    "expression": pa.string(),
}
_TYPES = {pa.string(): str, pa.int64(): int, pa.bool_(): bool, pa.binary(): bytes}
_REQUIRED = ("dataset", "split", "ref_id", "height", "width")


@dataclass(frozen=True, kw_only=True)
class Maps:
    """How the maps of a file lie over their images."""

    values: Literal["logit", "probability"]
    geometry: Geometry
    size: int
    """Side of the network's square input in pixels; a map may be coarser."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model answers to one expression: a mask (`counts`) or a map. A row of a file, as it was given."""

    dataset: str
    split: str
    ref_id: int
    height: int
    width: int
    sentence_index: int | None = None
    sent_id: int | None = None
    counts: str | None = None
    """COCO's compressed run lengths of (height, width)."""
    map: np.ndarray | None = field(default=None, compare=False, repr=False)
    """float16 or float32 (map_height, map_width)."""
    no_target: bool | None = None
    """The model's own word; None leaves it to the mask, and an empty one finds nothing."""
    expression: str | None = None

    @classmethod
    def of(
        cls,
        sample: Sample,
        *,
        mask_HW: np.ndarray | None = None,
        map_hw: np.ndarray | None = None,
        no_target: bool | None = None,
    ) -> Prediction:
        """The answer to a sample: a mask in the image's frame, bool or {0, 1}, or a map, which is kept as float16."""
        if (mask_HW is None) == (map_hw is None):
            raise ValueError("a prediction is a mask or a map")
        if mask_HW is not None and mask_HW.shape != (sample.height, sample.width):
            raise ValueError(f"a mask of {mask_HW.shape} is not in the frame of ({sample.height}, {sample.width})")
        return cls(
            dataset=sample.dataset,
            split=sample.split,
            ref_id=sample.ref_id,
            sentence_index=sample.sentence_index,
            height=sample.height,
            width=sample.width,
            counts=None if mask_HW is None else encode(mask_HW),
            map=None if map_hw is None else np.asarray(map_hw, dtype=np.float16),
            no_target=no_target,
            expression=sample.expression,
        )

    @property
    def name(self) -> str:
        """The expression, for messages."""
        sentence = f"sent_id {self.sent_id}" if self.sentence_index is None else f"sentence {self.sentence_index}"
        return f"{sentence} of referent {self.ref_id} in {self.dataset} {self.split}"


@dataclass(frozen=True)
class Predictions:
    """A file, read."""

    rows: list[Prediction]
    maps: Maps | None
    """None where the rows are masks."""
    dataset_options: Mapping[str, Mapping[str, Any]]


def encode(mask_HW: np.ndarray) -> str:
    """A mask, bool or {0, 1}, as COCO's compressed run lengths."""
    return coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))["counts"].decode()


def decode(counts: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed run lengths -> bool (width, height): a mask by columns, which is how the runs go.

    Memory is that of the mask, whatever the runs say: ValueError where they do not fill exactly height x width pixels.
    """
    letters = np.frombuffer(counts.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63:
        raise ValueError("is not a compressed run-length string of COCO")
    # Five bits a letter, lowest first; bit 5 says that more letters follow, bit 4 of the last one is the sign.
    ends = np.flatnonzero(letters < 32)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    lengths = ends - starts + 1
    if not len(ends) or ends[-1] != len(letters) - 1 or lengths.max() > 7:
        raise ValueError("is not a compressed run-length string of COCO")
    place = np.arange(len(letters)) - np.repeat(starts, lengths)
    values = np.add.reduceat((letters & 31) << (5 * place), starts)
    values -= np.where(letters[ends] & 16, np.int64(1) << (5 * lengths), 0)
    # From the fourth on, a run is written as its difference from the one two before.
    runs = values.copy()
    runs[1::2], runs[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    if runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise ValueError(f"has run lengths that do not fill an image of {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)


def write(
    path: Path,
    predictions: Iterable[Prediction],
    *,
    maps: Maps | None = None,
    dataset_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a file, whole or not at all: JSON where the name ends in .json, Parquet where it ends in .parquet.

    The predictions are consumed as they are written, so that a generator need never hold all maps. All have maps where
    `maps` is given, and masks where it is not. Raises UserError for another ending, a folder that is not there, and
    predictions that the reader would refuse.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"predictions cannot be written to {path}: the name must end in {' or '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise UserError(f"predictions cannot be written to {path}: {path.parent} is not a folder; create it first")
    header = ({"maps": asdict(maps)} if maps else {}) | (
        {"dataset_options": dict(dataset_options)} if dataset_options else {}
    )
    _header(header, str(path))
    records = (_record(prediction, maps, str(path)) for prediction in predictions)
    with whole(path) as temporary:
        _WRITERS[path.suffix](temporary, header, records)


def read(path: Path) -> Predictions:
    """Every row of a JSON or Parquet file, each of the right form. Nothing in the file is ever executed.

    Raises UserError, in one line with the number of the row, for what is missing, unknown or of another type, and for a
    file that is damaged or larger than `MOST_BYTES`. Masks are not decoded, nor compared with any data set.
    """
    try:
        with path.open("rb") as file:
            parquet, size = file.read(4) == b"PAR1", os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of predictions") from None
    if size > MOST_BYTES:
        raise UserError(f"{path} has {size:,} bytes, and {MOST_BYTES:,} are read; write one file for each split")
    try:
        header, records = (_read_parquet if parquet else _read_json)(path)
        maps, dataset_options = _header(header, str(path))
        rows = [
            _prediction(record, maps, f"prediction {number} of {path}")
            for number, record in enumerate(records, start=1)
        ]
    except UserError:
        raise
    except (ValueError, OSError, RecursionError, MemoryError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}); write it again") from None
    if not rows:
        raise UserError(f"{path} has no predictions; write one for every expression of a split")
    return Predictions(rows, maps, dataset_options)


def match(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> list[Prediction]:
    """The predictions in the order of the samples, exactly one for each.

    Raises UserError that names the expressions which are predicted twice, not at all, or are none of the samples, and
    a prediction whose image size or whose `expression` is not that of its sample.
    """
    by_index = {(s.dataset, s.split, s.ref_id, s.sentence_index): i for i, s in enumerate(samples)}
    by_id = {(s.dataset, s.split, s.ref_id, s.sent_id): i for i, s in enumerate(samples)}
    found: list[Prediction | None] = [None] * len(samples)
    unknown, double = [], []
    for row in predictions:
        referent = (row.dataset, row.split, row.ref_id)
        if row.sentence_index is not None:
            position = by_index.get((*referent, row.sentence_index))
        else:
            position = by_id.get((*referent, row.sent_id))
        if position is None or (row.sent_id is not None and samples[position].sent_id != row.sent_id):
            unknown.append(row.name)
        elif found[position] is not None:
            double.append(row.name)
        else:
            found[position] = row
    missing = [
        f"sentence {s.sentence_index} of referent {s.ref_id} in {s.dataset} {s.split}"
        for s, row in zip(samples, found, strict=True)
        if row is None
    ]
    for names, problem, advice in (
        (unknown, "are not in the data", "predict the expressions of this data set and partition"),
        (double, "are predicted more than once", "leave one of each"),
        (missing, "are not predicted", f"all {len(samples):,} are scored; predict the rest"),
    ):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{len(names):,} expressions {problem}: {some}; {advice}")
    for sample, row in zip(samples, found, strict=True):
        if (row.height, row.width) != (sample.height, sample.width):
            raise UserError(
                f"the prediction of {row.name} is {row.height} x {row.width} and the image {sample.height} x "
                f"{sample.width} (height x width); give masks in the frame of the original image"
            )
        if row.expression is not None and row.expression.strip() not in (sample.expression, sample.raw.strip()):
            raise UserError(
                f"the prediction of {row.name} was asked {row.expression[:80]!r} where the data have "
                f"{sample.expression[:80]!r}; take both from the same data set"
            )
    return found


def _header(header: Any, where: str) -> tuple[Maps | None, dict[str, dict[str, Any]]]:
    header = checked(header, dict, f"the header of {where}")
    _known(header, ("maps", "dataset_options"), f"the header of {where}")
    options = checked(header.get("dataset_options", {}), dict[str, dict[str, Any]], f"`dataset_options` of {where}")
    if "maps" not in header:
        return None, options
    given = checked(header["maps"], dict, f"`maps` of {where}")
    _known(given, ("values", "geometry", "size"), f"`maps` of {where}")
    if missing := [key for key in ("values", "geometry", "size") if key not in given]:
        raise UserError(f"`maps` of {where} lacks {', '.join(missing)}; add them")
    maps = Maps(
        values=checked(given["values"], Literal["logit", "probability"], f"`values` of the maps of {where}"),
        geometry=checked(given["geometry"], Literal[GEOMETRIES], f"`geometry` of the maps of {where}"),
        size=checked(given["size"], int, f"`size` of the maps of {where}"),
    )
    if not 1 <= maps.size <= MOST_SIDE:
        raise UserError(f"`size` of the maps of {where} is {maps.size}; it is from 1 to {MOST_SIDE}")
    return maps, options


def _known(given: Mapping[str, Any], allowed: Sequence[str], what: str) -> None:
    if unknown := [str(key)[:80] for key in given if key not in allowed]:
        raise UserError(f"{what} has {unknown[0]!r}; it may have {', '.join(allowed)}; correct or remove it")


def _prediction(record: Any, maps: Maps | None, what: str) -> Prediction:
    """A record, of a JSON or a Parquet file, with every value of its type and a map turned into an array."""
    if not isinstance(record, dict):
        raise UserError(f"{what} is a {type(record).__name__}; a prediction is an object with {', '.join(_REQUIRED)}")
    _known(record, tuple(_SCHEMA), what)
    record = {key: value for key, value in record.items() if value is not None}
    needed = (*_REQUIRED, *(("map", "map_height", "map_width") if maps else ("counts",)))
    if missing := [key for key in needed if key not in record]:
        raise UserError(f"{what} lacks {', '.join(missing)}; {'its file has maps' if maps else 'add it'}")
    if "sentence_index" not in record and "sent_id" not in record:
        raise UserError(f"{what} has neither sentence_index nor sent_id; give one of them")
    if extra := {"counts"} & record.keys() if maps else {"map", "map_height", "map_width"} & record.keys():
        told = "`maps` says that they are maps" if maps else "without `maps` in its header they are masks"
        raise UserError(f"{what} has {', '.join(sorted(extra))}, but of its file {told}; give one kind")
    for key, value in record.items():
        kind = _TYPES[_SCHEMA[key]]
        if type(value) is not kind and not (key == "map" and type(value) is str):
            raise UserError(f"{what} has {key} {str(value)[:80]!r}, a {type(value).__name__}; it is a {kind.__name__}")
    for key in ("dataset", "split"):
        if not (record[key].isprintable() and 0 < len(record[key]) <= 80):
            raise UserError(f"{what} has {key} {record[key][:80]!r}; it is the name of one, such as 'refcoco' or 'val'")
    if maps:
        record["map"] = _map(record["map"], record.pop("map_height"), record.pop("map_width"), what)
    return Prediction(**record)


def _map(data: bytes | str, height: int, width: int, what: str) -> np.ndarray:
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise UserError(f"{what} has a map of {height} x {width}; its sides are from 1 to {MOST_SIDE}")
    try:
        data = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    except ValueError:
        raise UserError(f"{what} has a map that is not base64; encode its bytes so") from None
    kinds = {2 * height * width: "<f2", 4 * height * width: "<f4"}
    if len(data) not in kinds:
        raise UserError(
            f"{what} has a map of {len(data)} bytes; {height} x {width} float16 or float32 have {list(kinds)}"
        )
    map_hw = np.frombuffer(data, dtype=kinds[len(data)]).reshape(height, width)
    if not np.isfinite(map_hw).all():
        raise UserError(f"{what} has a map with a value that is not finite; correct the model")
    return map_hw


def _record(prediction: Prediction, maps: Maps | None, where: str) -> dict[str, Any]:
    """A prediction as both kinds of file hold it, after the reader's own checks."""
    record = {key: getattr(prediction, key, None) for key in _SCHEMA}
    if prediction.map is not None:
        record["map"] = np.ascontiguousarray(prediction.map).astype(prediction.map.dtype.newbyteorder("<")).tobytes()
        record["map_height"], record["map_width"] = prediction.map.shape
    _prediction(record, maps, f"the prediction of {prediction.name} for {where}")
    return record


def _write_json(path: Path, header: dict[str, Any], records: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        beginning = json.dumps(header)[:-1]
        file.write(f'{beginning}{", " if header else ""}"predictions": [')
        for number, record in enumerate(records):
            row = {key: value for key, value in record.items() if value is not None}
            if "map" in row:
                row["map"] = base64.b64encode(row["map"]).decode()
            file.write(f"{',' if number else ''}\n{json.dumps(row)}")
        file.write("\n]}\n")


def _write_parquet(path: Path, header: dict[str, Any], records: Iterator[dict[str, Any]]) -> None:
    schema = pa.schema(list(_SCHEMA.items()), metadata={_KEY: json.dumps(header).encode()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while chunk := list(islice(records, _CHUNK)):
            writer.write_batch(pa.RecordBatch.from_pylist(chunk, schema=schema))


_WRITERS = {".json": _write_json, ".parquet": _write_parquet}


def _read_json(path: Path) -> tuple[Any, list[Any]]:
    text = path.read_bytes()
    # A list of a billion empty lists is a small file: objects are counted before they are made. A row has one comma
    # for every 20 bytes or so.
    if 10 * (text.count(b",") + text.count(b"{")) > len(text) + 1000:
        raise UserError(f"{path} holds too many small values to be a file of predictions; write it again")
    content = json.loads(text)
    if isinstance(content, list):
        content = {"predictions": content}
    if not isinstance(content, dict) or not isinstance(content.get("predictions"), list):
        raise UserError(f"{path} is not a list of predictions, nor an object with the list 'predictions'; write it so")
    if len(content["predictions"]) > MOST_ROWS:
        raise UserError(f"{path} has more than {MOST_ROWS:,} predictions; write one file for each split")
    return {key: value for key, value in content.items() if key != "predictions"}, content["predictions"]


def _read_parquet(path: Path) -> tuple[Any, Iterator[dict[str, Any]]]:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if metadata.num_rows > MOST_ROWS or sum(group.total_byte_size for group in groups) > MOST_BYTES:
        raise UserError(
            f"{path} has {metadata.num_rows:,} rows; at most {MOST_ROWS:,} rows of {MOST_BYTES:,} bytes in all are "
            "read; write one file for each split"
        )
    _known(dict.fromkeys(schema.names), tuple(_SCHEMA), str(path))
    for column in schema:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        wanted = _SCHEMA[column.name]
        if not (
            kind == wanted
            or pa.types.is_null(kind)
            or (wanted == pa.int64() and pa.types.is_integer(kind))
            or (wanted == pa.string() and pa.types.is_large_string(kind))
            or (wanted == pa.binary() and pa.types.is_large_binary(kind))
        ):
            raise UserError(f"the column {column.name!r} of {path} is {kind}; it is {wanted}; write it again")
    return json.loads((schema.metadata or {}).get(_KEY, b"{}")), _rows(path, schema)


def _rows(path: Path, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    # Text stays a dictionary with indices: a long string that is repeated is kept once.
    texts = [name for name in schema.names if _SCHEMA[name] in (pa.string(), pa.binary())]
    file, held = pq.ParquetFile(path, read_dictionary=texts), 0
    for batch in file.iter_batches(_CHUNK):
        columns = []
        for column in batch.columns:
            shared = column.dictionary if pa.types.is_dictionary(column.type) else column
            held += shared.nbytes
            if held > MOST_BYTES:
                raise UserError(f"{path} holds more than {MOST_BYTES:,} bytes; write one file for each split")
            values = shared.to_pylist()
            if shared is not column:
                values = [None if i is None else values[i] for i in column.indices.to_pylist()]
            columns.append(values)
        for row in zip(*columns, strict=True):
            yield dict(zip(batch.schema.names, row, strict=True))
