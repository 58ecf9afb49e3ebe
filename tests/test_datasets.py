"""gRefCOCO, several data sets at once, and one's own: what an expression means may be several objects, or nothing."""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import replica
import torch
from PIL import Image
from test_evaluation import SETTINGS, Bright

from ris_bench import evaluation
from ris_bench.data.check import check
from ris_bench.data.dataset import DATASETS, chosen, named
from ris_bench.data.samples import NO_TARGET, Sample, draw, shuffled
from ris_bench.errors import UserError
from ris_bench.loading import ReferentBatches, Tokenizer
from ris_bench.records import Choice, plain, tuples
from ris_bench.training import segmentation_loss

PARTS = ("refcoco", "refcoco+", "refcocog-umd")


# gRefCOCO


@pytest.fixture(scope="module", params=[True, False], ids=["json", "pickle"])
def generalized(request, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """train: three referents of one object each, one of two objects, one of none; two sentences each."""
    data = tmp_path_factory.mktemp("grefcoco")
    replica.write(named("grefcoco"), data, json_refs=request.param)
    return named("grefcoco").read(data, "train")


def test_an_expression_may_mean_several_objects(generalized: list[Sample]) -> None:
    single, several = generalized[0], generalized[6]
    assert (single.ann_ids, several.ann_ids) == ((1000,), (1000, 1001))
    assert (several.ann_id, several.category) == (1000, "cup")
    union = replica.expected([*replica.SQUARE, *replica.SEVERAL])
    np.testing.assert_array_equal(several.mask(), union)
    assert union.sum() > single.mask().sum()


def test_an_expression_may_mean_nothing(generalized: list[Sample]) -> None:
    nothing = generalized[8]
    assert (nothing.ann_id, nothing.ann_ids, nothing.category) == (NO_TARGET, (), "")
    assert nothing.mask().shape == (replica.HEIGHT, replica.WIDTH) and not nothing.mask().any()
    assert nothing.expression == "the red cup"


def test_objects_of_several_categories_are_named_once_each(tmp_path: Path) -> None:
    replica.write(named("grefcoco"), tmp_path, json_refs=True)
    path = tmp_path / "grefcoco" / "instances.json"
    record = json.loads(path.read_text())
    record["categories"].append({"id": 2, "name": "dog"})
    record["annotations"][1]["category_id"] = 2
    path.write_text(json.dumps(record))
    assert named("grefcoco").read(tmp_path, "train")[6].category == "cup+dog"


def test_a_list_with_one_annotation_that_is_not_there_is_refused(tmp_path: Path) -> None:
    replica.write(named("grefcoco"), tmp_path, json_refs=True)
    path = tmp_path / "grefcoco" / "grefs(unc).json"
    record = json.loads(path.read_text())
    record[3]["ann_id"] = [1000, 99]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"referent 4 of grefcoco points to annotation \[1000, 99\] of image 100"):
        named("grefcoco").read(tmp_path, "train")


def test_run_lengths_and_polygons_of_one_referent_are_united(generalized: list[Sample]) -> None:
    several = Sample(**{**vars(generalized[6]), "segmentation": [replica.crowd(), *replica.SQUARE]})
    expected = np.maximum(replica.expected(replica.crowd()), replica.expected(replica.SQUARE))
    np.testing.assert_array_equal(several.mask(), expected)


def test_training_meets_expressions_of_nothing(generalized: list[Sample]) -> None:
    batches = ReferentBatches(generalized, Tokenizer(20), 32, 5, seed=0)
    (batch,) = batches.epoch(0)
    empty = [i for i, index in enumerate(batch.index_B.tolist()) if not generalized[index].ann_ids]
    assert len(empty) == 1 and not batch.mask_B1HW[empty].any()
    # The referents of one object and of that and another share their first annotation and not their mask.
    assert len({mask.sum().item() for mask in batch.mask_B1HW}) == 5
    for logit in (-20.0, 0.0, 20.0):
        assert segmentation_loss(torch.full((5, 1, 8, 8), logit), batch.mask_B1HW, dice=1.0).isfinite()


def test_evaluation_meets_expressions_of_nothing(generalized: list[Sample], tmp_path: Path) -> None:
    frame = evaluation.evaluate(Bright(), generalized, **SETTINGS)
    assert frame["target"].tolist() == [int(sample.mask().sum()) for sample in generalized]
    assert frame["target"].tolist()[-2:] == [0, 0] and (frame["union"] == frame["predicted"]).iloc[-2:].all()
    assert 0 <= evaluation.scores(frame).miou <= 1
    evaluation.write({"train": frame}, tmp_path / "expressions.parquet")
    assert pd.read_parquet(tmp_path / "expressions.parquet")["ann_id"].tolist()[-2:] == [NO_TARGET] * 2
    evaluation.overlays(Bright(), generalized[-2:], tmp_path / "overlays", **SETTINGS)
    assert len(list((tmp_path / "overlays").iterdir())) == 2


