"""`ris-bench score` from a file of predictions to its table: what is printed, marked and refused."""

import json
import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import trained
from PIL import Image

from ris_bench import cli, evaluation, metrics, predictions, protocols, scoring
from ris_bench.data.dataset import DATASETS, named
from ris_bench.data.samples import Sample
from ris_bench.predict import load, predict_split
from ris_bench.predictions import Maps, Prediction, encode
from ris_bench.protocols import RIS_BENCH
from ris_bench.results import Store
from ris_bench.trial import EVAL_BATCH_SIZE

HEIGHT, WIDTH = 30, 40
SLICE = Path(__file__).parents[2] / "shared" / "refcocog_slice"


def rectangle(x0: int, y0: int, x1: int, y1: int) -> list[int]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Referent 1 of val has two sentences, referent 2 one, in two polygons that share 50 pixels; testA has another."""
    sentences = {1: ("val", ["red cup", "left one"]), 2: ("val", ["both"]), 3: ("testA", ["man"])}
    polygons = {
        1: [rectangle(0, 0, 10, 10)],
        2: [rectangle(0, 0, 10, 10), rectangle(5, 0, 15, 10)],
        3: [rectangle(0, 0, 20, 10)],
    }
    refs = [
        {
            "ref_id": i,
            "ann_id": i,
            "image_id": 1,
            "category_id": 1,
            "split": split,
            "sentences": [
                {"sent": text, "raw": text.title() + "!", "sent_id": 10 * i + k, "tokens": text.split()}
                for k, text in enumerate(texts)
            ],
        }
        for i, (split, texts) in sentences.items()
    ]
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": parts}
            for i, parts in polygons.items()
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (root := tmp_path / "data" / "refcoco").mkdir(parents=True)
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    (images := tmp_path / "data" / "images" / "train2014").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "1.jpg")
    return tmp_path / "data"


BOXES = {
    ("val", 1, 0): (0, 0, 5, 10),  # 50 of 100
    ("val", 1, 1): (0, 0, 10, 9),  # 90 of 100
    ("val", 2, 0): (0, 0, 15, 10),  # 150 of 150; with a hole, 100 of 150
    ("testA", 3, 0): (0, 0, 20, 10),  # 200 of 200
}


def rows(**changes) -> list[dict]:
    """What another model's author would write; the first row is changed."""
    written = []
    for (split, ref_id, index), (x0, y0, x1, y1) in BOXES.items():
        mask_HW = np.zeros((HEIGHT, WIDTH), bool)
        mask_HW[y0:y1, x0:x1] = True
        row = {"dataset": "refcoco", "split": split, "ref_id": ref_id, "sentence_index": index}
        written.append({**row, "height": HEIGHT, "width": WIDTH, "counts": encode(mask_HW)})
    return [{**written[0], **changes}, *written[1:]]


