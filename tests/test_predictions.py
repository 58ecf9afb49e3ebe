"""Files of predictions: what is written is read, and what is wrong with a file of other hands is named in one line."""

import base64
import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from ris_bench import predictions
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.predictions import Maps, Prediction, decode, encode, match, read, write

MAPS = Maps(values="logit", geometry="letterbox", size=64)
HEIGHT, WIDTH = 6, 8


def sample(ref_id: int, sentence_index: int) -> Sample:
    return Sample(
        dataset="refcoco",
        split="val",
        ref_id=ref_id,
        sent_id=10 * ref_id + sentence_index,
        sentence_index=sentence_index,
        image_id=1,
        ann_id=ref_id,
        category="cup",
        expression=f"cup {ref_id} {sentence_index}",
        raw=f" Cup {ref_id}, {sentence_index}!",
        image_path=Path("x.jpg"),
        height=HEIGHT,
        width=WIDTH,
        segmentation=[],
    )


SAMPLES = [sample(3, 0), sample(3, 1), sample(5, 0)]


def masks() -> list[Prediction]:
    random = np.random.default_rng(0)
    return [Prediction.of(s, mask_HW=random.random((HEIGHT, WIDTH)) < 0.4) for s in SAMPLES]


def maps() -> list[Prediction]:
    random = np.random.default_rng(0)
    return [Prediction.of(s, map_hw=random.normal(size=(4, 5)), no_target=i == 1) for i, s in enumerate(SAMPLES)]


def rows(**changes) -> list[dict]:
    """Rows as another model's author would write them by hand, the first of them changed."""
    written = [
        {
            "dataset": p.dataset,
            "split": p.split,
            "ref_id": p.ref_id,
            "sentence_index": p.sentence_index,
            "height": p.height,
            "width": p.width,
            "counts": p.counts,
        }
        for p in masks()
    ]
    written[0] = {key: value for key, value in {**written[0], **changes}.items() if value is not ...}
    return written


def saved(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_masks_and_maps_come_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"predictions{suffix}"
    write(path, iter(masks()), dataset_options={"scenes": {"num_eval": 3}})
    found = read(path)
    assert (found.rows, found.maps, found.dataset_options) == (masks(), None, {"scenes": {"num_eval": 3}})
    write(path, iter(maps()), maps=MAPS)
    found = read(path)
    assert (found.rows, found.maps, found.dataset_options) == (maps(), MAPS, {})
    for row, original in zip(found.rows, maps(), strict=True):
        assert row.map.dtype == np.float16
        np.testing.assert_array_equal(row.map, original.map)
    assert list(tmp_path.iterdir()) == [path]


def test_float32_maps_and_many_rows(tmp_path: Path) -> None:
    many = [replace(maps()[0], ref_id=i, map=np.full((2, 3), i + 1e-5, np.float32)) for i in range(600)]
    for suffix in (".json", ".parquet"):
        write(tmp_path / f"many{suffix}", many, maps=MAPS)
        found = read(tmp_path / f"many{suffix}").rows
        assert found == many and found[599].map[1, 2] == np.float32(599 + 1e-5)


def test_files_of_other_hands(tmp_path: Path) -> None:
    assert read(saved(tmp_path / "list", rows())).rows == [replace(p, expression=None) for p in masks()]
    # A data frame has its own types, and NULL for what is missing.
    frame = pa.Table.from_pylist(rows(sentence_index=None, sent_id=30))
    frame = frame.set_column(2, "ref_id", frame["ref_id"].cast(pa.int32()))
    frame = frame.set_column(6, "counts", frame["counts"].cast(pa.large_string()).dictionary_encode())
    pq.write_table(frame, tmp_path / "frame")
    found = read(tmp_path / "frame").rows
    assert (found[0].sent_id, found[0].sentence_index, found[1].sentence_index) == (30, None, 1)
    assert match(found, SAMPLES)[0] is found[0]


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.98, 1])
def test_run_lengths_are_those_of_pycocotools(share: float) -> None:
    mask_HW = np.random.default_rng(1).random((300, 200)) < share
    mask_HW[:, 20:180] = share > 0.5  # A run of several letters, and differences of both signs.
    counts = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))["counts"].decode()
    assert encode(mask_HW) == counts
    np.testing.assert_array_equal(decode(counts, 300, 200).T, mask_HW)


@pytest.mark.parametrize(
    "counts", ["", "5", "zzzz", "é", " ", "P" * 30, "o" * 9 + "0", encode(np.ones((5, 8))), encode(np.ones((6, 9)))]
)
def test_run_lengths_that_are_none_or_of_another_image(counts: str) -> None:
    with pytest.raises(ValueError, match="run-length string|do not fill"):
        decode(counts, HEIGHT, WIDTH)


