"""What a score can hide: leaks between splits, rules of the ground truth, expressions that are cut."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import replica

from ris_bench.audit import Overlap, audit, separate
from ris_bench.cli import main
from ris_bench.data.dataset import named
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError


def samples(*images: int) -> list[Sample]:
    sample = Sample("d", "s", 1, 1, 0, 1, 1, "cup", "the cup", "the cup", Path(), 4, 4, [])
    return [replace(sample, ref_id=i, image_path=Path(f"{image}.jpg")) for i, image in enumerate(images)]


TRAINING, EVALUATED = samples(1, 1, 2, 3), {"val": samples(8, 9), "testA": samples(3, 1, 7)}


def test_leaks_are_refused_filtered_or_allowed():
    with pytest.raises(
        UserError, match=r"^2 of the 3 images to train on are evaluated too, in testA; .*leakage: filter"
    ):
        separate(TRAINING, EVALUATED, "forbid")
    assert separate(TRAINING, EVALUATED, "filter") == TRAINING[2:3]
    assert separate(TRAINING, EVALUATED, "allow") == TRAINING
    assert separate(TRAINING, {"val": EVALUATED["val"]}, "forbid") == TRAINING
    with pytest.raises(UserError, match="all 1 images to train on are evaluated too"):
        separate(samples(1), EVALUATED, "filter")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """RefCOCO+ shares val and its tests with RefCOCO, and RefCOCOg's splits by object share their two images."""
    for name in ("refcoco", "refcoco+", "refcocog-google"):
        replica.write(named(name), tmp_path)
    return tmp_path


def test_an_audit_finds_what_was_planted(data: Path):
    path = data / "refcoco" / "refs(unc).p"
    text = path.read_bytes()
    cut = b" red cup"
    assert text.count(cut)
    overlaps, splits = audit([named("refcoco"), named("refcocog-google")], data)
    # Both replicas number their images alike: 100 and 101 are RefCOCO's train and all of RefCOCOg.
    assert overlaps == [
        Overlap("refcoco train", "refcocog-google val", 2, 2),
        Overlap("refcocog-google train", "refcocog-google val", 2, 2),
    ]
    assert [(s.name, s.referents, s.holes, s.expressions, s.cut) for s in splits] == [
        (f"{name} {split}", 3, 1, 6, 0)
        for name, of in (("refcoco", ("train", "val", "testA", "testB")), ("refcocog-google", ("train", "val")))
        for split in of
    ]


def test_an_expression_of_as_many_tokens_as_fit_is_not_cut(tmp_path: Path):
    dataset = named("grefcoco")
    replica.write(dataset, tmp_path, json_refs=True)
    path = tmp_path / "grefcoco" / "grefs(unc).json"
    record = json.loads(path.read_text())
    for number, ref in enumerate(record[:2]):
        ref["sentences"][0]["sent"] = " ".join(["cup"] * (dataset.word_len - 2 + number))
    path.write_text(json.dumps(record))
    assert audit([dataset], tmp_path)[1][0].cut == 1


def test_the_command(data: Path, capsys):
    assert main(["data", "audit", "refcoco", "refcocog-google", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "refcoco train" in out and "2 of 2 (100.0%)" in out and "1 of 3" in out
    assert main(["data", "audit", "--data", str(data), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {each["name"].split()[0] for each in record["splits"]} == {"refcoco", "refcoco+", "refcocog-google"}
    assert main(["data", "audit", "refcoco", "--data", str(data)]) == 0
    assert "No training split shares an image" in capsys.readouterr().out
    assert main(["data", "audit", "--data", str(data / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