@pytest.fixture
def call(data: Path, tmp_path: Path, capsys):
    """Scores rows or a file; gives (exit code, stdout, stderr)."""

    def score(content: list[dict] | Path, *arguments: str) -> tuple[int, str, str]:
        path = content
        if isinstance(content, list):
            path = tmp_path / "predictions.json"
            path.write_text(json.dumps(content))
        code = cli.main(["score", str(path), "--data", str(data), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return score


def table(out: str) -> dict[tuple[str, str], list[str]]:
    """(protocol, metric) -> the other cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    return {(line[0], line[1]): line[2:] for line in lines[2:]}


def test_one_table_of_all_protocols(call):
    code, out, err = call(rows(), "--protocol", "cris", "lavt")
    assert (code, err) == (0, "")
    assert [cell.strip() for cell in out.splitlines()[0].strip("|").split("|")] == [
        *("Protocol", "Metric", "refcoco val", "− ris-bench", "of", "refcoco testA", "− ris-bench", "of")
    ]
    found = table(out)
    # val: oIoU (50 + 90 + 150) / (100 + 100 + 150), mIoU (0.5 + 0.9 + 1) / 3. testA: all right.
    assert found["ris-bench", "oIoU"] == ["82.86", "", "3", "100.00", "", "1"]
    assert found["ris-bench", "mIoU"] == ["80.00", "", "3", "100.00", "", "1"]
    assert found["cris", "mIoU"] == ["80.00", "0", "3", "100.00", "0", "1"]
    assert found["cris", "oIoU"] == ["82.86 °", "0", "3", "100.00 °", "0", "1"]
    # What two polygons share is cut out, of 480 x 480 pixels: (0.5 + 0.9 + 2/3) / 3, and 1/2 is a hit at 0.5.
    assert found["lavt", "mIoU"][:2] == ["68.89 †", "-11.111"]
    assert found["lavt", "Pr@0.5"][:2] == ["100.00 †", "+33.333"]
    assert {protocol for protocol, _ in found} == {"ris-bench", "cris", "lavt"}
    notes = [line for line in out.splitlines() if line.startswith("- ")]
    assert any("° the code that the protocol stands for does not print this metric" in note for note in notes)
    assert any("† the masks are resampled" in note for note in notes) and not any("‡" in note for note in notes)
    assert any(note.startswith("- lavt: every sentence (`raw`), compared in the 480 x 480 input") for note in notes)


def test_every_metric_has_its_name_and_its_protocol(call):
    code, out, _ = call(rows())
    found = table(out)
    assert code == 0 and {protocol for protocol, _ in found} == set(protocols.PROTOCOLS)
    assert {metric for protocol, metric in found if protocol == "rela"} == {
        "cIoU",
        "gIoU",
        "Pr@0.7",
        "Pr@0.8",
        "Pr@0.9",
    }
    assert {metric for protocol, metric in found if protocol == "lisa"} == {"ciou", "giou"}
    # Two polygons that share pixels: united or not. ris-bench is a row whether asked for or not.
    assert found["lisa", "giou"][:2] == ["68.89", "-11.111"] and found["vlt", "mIoU"][:2] == ["80.00", "0"]
    assert table(call(rows(), "--protocol", "etris")[1]).keys() == {
        key for key in found if key[0] in ("ris-bench", "cris")
    }


def test_json_has_the_same_numbers(call):
    code, out, err = call(rows(), "--json", "--protocol", "lisa")
    record = json.loads(out)
    assert (code, err, record["stage"]) == (0, "", "test")
    [one] = [s for s in record["scores"] if (s["protocol"], s["metric"], s["split"]) == ("lisa", "giou", "val")]
    assert one == {
        "protocol": "lisa",
        "metric": "giou",
        "kind": "mean",
        "dataset": "refcoco",
        "split": "val",
        "value": pytest.approx((0.5 + 0.9 + 2 / 3) / 3),
        "difference": pytest.approx(-1 / 9),
        "num_expressions": 3,
        "marks": [],
    }


def test_validation_takes_the_sentences_of_training(call):
    found = table(call(rows(), "--validation", "--protocol", "cris", "cgformer")[1])
    assert found["ris-bench", "mIoU"][:3] == ["80.00", "", "3"]
    assert found["cris", "mIoU"][:3] == ["75.00", "-5.000", "2"]  # the first sentence: (0.5 + 1) / 2
    # The last, with a hole, over 480 x 480: (0.9 + 2/3) / 2.
    assert found["cgformer", "mIoU"][:3] == ["78.33 †", "-1.667", "2"]
    assert "As checkpoints are selected during training" in call(rows(), "--validation")[1]


def test_json_and_parquet_score_alike(call, data, tmp_path):
    samples = [s for split in ("val", "testA") for s in DATASETS["refcoco"]().read(data, split)]
    for suffix in ("json", "parquet"):
        given = predictions.read(save(tmp_path / "rows.json", rows()))
        written = [
            Prediction.of(s, mask_HW=predictions.decode(row.counts, HEIGHT, WIDTH).T)
            for s, row in zip(samples, predictions.match(given.rows, samples), strict=True)
        ]
        predictions.write(tmp_path / f"p.{suffix}", written)
    outs = {call(tmp_path / f"p.{suffix}")[1] for suffix in ("json", "parquet")}
    assert len(outs) == 1
    # These say what the model was asked, which LAVT and ReLA would have asked in another form.
    found = table(outs.pop())
    assert found["lavt", "mIoU"][0] == "68.89 †§" and found["cris", "mIoU"][0] == "80.00"


def save(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_maps_are_cut_by_each_protocol_and_marked(call, data, tmp_path):
    samples = DATASETS["refcoco"]().read(data, "val")
    maps = Maps(values="probability", geometry="stretch", size=480)
    # 0.4 in the upper third: foreground where 0.35 is asked for, and nowhere where 0.5 is.
    map_hw = np.repeat([0.4, 0.0, 0.0], 40)[:, None] * np.ones(160)
    predictions.write(tmp_path / "p.parquet", [Prediction.of(s, map_hw=map_hw) for s in samples], maps=maps)
    found = table(call(tmp_path / "p.parquet")[1])
    for protocol in ("ris-bench", "cris", "vlt"):  # (100 + 100 + 150) / 3 / 400
        assert found[protocol, "mIoU"][0] == "29.17 ‡"
    assert found["lavt", "mIoU"][0] == "0.00 §" and found["lavt", "mIoU"][1] == "-29.167"
    assert found["polyformer", "mIoU"][0] == "0.00 ‡"
    assert "‡" not in found["cgformer", "mIoU"][0]  # its own geometry and size


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (rows()[1:], (), "1 expressions are not predicted: sentence 0 of referent 1 in refcoco val"),
        ([*rows(), rows()[0]], (), "1 expressions are predicted more than once: sentence 0 of referent 1"),
        (rows(ref_id=9), (), "1 expressions are not in the data: sentence 0 of referent 9 in refcoco val"),
        (rows(split="testC"), (), "refcoco has no split 'testC'; its splits are"),
        (rows(dataset="coco"), (), "there is no dataset 'coco'; there are"),
        (rows(dataset="refcoco+"), (), "refcoco+ needs refcoco+/instances.json"),
        (rows(height=WIDTH, width=HEIGHT), (), "is 40 x 30 and the image 30 x 40"),
        (
            rows(counts=encode(np.ones((9, 9)))),
            (),
            "the mask of sentence 0 of referent 1 in refcoco val has run lengths",
        ),
        (rows(counts="!"), (), "is not a compressed run-length string of COCO"),
        (rows(expression="a dog"), (), "was asked 'a dog' where the data have 'red cup'"),
        (rows(), ("--protocol", "crisp"), "there is no protocol 'crisp'; there are ris-bench, cris"),
        (Path("nothing.json"), (), "nothing.json cannot be read"),
    ],
)
def test_bad_input_exits_2_with_one_line(call, content, arguments, message):
    code, out, err = call(content, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_generated_scenes_with_options(call, tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "cache"))
    options = {"num_train": 1, "num_eval": 2}
    samples = DATASETS["scenes"](**options).read(tmp_path, "testB")
    written = [Prediction.of(s, mask_HW=s.mask()) for s in samples]
    predictions.write(tmp_path / "p.json", written, dataset_options={"scenes": options})
    code, out, _ = call(tmp_path / "p.json")
    found = table(out)
    assert code == 0 and found["ris-bench", "mIoU"][0] == found["lisa", "giou"][0] == "100.00"
    assert float(found["rela", "gIoU"][0].split()[0]) > 93  # drawn at 480, and beside it nearest neighbours of it
    predictions.write(tmp_path / "p.json", written, dataset_options={"scenes": {"num_evil": 2}})
    code, _, err = call(tmp_path / "p.json")
    assert code == 2 and "no option 'num_evil'" in err


def test_a_data_set_of_ones_own_is_known_by_its_name(call, data, tmp_path):
    record = json.loads((data / "refcoco" / "instances.json").read_text())
    record["images"][0]["file_name"] = "images/train2014/1.jpg"
    record["expressions"] = [{"id": 9, "image_id": 1, "annotation_ids": [1], "split": "val", "sentences": ["red cup"]}]
    (data / "cups.json").write_text(json.dumps(record))
    own = {"own": {"file": "cups.json", "name": "cups"}}
    written = [Prediction.of(s, mask_HW=s.mask()) for s in named(own).read(data, "val")]
    refcoco = [Prediction.of(s, mask_HW=s.mask()) for s in named("refcoco").read(data, "val")]
    for options, rows in (
        (own, written),
        (own, written + refcoco),
        ({"mixed": {"parts": ["refcoco", own]}}, written + refcoco),
    ):
        predictions.write(tmp_path / "p.json", rows, dataset_options=options)
        code, out, err = call(tmp_path / "p.json", "--protocol", "cris")
        assert (code, err) == (0, "") and "| cups val |" in " ".join(out.split())
        assert set(table(out)["ris-bench", "mIoU"][::3]) == {"100.00"}
    predictions.write(tmp_path / "p.json", written)
    code, out, err = call(tmp_path / "p.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert """say so in the file's header: "dataset_options": {"own": {"file": FILE, "name": "cups"}}""" in err


def evaluated(dataset: dict | str, split: str, data: Path, folder: Path) -> None:
    """What a model's evaluation counts is what `score` makes of the file that it writes, to the last digit."""
    _, result = trained(Store(folder), "tiny-clip-rn", "frozen")
    model = load(folder / "trials" / result.trial.id)
    samples = named(dataset).read(data, split)
    options = dataset if isinstance(dataset, dict) else None
    number = predict_split(model, named(dataset), split, data, folder / "p.parquet", dataset_options=options)
    assert number == len(samples)
    frame = evaluation.evaluate(
        model.model,
        samples,
        tokenizer=model.tokenizer(named(dataset).word_len),
        batch_size=EVAL_BATCH_SIZE,
        device=model.device,
        autocast=model.autocast,
        threshold=model.threshold,
    )
    expected = evaluation.scores(frame)
    assert expected.miou > 0
    given = predictions.read(folder / "p.parquet")
    scores = scoring.score(given, scoring.load(given, data), [RIS_BENCH])
    found = {one.metric: one.value for one in scores}
    assert found == {
        "oIoU": expected.oiou,
        "mIoU": expected.miou,
        **{f"Pr@{k}": value for k, value in expected.precision_at.items()},
    }


def test_a_file_scores_as_the_evaluation_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RIS_BENCH_CACHE", str(tmp_path / "cache"))
    evaluated({"scenes": {"num_train": 1, "num_eval": 6}}, "testA", tmp_path, tmp_path)


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_a_file_of_real_photos_scores_as_the_evaluation_that_wrote_it(tmp_path):
    evaluated("refcocog-google", "val", SLICE, tmp_path)


@pytest.mark.skipif(not SLICE.is_dir(), reason="the slice of real RefCOCOg is not there")
def test_ris_bench_on_real_photos_is_what_the_metrics_say():
    samples = DATASETS["refcocog-google"]().read(SLICE, "val")
    masks = [np.roll(s.mask(), (7, -11), (0, 1)) for s in samples]
    rows = [Prediction.of(s, mask_HW=mask_HW) for s, mask_HW in zip(samples, masks, strict=True)]
    given = predictions.Predictions(rows, None, {})
    scores = scoring.score(given, {("refcocog-google", "val"): samples}, list(protocols.PROTOCOLS.values()))
    both = np.array([np.sum(s.mask() & mask_HW) for s, mask_HW in zip(samples, masks, strict=True)])
    either = np.array([np.sum(s.mask() | mask_HW) for s, mask_HW in zip(samples, masks, strict=True)])
    expected = metrics.scores(both.astype(int), either.astype(int), RIS_BENCH)
    found = {(one.protocol, one.kind): one for one in scores}
    for protocol in ("ris-bench", "cris"):
        assert found[protocol, "mean"].value == expected.miou and found[protocol, "overall"].value == expected.oiou
        for k, value in expected.precision_at.items():
            assert found[protocol, f"Pr@{k}"].value == value
    # Elsewhere the frame, the holes and the rounding of pixels differ, and little else.
    assert all(abs(one.difference) < 0.03 for one in scores if one.difference is not None and one.kind == "mean")


def many(number: int) -> list[Sample]:
    """Expressions, three of each referent, of 640 x 480."""
    random = np.random.default_rng(0)
    samples = []
    for i in range(number):
        if i % 3 == 0:
            angle = np.sort(random.random(40)) * 2 * np.pi
            points = np.stack([320 + 150 * np.cos(angle), 240 + 100 * np.sin(angle)], axis=1).ravel().round(2).tolist()
        one = Sample(
            *("refcoco", "val", i // 3, i, i % 3, 1, 1, "cup", "cup", "cup", Path("x"), 480, 640),
            [points, rectangle(20, 20, 60, 80)],
        )
        samples.append(one)
    return samples


def test_ground_truth_is_made_once_for_a_referent(monkeypatch):
    calls = []
    decoded = Sample.mask
    monkeypatch.setattr(Sample, "mask", lambda sample: calls.append(sample.ref_id) or decoded(sample))
    samples = many(6)
    rows = [Prediction.of(s, mask_HW=np.eye(480, 640, dtype=bool)) for s in samples]
    given = predictions.Predictions(rows, None, {})
    scoring.score(given, {("refcoco", "val"): samples}, list(protocols.PROTOCOLS.values()))
    assert sorted(calls) == [0, 0, 1, 1]  # in the image, and drawn at 480


def test_time_for_a_split_of_refcoco():
    """10,834 expressions in 60 s of two cores are 90 in a second of processing."""
    samples = many(180)
    rows = [Prediction.of(s, mask_HW=np.roll(s.mask(), i % 7, 1)) for i, s in enumerate(samples)]
    given = predictions.Predictions(rows, None, {})
    start = time.process_time()
    scoring.score(given, {("refcoco", "val"): samples}, list(protocols.PROTOCOLS.values()))
    assert time.process_time() - start < 6  # three times that, since others may be at work


def test_progress_reaches_the_end():
    samples = many(9)
    rows = [Prediction.of(s, mask_HW=s.mask()) for s in samples]
    reports = []
    shuffled = predictions.Predictions([replace(row) for row in rows[::-1]], None, {})
    scoring.score(
        shuffled, {("refcoco", "val"): samples}, [RIS_BENCH], report=lambda done, total: reports.append((done, total))
    )
    assert reports == [(3, 9), (6, 9), (9, 9)]