def test_runs_that_claim_terabytes_take_no_memory() -> None:
    def letters(run: int) -> str:
        """A run length of seven letters, 34 bits."""
        return "".join(chr(48 + (run >> 5 * i & 31) + (32 if i < 6 else 0)) for i in range(7))

    for counts in (letters(2**33), letters(2**33) * 2, letters(HEIGHT * WIDTH - 2**33) + letters(2**33)):
        with pytest.raises(ValueError, match="do not fill"):
            decode(counts, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ref_id": ...}, "prediction 1 of .* lacks ref_id"),
        ({"ref_id": "3"}, "prediction 1 of .* has ref_id '3', a str; it is a int"),
        ({"ref_id": True}, "has ref_id 'True', a bool"),
        ({"ref_id": 3.0}, "a float; it is a int"),
        ({"ref_id": 1e400}, "a float; it is a int"),
        ({"sentence_index": ...}, "neither sentence_index nor sent_id"),
        ({"counts": ...}, "lacks counts"),
        ({"counts": [3, 45]}, "a list; it is a str"),
        ({"mask": "x"}, "has 'mask'; it may have dataset, split"),
        ({"map": "AAAA", "map_height": 1, "map_width": 1}, "without `maps` in its header they are masks"),
        ({"no_target": 1}, "a int; it is a bool"),
        ({"dataset": "a\nb"}, r"has dataset 'a\\nb'; it is the name of one"),
        ({"split": "v" * 1000}, "has split 'v{80}'; it is the name of one"),
    ],
)
def test_a_bad_row_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(saved(tmp_path / "p.json", rows(**changes)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"map": "?"}, "not base64"),
        ({"map": base64.b64encode(bytes(7)).decode()}, r"a map of 7 bytes; 2 x 2 float16 or float32 have \[8, 16\]"),
        ({"map": base64.b64encode(np.array([1, 2, 3, np.nan], "<f2").tobytes()).decode()}, "not finite"),
        ({"map_height": 10**6}, "its sides are from 1 to 4096"),
        ({"map_width": -2}, "its sides are from 1 to 4096"),
        ({"map_width": ...}, "lacks map_width"),
        ({"counts": "5"}, "`maps` says that they are maps"),
    ],
)
def test_a_bad_map_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    good = {"map": base64.b64encode(np.zeros(4, "<f2").tobytes()).decode(), "map_height": 2, "map_width": 2}
    header = {"maps": {"values": "logit", "geometry": "stretch", "size": 4}}
    row = rows(counts=..., **good)[0]
    assert read(saved(tmp_path / "p.json", {**header, "predictions": [row]})).rows[0].map.shape == (2, 2)
    row = {key: value for key, value in {**row, **changes}.items() if value is not ...}
    with pytest.raises(UserError, match=message):
        read(saved(tmp_path / "p.json", {**header, "predictions": [row]}))