# Several data sets at once


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for part in PARTS:
        replica.write(named(part), folder)
    return folder


def mix(*parts: object):
    return named({"mixed": {"parts": list(parts)}})


def test_a_mix_trains_on_all_and_reports_each_by_itself(data: Path) -> None:
    mixed = mix(*PARTS)
    assert mixed.train_splits == ("train",)
    assert mixed.eval_splits[:4] == ("val", "val/refcoco", "testA/refcoco", "testB/refcoco")
    assert mixed.eval_splits[4:] == (
        *("val/refcoco+", "testA/refcoco+", "testB/refcoco+", "val/refcocog-umd", "test/refcocog-umd"),
    )
    assert mixed.word_len == 22
    for split in ("train", "val"):
        apart = [sample for part in PARTS for sample in named(part).read(data, split)]
        assert mixed.read(data, split) == apart
    samples = mixed.read(data, "testA/refcoco+")
    assert samples == named("refcoco+").read(data, "testA")
    assert {(s.dataset, s.split) for s in samples} == {("refcoco+", "testA")}
    mixed.locate(data)


@pytest.mark.parametrize("split", ["testA", "test/refcoco", "train/refcoco", "val/refcocog-google", "val/"])
def test_a_mix_has_no_other_splits(split: str, data: Path) -> None:
    with pytest.raises(UserError, match=f"mixed has no split '{split}'; its splits are train, val, val/refcoco"):
        mix(*PARTS).read(data, split)


def test_a_mix_draws_for_every_referent_apart(data: Path) -> None:
    """Datasets number alike: their referents must not share the draws of sentence and order."""
    samples = mix(*PARTS).read(data, "train")
    batches = ReferentBatches(samples, Tokenizer(22), 32, 9, seed=0)
    assert batches.num_referents == 9
    drawn = Counter()
    for epoch in range(40):
        order = [samples[i] for batch in batches._plan(epoch) for i in batch]
        assert {s.referent for s in order} == {s.referent for s in samples}
        sentences = {s.referent: s.sentence_index for s in order}
        drawn["one sentence"] += len({sentences[part, 1] for part in PARTS}) == 1
        drawn["side by side"] += len(list(groupby(order, lambda s: s.ref_id))) == 3
    assert 0 < drawn["one sentence"] < 25 and drawn["side by side"] < 5
    assert [s.referent for s in shuffled(samples, 0)] == [s.referent for s in samples]


def test_one_dataset_draws_by_its_ids_alone(data: Path) -> None:
    samples = named("refcoco").read(data, "train")
    (order,) = ReferentBatches(samples, Tokenizer(17), 32, 9, seed=3)._plan(1)
    assert [samples[i].ref_id for i in order] == sorted((1, 2, 3), key=lambda ref_id: draw("order", 3, 1, ref_id))


@pytest.mark.parametrize(
    "parts, message",
    [
        (["refcoco"], "has the parts refcoco; name two or more, each once"),
        ([], "has the parts none; name two or more"),
        (["refcoco", "refcoco"], "has the parts refcoco, refcoco; name two or more, each once"),
        (["refcoco", "refcocos"], "there is no dataset 'refcocos'"),
        (["refcoco", {"mixed": {"parts": ["refcoco+", "grefcoco"]}}], "cannot have the part mixed"),
        (["refcoco", {"own": {"file": "a.json", "fiel": 1}}], "has no option 'fiel'"),
    ],
)
def test_what_cannot_be_mixed(parts: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix(*parts)


def test_a_part_of_a_plug_in_is_refused() -> None:
    with DATASETS.plugged("ab" * 32) as new:
        DATASETS("plugged")(lambda: named("refcoco"))
    try:
        with pytest.raises(UserError, match="cannot have the part plugged, which a plug-in made"):
            mix("refcoco+", "plugged")
    finally:
        for name in new:
            del DATASETS._factories[name], DATASETS._code[name]


def test_choices_survive_json() -> None:
    for value in ({"mixed": {"parts": ["refcoco", {"own": {"file": "a.json"}}]}}, {"own": {"file": "a.json"}}):
        choice = chosen(value)
        assert Choice(**tuples(json.loads(json.dumps(plain(choice))))) == choice
        assert DATASETS.build(choice).eval_splits[0] == "val"


# One's own


def document() -> dict:
    return {
        "info": {"year": 2024},
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 48, "width": 64, "license": 3},
            {"id": 2, "file_name": "more/b.jpg", "height": 48, "width": 64},
        ],
        "annotations": [
            {"id": 7, "image_id": 1, "segmentation": replica.SQUARE, "category_id": 3, "iscrowd": 0},
            {"id": 8, "image_id": 1, "segmentation": replica.crowd()},
            {"id": 9, "image_id": 2, "segmentation": replica.BORDER, "category_id": 3},
        ],
        "categories": [{"id": 3, "name": "cup"}],
        "expressions": [
            {"id": 5, "image_id": 1, "annotation_ids": [7], "split": "train", "sentences": [" The red cup", "cup"]},
            {"id": 4, "image_id": 1, "annotation_ids": [7, 8], "split": "train", "sentences": ["all"]},
            {"id": 6, "image_id": 2, "annotation_ids": [], "split": "val", "sentences": ["a dog"]},
            {"id": 0, "image_id": 2, "annotation_ids": [9], "split": "val", "sentences": ["cup at the edge"]},
        ],
    }


