"""`data check`: a replica of every dataset passes, and every fault is counted where it is, without hiding another."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import replica
from PIL import Image

from ris_bench import cli
from ris_bench.data import refcoco
from ris_bench.data.check import check, check_all, text
from ris_bench.data.dataset import DATASETS, Counts, named
from ris_bench.data.refer import ReferDataset
from ris_bench.errors import UserError

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"
NAMES = [name for name in DATASETS if name not in ("mixed", "own", "scenes")]
SPLITS = [(name, split) for name in NAMES for split in named(name).splits]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ReferDataset, Path]]:
    made = {}
    for name in NAMES:
        data = tmp_path_factory.mktemp(name)
        made[name] = replica.write(named(name), data, json_refs=name == "grefcoco"), data
    return made


@pytest.fixture
def small(tmp_path: Path) -> tuple[ReferDataset, Path]:
    """A replica to be damaged."""
    return replica.write(named("refcocog-umd"), tmp_path), tmp_path


def verdicts(dataset: ReferDataset, data: Path) -> dict[str, str]:
    return {row.split: row.verdict for row in check(dataset, data)}


def edit(path: Path, change) -> None:
    """Change a JSON file or a pickle in place."""
    pickled = path.suffix == ".p"
    record = pickle.loads(path.read_bytes()) if pickled else json.loads(path.read_text())
    change(record)
    path.write_bytes(pickle.dumps(record, 2)) if pickled else path.write_text(json.dumps(record))


def test_what_is_published() -> None:
    """The sums of the splits are what the papers say of the whole, where splits share no referent."""
    totals = {"refcoco": (50_000, 142_210), "refcoco-google": (50_000, None), "refcoco+": (49_856, 141_564)}
    totals |= {"refcocog-umd": (49_822, 95_010), "refcocog-google": (49_822, 95_010)}
    assert totals.keys() == refcoco.PUBLISHED.keys() == set(NAMES) - {"grefcoco"}
    for name, (referents, expressions) in totals.items():
        counts = refcoco.PUBLISHED[name]
        assert tuple(counts) == named(name).splits
        assert sum(c.referents for c in counts.values()) == referents
        if expressions:
            assert sum(c.expressions for c in counts.values()) == expressions


@pytest.mark.parametrize("name", NAMES)
def test_a_replica_passes(name: str, replicas) -> None:
    dataset, data = replicas[name]
    rows = check(dataset, data)
    assert [row.split for row in rows] == list(named(name).splits)
    assert all(row.ok and row.verdict == "ok" for row in rows)
    assert {row.split: row.counts for row in rows} == dataset.published
    assert all(row.empty_masks == 0 for row in rows)


@pytest.mark.parametrize("name, split", SPLITS)
def test_a_replica_loads_with_its_quirks(name: str, split: str, replicas) -> None:
    dataset, data = replicas[name]
    samples = dataset.read(data, split)
    ours = [s for s in samples if s.split == split]
    assert len(ours) == len(samples) == dataset.published[split].expressions
    # The name of the image is not the one that the referent gives.
    assert {len(s.image_path.stem.split("_")) for s in samples} == {3}
    assert {(s.expression, s.raw) for s in samples} == {("the red cup", "The RED cup!"), ("the red cup", "the red cup")}
    assert len({(s.dataset, s.ref_id, s.sentence_index) for s in samples}) == len(samples)
    single = [s for s in samples if s.ref_id % 5 in (1, 2, 3)] if name == "grefcoco" else samples
    for sample, segmentation in zip(single[::2], [replica.SQUARE, replica.SEVERAL, replica.BORDER], strict=True):
        np.testing.assert_array_equal(sample.mask(), replica.expected(segmentation))
        sample.check_image()


def test_objects_not_images_are_split_in_the_google_partitions(replicas) -> None:
    for name in NAMES:
        dataset, data = replicas[name]
        images = [{s.image_id for s in dataset.read(data, split)} for split in dataset.splits]
        assert (len(set.union(*images)) < sum(map(len, images))) == name.endswith("-google")


def test_refcocog_google_has_no_test_split(replicas) -> None:
    dataset, data = replicas["refcocog-google"]
    with pytest.raises(UserError, match="refcocog-google has no split 'test'; its splits are train, val"):
        dataset.read(data, "test")


def test_the_refs_are_a_pickle_of_python_2(replicas) -> None:
    _, data = replicas["refcoco"]
    written = (data / "refcoco" / "refs(unc).p").read_bytes()
    assert written.startswith(b"\x80\x02") and b"U\x05train" in written and b"train\x94" not in written


def test_a_crowd_is_read_from_its_run_lengths(small) -> None:
    dataset, data = small

    def refer_to_the_crowd(refs: list) -> None:
        refs[0]["ann_id"] = 5000

    edit(data / "refcocog" / "refs(umd).p", refer_to_the_crowd)
    sample = dataset.read(data, "train")[0]
    np.testing.assert_array_equal(sample.mask(), replica.expected(replica.crowd()))
    assert set(verdicts(dataset, data).values()) == {"ok"}


def test_ids_collide_between_datasets_and_keep_apart(tmp_path: Path) -> None:
    parts = ["refcoco", "refcoco+", "refcocog-umd"]
    for part in parts:
        replica.write(named(part), tmp_path)
    mixed = named({"mixed": {"parts": parts}})
    samples = mixed.read(tmp_path, "train")
    assert len({s.ref_id for s in samples}) == 3 and len({s.referent for s in samples}) == 9
    assert {row.dataset for row in check(mixed, tmp_path)} == set(parts)


def test_other_counts_than_published_differ_and_all_else_is_said_to_be_well(replicas) -> None:
    dataset, data = replicas["refcoco"]
    other = dataset.published | {"val": replace(dataset.published["val"], images=1500)}
    rows = check(replace(dataset, published=other), data)
    assert {row.split: row.verdict for row in rows if not row.ok} == {"val": "differs from published"}
    line = next(line for line in text(rows).splitlines() if " val " in line)
    assert "2 (published 1,500)" in line
    assert [cell.strip() for cell in line.split("  ") if cell.strip()][:4] == ["refcoco", "val", "3", "6"]


def test_what_is_not_published_cannot_differ(replicas) -> None:
    dataset, data = replicas["refcoco-google"]
    rows = check(replace(dataset, published={"train": Counts(3, None, 2)}), data)
    assert all(row.ok for row in rows)
    train, val, _ = text(rows).splitlines()[2:5]
    assert train.count("not published") == 1 and "6 (not published)" in train
    assert val.count("not published") == 3


def test_every_fault_is_counted_and_none_hides_another(small) -> None:
    dataset, data = small
    refs, instances = data / "refcocog" / "refs(umd).p", data / "refcocog" / "instances.json"

    def damage_refs(refs: list) -> None:
        refs[0]["ann_id"] = 99  # train
        refs[1]["image_id"] = 99
        refs[4]["ref_id"] = refs[3]["ref_id"]  # val
        refs[5]["sentences"][0]["raw"] = "\ud83d"

    def damage_instances(record: dict) -> None:
        odd, nan, outside = [0, 0, 5, 0, 5, 5, 0], [0, 0, float("nan"), 1, 5, 5], [900, 900, 950, 900, 950, 950]
        for annotation, polygon in zip(record["annotations"][6:9], (odd, nan, outside), strict=True):  # test
            annotation["segmentation"] = [polygon]

    edit(refs, damage_refs)
    edit(instances, damage_instances)
    (data / "images" / "train2014" / "COCO_train2014_000000000101.jpg").unlink()
    Image.new("RGB", (9, 9)).save(data / "images" / "train2014" / "COCO_train2014_000000000110.jpg")
    (data / "images" / "train2014" / "COCO_train2014_000000000120.jpg").write_bytes(b"")
    rows = {row.split: row for row in check(dataset, data)}
    assert {split: row.verdict for split, row in rows.items()} == {
        "train": "differs from published, bad referents: 2, missing images: 1",
        "val": "differs from published, bad referents: 2, bad images: 1",
        "test": "bad images: 1, bad masks: 2",
    }
    assert not any(row.ok for row in rows.values())
    assert rows["test"].empty_masks == 1 and rows["test"].counts == dataset.published["test"]
    said = text(list(rows.values()))
    assert "refcocog-umd train: referent 1 of refcocog-umd points to annotation 99 of image 100" in said
    assert "COCO_train2014_000000000101.jpg is missing" in said
    assert "has 9 x 9 pixels where its annotation says 64 x 48" in said
    assert "refcocog-umd val: referent 4 of refcocog-umd is there twice" in said
    assert "is no Unicode text" in said
    assert "refcocog-umd test: 1 referents whose annotations cover no pixel" in said


def test_reading_refuses_what_the_check_counts(small) -> None:
    dataset, data = small
    edit(data / "refcocog" / "refs(umd).p", lambda refs: refs[0].update(ann_id=99))
    with pytest.raises(UserError, match="points to annotation 99") as raised:
        dataset.read(data, "train")
    assert check(dataset, data)[0].faults.bad_referents == [str(raised.value)]
    assert dataset.read(data, "val")


def test_only_headers_are_read(small, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, data = small
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the pixels were decoded"))
    assert set(verdicts(dataset, data).values()) == {"ok"}


def test_a_split_that_the_dataset_does_not_use_is_counted_and_no_fault(small) -> None:
    dataset, data = small
    edit(data / "refcocog" / "refs(umd).p", lambda refs: refs.append({**refs[0], "ref_id": 90, "split": "te\x1bst2"}))
    rows = check(dataset, data)
    assert (rows[-1].verdict, rows[-1].counts.referents, rows[-1].ok) == ("not used", 1, True)
    assert "\x1b" not in text(rows)


def test_a_split_that_is_not_there(small) -> None:
    dataset, data = small
    edit(data / "refcocog" / "refs(umd).p", lambda refs: refs.__setitem__(slice(6, None), []))
    assert verdicts(dataset, data) == {"train": "ok", "val": "ok", "test": "no such split in the file"}


@pytest.mark.parametrize("file", ["instances.json", "refs(umd).p"])
def test_a_damaged_file_is_one_row(file: str, small) -> None:
    dataset, data = small
    path = data / "refcocog" / file
    path.write_bytes(path.read_bytes()[:-50])
    (row,) = check(dataset, data)
    assert (row.verdict, row.ok) == ("bad files: 1", False)
    assert "is damaged" in text([row])


def run(*arguments: object) -> int:
    return cli.main(["data", "check", *map(str, arguments)])


def test_the_command_and_its_exit_codes(replicas, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, data = replicas["refcoco"]
    assert run("refcoco", "--data", data) == 1
    assert "differs from published" in capsys.readouterr().out
    monkeypatch.setitem(refcoco.PUBLISHED, "refcoco", dataset.published)
    assert run("refcoco", "--data", data) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] + line.split()[-1:] for line in lines[2:]] == [
        ["refcoco", split, "ok"] for split in dataset.splits
    ]
    assert run("refcoco", "--data", data, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["split"] for row in rows] == list(dataset.splits) and all(row["ok"] for row in rows)
    assert rows[0]["counts"] == rows[0]["published"] == {"referents": 3, "expressions": 6, "images": 2}
    assert rows[0]["faults"]["bad_masks"] == {"count": 0, "first": []}
    assert run("--all", "--data", data) == 0
    found = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert found["refcoco+"].endswith("not there") and found["scenes"].endswith("not there")
    assert not {"own", "mixed"} & found.keys()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["refcocos"], "there is no dataset 'refcocos'"),
        (["refcoco+"], "refcoco+ needs refcoco+/instances.json"),
        (["mixed"], "needs the option 'parts'"),
        (["{a: {}, b: {}}"], "write a name"),
        (["refcoco: {size: 3}"], "has no option 'size'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, replicas, capsys) -> None:
    assert run(*arguments, "--data", replicas["refcoco"][1]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


def test_nothing_there_is_bad_input(tmp_path: Path, capsys) -> None:
    assert run("--all", "--data", tmp_path) == 2
    assert "holds none of grefcoco, refcoco" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["refcoco", "--all"]])
def test_a_name_or_all(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2


def test_generated_scenes_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path))
    rows = check(named({"scenes": {"num_train": 3, "num_eval": 2}}), tmp_path / "nowhere")
    assert [(row.split, row.counts.images, row.ok) for row in rows] == [
        ("train", 3, True), ("val", 2, True), ("testA", 2, True), ("testB", 2, True)
    ]  # fmt: skip


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_the_real_slice_passes_apart_from_its_counts() -> None:
    train, val = check(named("refcocog-google"), SLICE)
    assert train.verdict == "no such split in the file"
    assert (val.verdict, val.counts) == ("differs from published", Counts(19, 19, 18))
    assert val.empty_masks == 0
    part = replace(named("refcocog-google"), published={"val": Counts(19, 19, 18)}, train_splits=())
    assert [row.verdict for row in check(part, SLICE)] == ["ok"]
    assert "refcocog-google" in {row.dataset for row in check_all(SLICE) if row.verdict != "not there"}