@pytest.mark.parametrize(
    "header, message",
    [
        ({"map": {}}, "has 'map'; it may have maps, dataset_options"),
        ({"maps": {"values": "logit"}}, "lacks geometry, size"),
        ({"maps": {"values": "logit", "geometry": "round", "size": 4}}, "which is not one of 'letterbox'"),
        ({"maps": {"values": "logit", "geometry": "stretch", "size": 10**9}}, "from 1 to 4096"),
        ({"maps": {"values": "logit", "geometry": ["stretch"], "size": 4}}, "which is not one of 'letterbox'"),
        ({"maps": 5}, "which is not a mapping"),
        ({"dataset_options": {"scenes": 5}}, "which is not a mapping"),
    ],
)
def test_a_bad_header_is_named(header: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(saved(tmp_path / "p.json", {**header, "predictions": rows()}))
    table = pa.Table.from_pylist(rows()).replace_schema_metadata({"ris-bench": json.dumps(header)})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"5",
        b"[5]",
        b"[]",
        b'{"predictions": {}}',
        b"\xff\xfe",
        b'[{"ref_id": NaN}]',
        b"[" * 1_000_000,
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b"[" + b"{}," * 1_000_000 + b"{}]",
        b"[" + b"9" * 1_000_000 + b"]",
        b"PAR1",
        b"PAR1" + bytes(1000) + b"PAR1",
    ],
    ids=range(14),
)
def test_what_is_no_file_of_predictions(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500 and str(path) in str(raised.value)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nothing")


def test_a_parquet_of_another_form(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(rows())
    for name, values, message in (
        ("extra", [1, 2, 3], "has 'extra'"),
        ("counts", [b"a", b"b", b"c"], "the column 'counts' of .* is binary; it is string"),
        ("ref_id", [1.0, 2.0, 3.0], "is double; it is int64"),
        ("expression", [["a"]] * 3, "is list"),
    ):
        kept = table.drop_columns([name]) if name in table.column_names else table
        pq.write_table(kept.append_column(name, pa.array(values)), tmp_path / "p.parquet")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "p.parquet")
    pq.write_table(table.set_column(2, "ref_id", pa.array([1, None, 3])), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="prediction 2 of .* lacks ref_id"):
        read(tmp_path / "p.parquet")
    damaged = bytearray((tmp_path / "p.parquet").read_bytes())
    damaged[4:200] = bytes(196)
    (tmp_path / "p.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged|lacks"):
        read(tmp_path / "p.parquet")


def test_a_string_repeated_by_a_dictionary_is_kept_once(tmp_path: Path) -> None:
    """20,000 rows of one string of 4 MB are 80 GB, in a file of some kilobytes."""
    number, path = 20_000, tmp_path / "p.parquet"
    row = rows(counts="0" * 2**22)[0]
    columns = {key: pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), pa.array([row[key]])) for key in row}
    columns |= {key: columns[key].dictionary_decode() for key in ("ref_id", "sentence_index", "height", "width")}
    pq.write_table(pa.table(columns), path, compression="zstd", dictionary_pagesize_limit=2**23)
    assert path.stat().st_size < 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = read(path).rows
        assert len(found) == number
    except UserError as error:
        assert "holds more than" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_too_much_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    for suffix in (".json", ".parquet"):
        write(tmp_path / f"p{suffix}", masks())
    monkeypatch.setattr(predictions, "MOST_ROWS", 2)
    for suffix in (".json", ".parquet"):
        with pytest.raises(UserError, match="write one file for each split"):
            read(tmp_path / f"p{suffix}")
    monkeypatch.setattr(predictions, "MOST_BYTES", 100)
    for suffix in (".json", ".parquet"):
        with pytest.raises(UserError, match="bytes, and 100 are read"):
            read(tmp_path / f"p{suffix}")


def test_every_expression_is_predicted_once() -> None:
    found = masks()
    assert match(found[::-1], SAMPLES) == found
    with pytest.raises(
        UserError, match="1 expressions are not predicted: sentence 1 of referent 3 in refcoco val; all 3"
    ):
        match([found[0], found[2]], SAMPLES)
    with pytest.raises(UserError, match="1 expressions are predicted more than once: sentence 0 of referent 5"):
        match([*found, found[2]], SAMPLES)
    for other in ({"ref_id": 99}, {"sentence_index": 7}, {"split": "testA"}, {"dataset": "refcoco+"}, {"sent_id": 5}):
        with pytest.raises(UserError, match="1 expressions are not in the data: sentence . of referent"):
            match([*found, replace(found[0], **other)], SAMPLES)
    by_id = [replace(row, sentence_index=None, sent_id=s.sent_id) for row, s in zip(found, SAMPLES, strict=True)]
    assert match(by_id, SAMPLES) == by_id
    with pytest.raises(UserError, match="more than once: sent_id 30 of referent 3"):
        match([*by_id, by_id[0]], SAMPLES)


def test_a_prediction_for_another_image_or_expression() -> None:
    found = masks()
    with pytest.raises(UserError, match="sentence 0 of referent 3 in refcoco val is 8 x 6 and the image 6 x 8"):
        match([replace(found[0], height=8, width=6), *found[1:]], SAMPLES)
    with pytest.raises(UserError, match="was asked 'dog' where the data have 'cup 3 0'"):
        match([replace(found[0], expression="dog"), *found[1:]], SAMPLES)
    for same in (SAMPLES[0].raw, SAMPLES[0].expression, None):
        match([replace(found[0], expression=same), *found[1:]], SAMPLES)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def breaks():
        yield masks()[0]
        raise ArithmeticError

    for suffix in (".json", ".parquet"):
        path = tmp_path / f"p{suffix}"
        write(path, masks())
        before = path.read_bytes()
        with pytest.raises(ArithmeticError):
            write(path, breaks())
        with pytest.raises(UserError, match="lacks map, map_height, map_width"):
            write(path, masks(), maps=MAPS)
        with pytest.raises(UserError, match="they are masks|lacks counts"):
            write(path, maps())
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match=r"must end in \.json or \.parquet"):
        write(tmp_path / "p.csv", masks())
    with pytest.raises(UserError, match="is not a folder"):
        write(tmp_path / "nowhere" / "p.json", masks())


def test_a_prediction_is_a_mask_of_its_image_or_a_map() -> None:
    for wrong in ({}, {"mask_HW": np.zeros((8, 6))}, {"mask_HW": np.zeros((6, 8)), "map_hw": np.zeros((1, 1))}):
        with pytest.raises(ValueError):
            Prediction.of(SAMPLES[0], **wrong)
