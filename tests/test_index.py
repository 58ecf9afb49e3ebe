"""The index of a dataset: what comes out of it is what was parsed, and nothing else ever does."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import replica

from ris_bench.data import index
from ris_bench.data.dataset import Part, Source, named
from ris_bench.data.own import Own
from ris_bench.data.refer import ReferDataset
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"
NAMES = ("refcoco", "refcoco-google", "refcoco+", "refcocog-umd", "refcocog-google", "grefcoco")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the indices of a test lie."""
    monkeypatch.setattr(index, "folder", lambda: tmp_path / "cache" / "index")
    return tmp_path / "cache" / "index"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The data folders that were parsed, one after the other."""
    folders = []
    for kind in (ReferDataset, Own):
        parse = kind.parse
        monkeypatch.setattr(kind, "parse", lambda self, data, parse=parse: folders.append(data) or parse(self, data))
    return folders


def plain(parts: dict[str, Part]) -> dict[str, list[dict]]:
    """Every field of every sample, those too by which samples are not compared; a list is a list however it is kept."""

    def of(sample: Sample) -> dict:
        record = {field.name: getattr(sample, field.name) for field in fields(Sample)}
        if not isinstance(sample.segmentation, dict):
            record["segmentation"] = list(sample.segmentation)
        if sample.others is not None:
            record["others"] = [(type(other), *other) for other in sample.others]
        return {key: (type(value), value) for key, value in record.items()}

    return {split: [of(sample) for sample in part.samples] for split, part in parts.items()}


def own(data: Path, segmentation: object = replica.SQUARE, **changes: object) -> Source:
    """A data set of one's own with an image, a referent and two sentences."""
    data.mkdir(exist_ok=True)
    replica.Image.new("RGB", (replica.WIDTH, replica.HEIGHT)).save(data / "a.png")
    entry = {"id": 5, "image_id": 1, "annotation_ids": [7], "split": "val", "sentences": ["the red cup", "cup ☕"]}
    record = {
        "images": [{"id": 1, "file_name": "a.png", "height": replica.HEIGHT, "width": replica.WIDTH}],
        "annotations": [
            {"id": 7, "image_id": 1, "segmentation": segmentation},
            {"id": 8, "image_id": 1, "segmentation": replica.crowd()},
        ],
        "expressions": [entry | changes],
    }
    (data / "a.json").write_text(json.dumps(record))
    return named({"own": {"file": "a.json"}})


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_that_were_parsed(name: str, tmp_path: Path, parsed: list[Path]) -> None:
    dataset = replica.write(named(name), tmp_path)
    first = dataset.scan(tmp_path)
    again = dataset.scan(tmp_path)
    assert parsed == [tmp_path]
    fresh = dataset.parse(tmp_path)
    assert list(fresh) == list(again) == list(first) and all(part.samples for part in fresh.values())
    assert plain(first) == plain(fresh) and plain(again) == plain(fresh)
    for split, part in fresh.items():
        assert part.samples == again[split].samples == dataset.read(tmp_path, split)
        for sample, other in zip(part.samples, again[split].samples, strict=True):
            assert other.segmentation == sample.segmentation and other.others == sample.others
            assert np.array_equal(sample.mask(), other.mask())
    assert parsed == [tmp_path, tmp_path]


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_samples_of_real_annotations_are_those_that_were_parsed(parsed: list[Path]) -> None:
    dataset = named("refcocog-google")
    first, again = dataset.scan(SLICE), dataset.scan(SLICE)
    assert plain(dataset.parse(SLICE)) == plain(first) == plain(again) and len(parsed) == 2
    sample = again["val"].samples[0]
    assert pickle.loads(pickle.dumps(sample)).segmentation == sample.segmentation  # as processes hand it on


@pytest.mark.parametrize("segmentation", [replica.SEVERAL, replica.crowd(), [replica.SQUARE[0], replica.crowd()], []])
def test_every_form_of_a_segmentation(segmentation: object, tmp_path: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path, segmentation)
    assert plain(dataset.scan(tmp_path)) == plain(dataset.scan(tmp_path)) == plain(dataset.parse(tmp_path))
    assert len(parsed) == 2


def test_an_index_serves_a_copy_of_the_data(tmp_path: Path, parsed: list[Path]) -> None:
    for data in (tmp_path / "a", tmp_path / "b"):
        own(data)
    assert named({"own": {"file": "a.json"}}).read(tmp_path / "a", "val")[0].image_path == tmp_path / "a" / "a.png"
    assert named({"own": {"file": "a.json"}}).read(tmp_path / "b", "val")[0].image_path == tmp_path / "b" / "a.png"
    samples = named({"own": {"file": "a.json", "name": "cups"}}).read(tmp_path / "b", "val")
    assert samples[0].dataset == "cups" and parsed == [tmp_path / "a", tmp_path / "b"]