def write(data: Path, record: object) -> Path:
    folder = data / "mine"
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "more/b.jpg"):
        Image.new("RGB", (64, 48)).save(folder / name)
    (folder / "cups.json").write_text(json.dumps(record))
    return data


def own(**options: object):
    return named({"own": {"file": "mine/cups.json", **options}})


def test_ones_own(tmp_path: Path) -> None:
    write(tmp_path, document())
    train, val = own().read(tmp_path, "train"), own().read(tmp_path, "val")
    assert [(s.ref_id, s.sentence_index, s.sent_id, s.expression) for s in train] == [
        (4, 0, 2, "all"), (5, 0, 0, "The red cup"), (5, 1, 1, "cup")
    ]  # fmt: skip
    assert train[1].raw == " The red cup" and train[1].category == "cup" and train[0].category == "cup"
    assert {s.dataset for s in train + val} == {"own"}
    assert [s.ann_ids for s in train + val] == [(7, 8), (7,), (7,), (9,), ()]
    both = np.maximum(replica.expected(replica.SQUARE), replica.expected(replica.crowd()))
    np.testing.assert_array_equal(train[0].mask(), both)
    assert not val[1].mask().any() and val[1].image().size == (64, 48)
    assert [(row.split, row.verdict) for row in check(own(), tmp_path)] == [("train", "ok"), ("val", "ok")]


def test_its_images_may_lie_elsewhere_and_its_splits_have_other_names(tmp_path: Path) -> None:
    record = document()
    record["expressions"][3]["split"] = "night"
    write(tmp_path, record)
    (tmp_path / "photos").mkdir()
    (tmp_path / "mine" / "a.jpg").rename(tmp_path / "photos" / "a.jpg")
    (tmp_path / "mine" / "more").rename(tmp_path / "photos" / "more")
    with pytest.raises(UserError, match=r"mine lacks 1 of the images: a\.jpg; put them there, or name their folder"):
        own().read(tmp_path, "train")
    dataset = own(images="photos", eval_splits=["val", "night"], name="cups", word_len=30)
    assert dataset.word_len == 30 and len(dataset.read(tmp_path, "night")) == 1
    assert {s.dataset for s in dataset.read(tmp_path, "train")} == {"cups"}
    with pytest.raises(UserError, match="own has no split 'night'; its splits are train, val"):
        own(images="photos").read(tmp_path, "night")


def test_several_of_ones_own_are_mixed_by_name(tmp_path: Path) -> None:
    write(tmp_path, document())
    a, b = ({"own": {"file": "mine/cups.json", "name": name}} for name in "ab")
    mixed = mix(a, b)
    assert mixed.splits == ("train", "val", "val/a", "val/b")
    assert len({s.referent for s in mixed.read(tmp_path, "train")}) == 4
    with pytest.raises(UserError, match="has the parts a, a"):
        mix(a, a)


def test_the_content_may_be_pinned(tmp_path: Path) -> None:
    write(tmp_path, document())
    with pytest.raises(
        UserError, match="has the sha256 [0-9a-f]{64}, and the option 'sha256' of own another"
    ) as raised:
        own(sha256="0" * 64).read(tmp_path, "val")
    digest = str(raised.value).split("sha256 ")[1][:64]
    assert own(sha256=digest).read(tmp_path, "val")


