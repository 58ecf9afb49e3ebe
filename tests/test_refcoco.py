"""The REFER reader: what it joins, what it refuses, and that nothing in a file is ever executed."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_bench.data import refcoco
from ris_bench.data.refer import ReferDataset
from ris_bench.data.samples import Sample, shuffled
from ris_bench.errors import UserError

SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"
DATASETS = {
    "refcoco": refcoco.refcoco(),
    "refcoco+": refcoco.refcoco_plus(),
    "refcocog-umd": refcoco.refcocog_umd(),
    "refcocog-google": refcoco.refcocog_google(),
}
HEIGHT, WIDTH = 30, 40


def ref(ref_id: int, split: str, sentences: list[str], image_id: int = 1, ann_id: int = 10) -> dict:
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_7.jpg",  # As in the real files: not the name of the image.
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"sent": s, "raw": s.upper(), "sent_id": i, "tokens": s.split()} for i, s in enumerate(sentences)
        ],
    }


REFS = [
    ref(5, "train", ["the cup", "left cup"]),
    ref(3, "train", [" red cup ", "the cup", ""], image_id=2, ann_id=20),
    ref(4, "testA", ["a man"]),
    ref(6, "test", ["a dog"]),
]


def instances(segmentation: object = ((5, 5, 15, 5, 15, 15, 5, 15),)) -> dict:
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    annotation = {"category_id": 1, "iscrowd": 0, "segmentation": segmentation}
    return {
        "images": images,
        "annotations": [{"id": 10 * i, "image_id": i, **annotation} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cup"}],
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, "refcoco/refs(unc).p")


def write(root: Path, refs_path: str, image_folder: str = "images/train2014") -> Path:
    (root / refs_path).parent.mkdir(parents=True, exist_ok=True)
    (root / image_folder).mkdir(parents=True)
    (root / refs_path).write_bytes(pickle.dumps(REFS, protocol=2))
    (root / refs_path).with_name("instances.json").write_text(json.dumps(instances()))
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (200, i, 0)).save(root / image_folder / f"COCO_train2014_{i:012d}.jpg")
    return root


def read(root: Path, split: str = "train") -> list[Sample]:
    return DATASETS["refcoco"].read(root, split)


def segmented(root: Path, segmentation: object) -> Sample:
    (root / "refcoco" / "instances.json").write_text(json.dumps(instances(segmentation)))
    return read(root)[0]


def test_one_sample_per_expression_in_order_and_joined_by_image_id(root: Path) -> None:
    samples = read(root)
    assert [(s.ref_id, s.sentence_index) for s in samples] == [(3, 0), (3, 1), (3, 2), (5, 0), (5, 1)]
    first = samples[0]
    assert (first.expression, first.raw, first.category) == ("red cup", " RED CUP ", "cup")
    assert first.image_path.name == "COCO_train2014_000000000002.jpg"
    assert first.image().size == (WIDTH, HEIGHT)
    assert samples[2].expression == ""  # Kept: dropping it would change the denominator.
    assert samples[0].segmentation is samples[1].segmentation
    assert len(set(samples)) == 5


def test_other_objects_of_an_image_come_along_but_for_crowds_and_in_training(root: Path) -> None:
    document = instances()
    thing = {"image_id": 1, "category_id": 1, "segmentation": []}
    document["annotations"] += [{"id": 11, "iscrowd": 0, **thing}, {"id": 12, "iscrowd": 1, **thing}]
    (root / "refcoco" / "instances.json").write_text(json.dumps(document))
    assert [(other.ann_id, other.category) for other in read(root, "testA")[0].others] == [(11, "cup")]
    assert all(sample.others is None for sample in read(root))


def test_the_other_image_folder(tmp_path: Path) -> None:
    root = write(tmp_path, "refcoco/refs(unc).p", "images/mscoco/images/train2014")
    assert read(root)[0].image().size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("name, dataset", DATASETS.items())
def test_every_dataset_reads_its_own_files(name: str, dataset: ReferDataset, tmp_path: Path) -> None:
    write(tmp_path, f"{dataset.folder}/refs({dataset.partition}).p")
    assert {s.dataset for s in dataset.read(tmp_path, "train")} == {name}


def test_word_lengths_and_splits() -> None:
    assert {name: d.word_len for name, d in DATASETS.items()} == {
        "refcoco": 17,
        "refcoco+": 17,
        "refcocog-umd": 22,
        "refcocog-google": 22,
    }
    assert {name: " ".join(d.eval_splits) for name, d in DATASETS.items()} == {
        "refcoco": "val testA testB",
        "refcoco+": "val testA testB",
        "refcocog-umd": "val test",
        "refcocog-google": "val",
    }


def test_a_split_is_matched_by_equality(tmp_path: Path) -> None:
    write(tmp_path, "refcocog/refs(umd).p")
    assert [s.expression for s in DATASETS["refcocog-umd"].read(tmp_path, "test")] == ["a dog"]  # Not testA's man.


def test_unknown_and_empty_splits(root: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; its splits are train, val, testA, testB"):
        read(root, "test")
    with pytest.raises(UserError, match=r"refcoco has no referent in the split 'testB'; it has test, testA, train"):
        read(root, "testB")


def test_locate_names_everything_missing_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        DATASETS["refcocog-umd"].locate(tmp_path / "nowhere")
    message = str(raised.value)
    for part in ("refcocog/instances.json", "refcocog/refs(umd).p", "images/train2014", str(tmp_path), "--data"):
        assert part in message
    assert "\n" not in message
    (tmp_path / "refcocog").mkdir()
    (tmp_path / "refcocog" / "instances.json").touch()
    with pytest.raises(UserError) as raised:
        DATASETS["refcocog-umd"].locate(tmp_path)
    assert "instances.json" not in str(raised.value)


class Harm:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(protocol: int, root: Path, tmp_path: Path) -> None:
    marker, refs = tmp_path / "marker", root / "refcoco" / "refs(unc).p"
    refs.write_bytes(pickle.dumps([*REFS, Harm(marker)], protocol))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p is refused: it would load (posix|nt)\.system"):
        read(root)
    assert not marker.exists()
    pickle.loads(refs.read_bytes())  # The test can fail: the ordinary unpickler does run it.
    assert marker.exists()


@pytest.mark.parametrize("harmless", [np.float64(1), Path("x"), complex(1)])
def test_no_class_at_all_is_admitted(harmless: object, root: Path) -> None:
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(harmless, 2))
    with pytest.raises(UserError, match="it would load"):
        read(root)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol(protocol: int, root: Path) -> None:
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol))
    assert len(read(root)) == 5


def test_byte_strings_of_python_2(root: Path) -> None:
    # Python 2 wrote its native strings with these opcodes, which Python 3 never writes.
    text = pickle.dumps(REFS, 2)
    for word in (b"the cup", b"train", b"ref_id"):
        text = text.replace(
            b"X" + len(word).to_bytes(4, "little") + word, b"U" + len(word).to_bytes(1, "little") + word
        )
    assert b"U\x07the cup" in text
    (root / "refcoco" / "refs(unc).p").write_bytes(text)
    assert [s.expression for s in read(root)].count("the cup") == 2


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-20], lambda b: b"", lambda b: b"\x80\x02garbage", lambda b: b"<html>"]
)
def test_a_damaged_pickle(damage, root: Path) -> None:
    path = root / "refcoco" / "refs(unc).p"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"refs\(unc\)\.p is damaged"):
        read(root)


def test_a_truncated_instances_file(root: Path) -> None:
    path = root / "refcoco" / "instances.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match=r"instances\.json is damaged"):
        read(root)


@pytest.mark.parametrize("file, content", [("instances.json", b"[1]"), ("refs(unc).p", pickle.dumps({"a": 1}))])
def test_another_layout(file: str, content: bytes, root: Path) -> None:
    (root / "refcoco" / file).write_bytes(content)
    with pytest.raises(UserError, match="not in the REFER layout"):
        read(root)


@pytest.mark.parametrize("change", [{"ann_id": 99}, {"image_id": 99}, {"image_id": 2}])
def test_a_referent_without_its_annotation(change: dict, root: Path) -> None:
    broken = {**REFS[0], **change}
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([broken]))
    with pytest.raises(UserError, match="referent 5 of refcoco points to annotation"):
        read(root)


def test_a_missing_image_file(root: Path) -> None:
    (root / "images" / "train2014" / "COCO_train2014_000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of the images: COCO_train2014_000000000002\.jpg"):
        read(root)
    assert read(root, "testA")  # That split does not use it.


def test_an_image_name_that_leaves_its_folder(root: Path) -> None:
    record = instances()
    record["images"][0]["file_name"] = "../COCO_train2014_000000000001.jpg"
    (root / "refcoco" / "instances.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="lacks 1 of the images"):
        read(root)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a picture"])
def test_a_corrupt_image_names_its_file(damage, root: Path) -> None:
    sample = read(root)[0]
    sample.image_path.write_bytes(damage(sample.image_path.read_bytes()))
    with pytest.raises(UserError, match=r"000000000002\.jpg cannot be decoded"):
        sample.image()


def test_an_image_of_another_size(root: Path) -> None:
    sample = read(root)[0]
    Image.new("RGB", (HEIGHT, WIDTH)).save(sample.image_path)
    with pytest.raises(UserError, match="has 30 x 40 pixels where its annotation says 40 x 30"):
        sample.image()


def test_a_grey_image_becomes_rgb(root: Path) -> None:
    sample = read(root)[0]
    Image.new("L", (WIDTH, HEIGHT), 9).save(sample.image_path)
    assert sample.image().getpixel((0, 0)) == (9, 9, 9)


def test_polygons_are_united(root: Path) -> None:
    mask = segmented(root, [[0, 0, 10, 0, 10, 10, 0, 10], [5, 5, 15, 5, 15, 15, 5, 15], [1, 1, 2, 2]]).mask()
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:10, :10] = expected[5:15, 5:15] = 1
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, expected)


def test_a_first_polygon_of_two_points_makes_no_box(root: Path) -> None:
    assert segmented(root, [[0, 0, 10, 10]]).mask().sum() == 0


def test_a_polygon_is_cut_off_at_the_frame(root: Path) -> None:
    # Covers everything: the border itself (x = width) is a legal coordinate, and beyond it is cut off.
    assert segmented(root, [[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]]).mask().all()
    assert segmented(root, [[-9, -9, WIDTH + 9, -9, WIDTH + 9, HEIGHT + 9, -9, HEIGHT + 9]]).mask().all()
    mask = segmented(root, [[-10, -10, 5, -10, 5, 5, -10, 5]]).mask()
    assert mask[:5, :5].all() and mask.sum() == 25


@pytest.mark.parametrize("shift", [(100, 0), (-100, 0), (0, 100), (0, -100), (100, 100)])
def test_a_polygon_wholly_outside_is_an_empty_mask(shift: tuple[int, int], root: Path) -> None:
    polygon = (np.array([[5, 5], [15, 5], [15, 15]]) + shift).ravel().tolist()
    mask = segmented(root, [polygon]).mask()
    assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == 0


@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[0, 0, float("nan"), 0, 5, 5]],
        [["a", "b", "c", "d", "e", "f"]],
        [5],
        5,
        None,
        {"size": [HEIGHT, WIDTH]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": [3]},
        {"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]},
        {"size": [HEIGHT, WIDTH], "counts": ""},
        {"size": [HEIGHT, WIDTH], "counts": "5"},
        {"size": [HEIGHT, WIDTH], "counts": "zzzzzzzzzzzzzzzzzz"},
    ],
)
def test_a_malformed_segmentation(segmentation: object, root: Path) -> None:
    with pytest.raises(UserError, match="segmentation of annotation 20 of refcoco .* is malformed"):
        segmented(root, segmentation).mask()


def test_run_lengths_compressed_and_not(root: Path) -> None:
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        mask = (rng.random((HEIGHT, WIDTH)) < share).astype(np.uint8)
        mask[:, 10:30] = 0  # A run long enough for several letters, and differences of both signs.
        rle = coco_mask.encode(np.asfortranarray(mask))
        compressed = {"size": rle["size"], "counts": rle["counts"].decode()}
        np.testing.assert_array_equal(segmented(root, compressed).mask(), mask)
        changes = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2))  # Runs go down the columns.
        plain = {"size": rle["size"], "counts": np.diff(changes, prepend=0).tolist()}
        np.testing.assert_array_equal(segmented(root, plain).mask(), mask)


def sample(ref_id: int, sentence_index: int) -> Sample:
    expression = f"{ref_id}/{sentence_index}"
    return Sample(
        "d", "val", ref_id, 0, sentence_index, 1, 1, "cup", expression, expression.upper(), Path("x"), 2, 2, []
    )


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2, 3], [3, 3], [1] * 7, [2, 5, 1, 3, 4], [4, 1, 1, 1, 1]])
@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_takes_every_expression_from_another_referent(sizes: list[int], seed: int) -> None:
    samples = [sample(ref_id, i) for ref_id, size in enumerate(sizes) for i in range(size)]
    dealt = shuffled(samples, seed)
    assert all(int(d.expression.split("/")[0]) != d.ref_id for d in dealt)
    assert sorted(d.expression for d in dealt) == sorted(s.expression for s in samples)
    assert [replace(d, expression=s.expression, raw=s.raw) for d, s in zip(dealt, samples, strict=True)] == samples
    assert all(d.raw == d.expression.upper() for d in dealt)
    assert dealt == shuffled(samples, seed)


def test_shuffled_depends_on_the_seed() -> None:
    samples = [sample(i, 0) for i in range(20)]
    assert shuffled(samples, 0) != shuffled(samples, 1)


@pytest.mark.parametrize("sizes", [[], [1], [4], [3, 2]])
def test_shuffled_refuses_what_cannot_be(sizes: list[int]) -> None:
    with pytest.raises(UserError, match="cannot be dealt out"):
        shuffled([sample(ref_id, i) for ref_id, size in enumerate(sizes) for i in range(size)], 0)


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_the_real_slice() -> None:
    samples = DATASETS["refcocog-google"].read(SLICE, "val")
    assert (len(samples), len({s.image_id for s in samples})) == (19, 18)
    assert samples[0].expression == "a tall brown and tan giraffe eating from a tree"
    assert samples[0].category == "giraffe"
    areas = {a["id"]: a["area"] for a in json.loads((SLICE / "refcocog" / "instances.json").read_text())["annotations"]}
    for one in samples:
        assert one.image().size == (one.width, one.height)
        # COCO's own figure is the area inside the polygon, ours counts pixels.
        assert one.mask().sum() == pytest.approx(areas[one.ann_id], rel=0.03)
    with pytest.raises(UserError, match="no referent in the split 'train'; it has val"):
        DATASETS["refcocog-google"].read(SLICE, "train")