def test_content_counts_and_not_the_time_of_change(tmp_path: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path)
    file = tmp_path / "a.json"
    before = file.stat()
    assert dataset.read(tmp_path, "val")[0].expression == "the red cup"
    file.write_text(file.read_text().replace("the red cup", "the tan cup"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert dataset.read(tmp_path, "val")[0].expression == "the tan cup"
    os.utime(file)
    dataset.read(tmp_path, "val")
    assert len(parsed) == 2


def test_files_that_change_while_they_are_parsed_leave_no_index(tmp_path, cache, monkeypatch) -> None:
    dataset = own(tmp_path)
    parse = type(dataset).parse

    def slow(self: Source, data: Path) -> dict[str, Part]:
        own(tmp_path, sentences=["another"])
        return parse(self, data)

    monkeypatch.setattr(type(dataset), "parse", slow)
    assert dataset.read(tmp_path, "val")[0].expression == "another" and not cache.exists()


def with_digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def parquet(table: pa.Table) -> bytes:
    pq.write_table(table, sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def without(content: bytes, column: str) -> bytes:
    return parquet(pq.read_table(pa.BufferReader(content)).drop_columns([column]))


def emptied(content: bytes, column: str) -> bytes:
    """Every value is null, which no file of ours has."""
    table = pq.read_table(pa.BufferReader(content))
    position = table.schema.get_field_index(column)
    field = table.schema.field(position)
    return parquet(table.set_column(position, field, pa.nulls(table.num_rows, field.type)))


DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-100],
    "a bit": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "no digest": lambda content: content[32:],
    "no Parquet": lambda content: with_digest(b"PAR1 nothing PAR1"),
    "a pickle": lambda content: with_digest(pickle.dumps({"splits": os.system})),
    "another table": lambda content: with_digest(parquet(pa.table({"split": ["val"]}))),
    "a column less": lambda content: with_digest(without(content[32:], "raws")),
    "no splits": lambda content: with_digest(
        parquet(pq.read_table(pa.BufferReader(content[32:])).replace_schema_metadata({}))
    ),
    **{
        f"no {column}": lambda content, column=column: with_digest(emptied(content[32:], column))
        for column in ("split", "segmentation", "sent_ids", "file_name")
    },
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_foreign_index_is_made_anew(name: str, tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path)
    expected = plain(dataset.scan(tmp_path))
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    path.write_bytes(DAMAGE[name](sound))
    assert plain(dataset.scan(tmp_path)) == expected and len(parsed) == 2
    assert path.read_bytes() == sound and list(cache.iterdir()) == [path]
    assert plain(dataset.scan(tmp_path)) == expected and len(parsed) == 2


def test_a_folder_that_cannot_be_written_and_data_that_are_not(tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    data = tmp_path / "data"
    dataset = own(data)
    listed = sorted(data.iterdir())
    for path in (*listed, data):
        path.chmod(path.stat().st_mode & ~0o222)
    dataset.read(data, "val")
    assert len(parsed) == 1 and sorted(data.iterdir()) == listed
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.touch()  # No folder: whoever runs the tests may write to one of any mode.
    for _ in range(2):
        assert dataset.read(data, "val")[0].expression == "the red cup"
    assert len(parsed) == 3 and cache.read_bytes() == b""
    data.chmod(0o755)


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index, "folder", lambda: Path("/proc/none/index"))
    assert len(own(tmp_path).read(tmp_path, "val")) == 2


def test_faults_are_told_each_time(tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path, annotation_ids=[9])
    for _ in range(2):
        with pytest.raises(UserError, match=r"referent 5 of own points to annotation \[9\] of image 1"):
            dataset.read(tmp_path, "val")
    assert len(parsed) == 2 and not cache.exists()
    assert len(own(tmp_path).read(tmp_path, "val")) == 2  # Corrected.


def test_what_no_column_holds_is_parsed_each_time(tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    dataset = replica.write(named("refcoco"), tmp_path)
    instances = tmp_path / "refcoco" / "instances.json"
    record = json.loads(instances.read_text())
    record["images"][0]["height"] = 48.5
    instances.write_text(json.dumps(record))
    for _ in range(2):
        assert dataset.read(tmp_path, "train")[0].height == 48.5
    assert len(parsed) == 2 and not cache.exists()


def test_malformed_coordinates_stay_as_they_are(tmp_path: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path, [[float("nan")] * 6, ["a", None, True], 1e400])
    for _ in range(2):
        assert (
            repr(dataset.read(tmp_path, "val")[0].segmentation[:2])
            == f"[[{', '.join(['nan'] * 6)}], ['a', None, True]]"
        )
    assert len(parsed) == 1


def test_a_split_without_a_sentence_stays(tmp_path: Path, parsed: list[Path]) -> None:
    dataset = own(tmp_path, sentences=[])
    for _ in range(2):
        assert dataset.scan(tmp_path)["val"].samples == []
        with pytest.raises(UserError, match="own has no referent in the split 'val'; it has val"):
            dataset.read(tmp_path, "val")
    assert len(parsed) == 1


BUILD = """
import os, signal, sys
from pathlib import Path
from ris_bench.data import index
from ris_bench.data.dataset import named
index.folder = lambda: Path(sys.argv[2])
if len(sys.argv) > 3:
    replace = os.replace
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
print(len(named("refcoco").read(Path(sys.argv[1]), "val")))
"""


def build(data: Path, cache: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, data, cache, *more], stdout=subprocess.PIPE, text=True)


def test_a_build_that_is_killed_and_several_at_once(tmp_path: Path, cache: Path, parsed: list[Path]) -> None:
    dataset = replica.write(named("refcoco"), tmp_path)
    assert build(tmp_path, cache, "killed").wait() == -signal.SIGKILL
    assert [path.name[0] for path in cache.iterdir()] == ["."]  # Unfinished, and under a name that is never read.
    builders = [build(tmp_path, cache) for _ in range(3)]
    assert [(one.communicate()[0], one.returncode) for one in builders] == [("6\n", 0)] * 3
    assert len([path for path in cache.iterdir() if path.name[0] != "."]) == 1
    assert len(dataset.read(tmp_path, "val")) == 6 and not parsed