BAD = [
    ("expressions", 1, 3, r"expressions\[1\] is 3, which is no mapping"),
    ("expressions", 0, {"sentence": "x"}, r"expressions\[0\] has the key 'sentence', which is not known"),
    ("expressions", 0, {"sentences": "cup"}, r"expressions\[0\]: sentences is 'cup', which is not a list of str"),
    ("expressions", 0, {"annotation_ids": 7}, r"expressions\[0\]: annotation_ids is 7, which is not a list of int"),
    ("expressions", 0, {"sentences": ["\ud83d"]}, "referent 5 of own has an expression that is no Unicode text"),
    ("expressions", 0, {"annotation_ids": [99]}, r"annotation \[99\] of image 1, which is not in .*; correct its ids"),
    ("expressions", 0, {"annotation_ids": [9]}, r"referent 5 of own points to annotation \[9\] of image 1"),
    ("expressions", 0, {"image_id": 99}, r"points to annotation \[7\] of image 99"),
    ("images", 0, {"width": "64"}, r"images\[0\]: width is '64', which is not int"),
    ("images", 0, {"width": True}, r"images\[0\]: width is True, which is not int"),
    ("images", 0, {"width": 0}, "image 1 has 0 x 48 pixels"),
    ("images", 1, {"id": 1}, r"images\[1\] has the id 1; ids count from 0, and each is there once"),
    ("images", 0, {"file_name": "../a.jpg"}, r"lacks 1 of the images: \.\./a\.jpg"),
    ("images", 0, {"file_name": "/etc/a.jpg"}, r"lacks 1 of the images: (\.\./)+etc/a\.jpg"),
    ("images", 0, {"file_name": "\x1b[2J\0.jpg"}, r"lacks 1 of the images: '\\x1b\[2J\\x00\.jpg'"),
    ("annotations", 0, {"id": -1}, r"annotations\[0\] has the id -1; ids count from 0"),
    ("annotations", 0, {"id": 10**40}, r"annotations\[0\] has the id 10+\.\.\.0+; ids count from 0"),
    ("annotations", 0, {"category_id": 99}, "annotation 7 has the category 99, which is not listed"),
    ("annotations", 0, {"segmentation": ["012345"]}, "annotation 7 of own .* is malformed"),
    ("annotations", 0, {"segmentation": None}, "segmentation is None, which is not a list of Any or a mapping"),
]


@pytest.mark.parametrize("key, number, change, message", BAD)
def test_an_entry_that_does_not_follow_the_schema(
    key: str, number: int, change: object, message: str, tmp_path: Path
) -> None:
    record = document()
    entry = record[key][number]
    record[key][number] = {**entry, **change} if isinstance(change, dict) else change
    write(tmp_path, record)
    with pytest.raises(UserError, match=message) as raised:
        [sample.mask() for sample in own().read(tmp_path, "train")]
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "key, missing, message",
    [
        ("images", None, "has no list 'images'; the module ris_bench.data.own shows"),
        ("expressions", None, "has no list 'expressions'"),
        ("expressions", ("split", "annotation_ids"), r"expressions\[0\] lacks annotation_ids, split"),
        ("annotations", ("segmentation",), r"annotations\[0\] lacks segmentation"),
    ],
)
def test_what_the_schema_asks_for(key: str, missing: tuple | None, message: str, tmp_path: Path) -> None:
    record = document()
    if missing is None:
        del record[key]
    for name in missing or ():
        del record[key][0][name]
    write(tmp_path, record)
    with pytest.raises(UserError, match=message):
        own().read(tmp_path, "train")


@pytest.mark.parametrize("text, message", [("[1]", "holds .*, which is no mapping"), ("{", "is damaged .* correct it")])
def test_a_file_that_is_something_else(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, document())
    (tmp_path / "mine" / "cups.json").write_text(text)
    with pytest.raises(UserError, match=message):
        own().read(tmp_path, "val")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"file": "/etc/cups.json"}, "option 'file' of dataset 'own' is '/etc/cups.json'; write a path that starts"),
        ({"images": "../photos"}, "option 'images' of dataset 'own' is '../photos'"),
        ({"name": "a/b"}, "option 'name' of dataset 'own' is 'a/b'; use letters"),
        ({"name": "shuffled"}, "and not 'shuffled'"),
        ({"word_len": 2}, "read 3 to 77 tokens"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        own(**options)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own needs .*mine/cups\.json and .*photos; its options 'file' and 'images'"):
        own(images="photos").locate(tmp_path)
