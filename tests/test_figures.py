"""Figures from results worked out by hand: what is on them, in which order, and that no label can break them."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ris_bench import cli, predictions, protocols, scoring
from ris_bench.data.dataset import DATASETS
from ris_bench.data.samples import Sample
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.predictions import Maps, Prediction, Predictions
from ris_bench.records import Cost, Epoch, Params, Provenance, Result, Scores, Trial
from ris_bench.report import drawing, figures, sheets
from ris_bench.results import Store

ROOT = Path(__file__).parent.parent
HOSTILE = "_a $x_1$ % & # \\ <script>{\N{GRINNING FACE}} \u05e9\u05dc\u05d5\u05dd \u202egnp\x07"
"""With what a legend leaves out, what is mathematics or markup elsewhere, right-to-left text and control characters."""
SAFE = HOSTILE.replace("\u202e", "\ufffd").replace("\x07", "\ufffd")

TEXT = """\
name: small
title: Small
defaults:
  dataset: refcoco
  backbone: clip-r101
  method: frozen
  head: etris
  train: {epochs: 2, batch_size: 2, lr: 1.0, milestones: [], gamma: 0.1, precision: fp16}
  eval: {select_on: val, splits: [val, testA, testA/shuffled]}
  seed: 0
grid:
  method: [full, frozen, lora, bridger]
  seed: [0, 1]
table:
  rows: method
  labels: {full: HOSTILE, frozen: Fix Backbone}
  columns:
    - {header: RefCOCO, value: miou, splits: [val, testA], best: max}
    - {header: Shuffled, value: miou, splits: [testA/shuffled]}
"""
SCORE = {"full": 0.50, "frozen": 0.40, "lora": 0.60}
"""Of seed 0; with seed 1 all are 0.02 higher."""
TUNED = {"full": 100_000_000, "frozen": 0, "lora": 30_000}


def read(tmp_path: Path, text: str = TEXT) -> Experiment:
    path = tmp_path / "experiment.yaml"
    path.write_text(text.replace("HOSTILE", "'Full Tuning'"), encoding="utf-8")
    return load(path)


def done(trial: Trial, miou: float, tuned: int) -> Result:
    scores = Scores(miou=miou, oiou=0.3, precision_at={"0.5": miou, "0.9": 0.1}, num_expressions=4)
    return Result(
        trial=trial,
        status="done",
        error=None,
        scores={"val": scores, "testA": scores, "testA/shuffled": scores},
        selected_epoch=2,
        history=(Epoch(epoch=1, loss=2.0, lr=1.0), Epoch(epoch=2, loss=1.0, lr=1.0, miou=miou, oiou=0.3)),
        params=Params(tunable_backbone=tuned, tunable_head=7, moving_statistics=0, total=10**8),
        cost=Cost(
            train_seconds=600.0 + tuned / 1e6,
            eval_seconds=1.0,
            train_images_per_second=10.0,
            peak_memory_bytes=2**30,
            tuned_bytes=8,
            device="a GPU",
        ),
        provenance=Provenance(commit=None, dirty=None, versions={}, weights={}, precision="fp16", started="2026-03-04"),
    )


def known(experiment: Experiment) -> dict[str, Result]:
    """Full and frozen with two seeds, LoRA with one, Bridger with none."""
    found = {}
    for run in experiment.runs:
        method, seed = run.trial.method.name, run.trial.seed
        if method in SCORE and (method, seed) != ("lora", 1):
            found[run.trial.id] = done(run.trial, SCORE[method] + 0.02 * seed, TUNED[method])
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_pareto_front_by_hand():
    #         0: on it  1: beaten by 0  2: on it   3: as dear as 2, worse  4: on it   5: equal to 4  6: dearer than 4
    points = [(0, 1.0), (1, 1.0), (2, 3.0), (2, 2.0), (5, 4.0), (5, 4.0), (6, 4.0)]
    assert figures.pareto(points) == [0, 2, 4, 5]
    assert figures.pareto([]) == []


def test_every_figure_is_drawn_or_what_it_lacks_is_said(tmp_path):
    experiment = read(tmp_path)
    drawn, absent = figures.draw(experiment, known(experiment))
    tails = ["parameters-refcoco-miou", "cost-refcoco-miou", "precision-refcoco", "learning-refcoco"]
    assert [each.name for each in drawn] == tails
    assert all(line.endswith("the expressions of the trials are not at hand") for line in absent[1:])
    assert absent[0] == "no figure thresholds-refcoco: no other threshold was tried"
    assert absent[1].startswith("no figure breakdown-refcoco-category: ")
    for each in drawn:
        # Rows in the order of the table, those without a result named in the caption alone.
        assert legend(each.figure)[:3] == ["Full Tuning", "Fix Backbone", "lora ∗"]
        assert "Without a result: bridger." in each.caption
        assert each.figure.legends[0].get_title().get_text() == "∗ Some of the seeds have no result."
        assert "Means over seeds (0, 1)" in each.caption and "\n" not in each.caption
    scores = [axes.get_ylabel() for each in drawn[:3] for axes in each.figure.axes]
    assert scores == [
        *("mIoU (%), val\n(ris-bench protocol)", "mIoU (%), testA\n(ris-bench protocol)"),
        *["mIoU (%), testA\n(ris-bench protocol)"] * 2,  # the first split that no checkpoint was selected on
        *("Pr@K (%), val\n(ris-bench protocol)", "Pr@K (%), testA\n(ris-bench protocol)"),
    ]
    assert [axes.get_xlabel() for axes in drawn[1].figure.axes] == [
        "Training time (min)",
        "Peak memory of training (GiB)",
    ]


def test_points_are_means_with_their_spread_and_the_front_is_drawn(tmp_path):
    experiment = read(tmp_path)
    (subject,) = figures.subjects(experiment, known(experiment))
    axes = figures.parameters(subject, "miou").figure.axes[0]
    at = {tuple(np.ravel(bar.lines[0].get_xydata()).round(6)): bar for bar in axes.containers}
    assert list(at) == [(100_000_000, 51), (0, 41), (30_000, 60)]
    [error] = at[100_000_000, 51].lines[2]
    # The sample standard deviation of 50 and 52 is the square root of 2.
    assert error.get_segments()[0][:, 1] == pytest.approx([51 - 2**0.5, 51 + 2**0.5])
    assert not at[30_000, 60].has_yerr  # one seed has no spread
    (front,) = (line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert front.get_xydata().tolist() == [[0, 41], [30_000, 60]]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xticks().tolist() == [0, 1e5, 1e6, 1e7, 1e8]
    assert [axes.xaxis.get_major_formatter()(tick, 0) for tick in axes.get_xticks()] == [
        "0",
        "100K",
        "1M",
        "10M",
        "100M",
    ]


def test_the_oracle_of_a_threshold_sweep_is_ringed(tmp_path):
    experiment = read(tmp_path)

    def swept(result: Result) -> Result:
        best = 0.4 + result.trial.seed / 5
        found = {f"{t:g}": {"miou": 0.9 - (t - best) ** 2, "oiou": 0.0} for t in (0.2, 0.4, 0.6)}
        scores = {split: dataclasses.replace(one, by_threshold=found) for split, one in result.scores.items()}
        return dataclasses.replace(result, scores=scores)

    results = {key: swept(one) for key, one in known(experiment).items() if one.trial.method.name != "lora"}
    (subject,) = figures.subjects(experiment, results)
    drawn = figures.thresholds(subject)
    (axes,) = drawn.figure.axes
    rings = [line.get_xydata().tolist()[0] for line in axes.lines if line.get_markersize() == 9]
    # Means over seeds 0 and 1, the best of which are at 0.4 and at 0.6.
    assert rings == [[pytest.approx(0.4), pytest.approx(88)]] * 2
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [0.35]
    assert legend(drawn.figure) == ["Full Tuning", "Fix Backbone", "oracle", "used"]
    assert axes.get_ylabel() == "mIoU (%), testA\n(ris-bench protocol)"


def test_looks_differ_without_colour():
    looks = [drawing.appearance(place) for place in range(12)]
    assert len({look.marker for look in looks}) == 12
    assert len({look[:2] for look in looks}) == len({(look.colour, look.hatch) for look in looks}) == 12


def test_learning_curves(tmp_path):
    experiment = read(tmp_path)
    (subject,) = figures.subjects(experiment, known(experiment))
    losses, scores = figures.learning(subject).figure.axes
    assert losses.get_ylabel() == "Training loss, train"
    assert scores.get_ylabel() == "mIoU (%), val\n(ris-bench protocol)"
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[1, 2], [2, 1]]] * 3
    assert [line.get_ydata().tolist() for line in scores.lines] == [[51], [41], [60]]
    assert len(scores.collections) == 2  # the bands of those with several seeds


def frame(split: str, miou: tuple[int, int]) -> pd.DataFrame:
    """Two expressions, of two and of three words, with so many of a hundred pixels right."""
    return pd.DataFrame(
        {
            **{"split": split, "category": "cup", "expression": ["one two", "one two three"], "sentence_index": [0, 1]},
            **{"intersection": miou, "union": 100, "predicted": 50, "target": 60},
        }
    )


def test_bars_of_a_breakdown(tmp_path):
    experiment = read(tmp_path)
    results = known(experiment)
    store = Store(tmp_path / "results")
    for result in results.values():
        if result.trial.method.name != "lora":
            folder = store.folder(result.trial)
            folder.mkdir(parents=True)
            seed = result.trial.seed
            frames = [frame("val", (0, 0)), frame("testA", (20 + 2 * seed, 40))]
            pd.concat(frames).to_parquet(folder / "expressions.parquet")
    drawn, absent = figures.draw(experiment, results, store)
    by = {each.name: each for each in drawn}["breakdown-refcoco-length"]
    (axes,) = by.figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 to 2\nn = 1", "3\nn = 1"]
    assert [patch.get_height() for patch in axes.patches] == [21, 21, 40, 40]
    assert legend(by.figure) == ["Full Tuning", "Fix Backbone"]
    assert "Left out: " in by.caption  # LoRA's table is not there
    assert "no figure breakdown-refcoco-area: of the expressions of testA no two groups by area are recorded" in absent


def test_published_numbers_are_hollow():
    experiment = load(ROOT / "experiments" / "pet_r101.yaml")
    results = {run.trial.id: done(run.trial, 0.7, 10) for run in experiment.runs if run.trial.method.name == "lora"}
    subject = figures.subjects(experiment, results)[0]
    drawn = figures.parameters(subject, "miou", cited=figures.citations(experiment))
    val, *others = drawn.figure.axes
    hollow = [
        tuple(line.get_xydata()[0])
        for line in val.lines
        if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert hollow == [
        *((120.74e6, 70.47), (0, 67.73), (2.39e6, 69.46), (1.20e6, 69.33), (0.19e6, 69.11), (0, 67.87)),
        *((0.03e6, 68.84), (1.94e6, 71.06)),
    ]
    assert not any(line.get_markerfacecolor() == "white" for axes in others for line in axes.lines)
    assert legend(drawn.figure) == [
        *("Full Tuning", "Fix Backbone", "Adapter", "Conv-Adapter", "Compacter", "CoOp", "LoRA", "ETRIS"),
        *("Pareto front", "hollow: as published"),
    ]
    assert "Hollow: as the paper prints it." in drawn.caption


def hostile(experiment: Experiment) -> Experiment:
    labels = {"full": HOSTILE, "frozen": "_", "lora": "w" * 200}
    return dataclasses.replace(experiment, table=dataclasses.replace(experiment.table, labels=labels))


@pytest.mark.filterwarnings("ignore:no figure")
def test_no_label_is_a_command(tmp_path):
    experiment = hostile(read(tmp_path))
    written = figures.write(experiment, known(experiment), tmp_path / "out")
    svg = written[0].read_text(encoding="utf-8")
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{SAFE}" in texts and "_" in texts and f"{'w' * 39}… ∗" in texts
    assert "<script" not in svg and "\u202e" not in svg


@pytest.mark.filterwarnings("ignore:Glyph")
def test_nothing_is_cut_off_and_the_legend_is_outside(tmp_path):
    experiment = hostile(read(tmp_path))
    drawn, _ = figures.draw(experiment, known(experiment))
    for each in drawn:
        with drawing.styled():
            each.figure.savefig(tmp_path / "x.png")
        whole = each.figure.bbox
        shape = each.figure.legends[0].get_window_extent()
        assert whole.x0 <= shape.x0 and shape.x1 <= whole.x1 and whole.y0 <= shape.y0
        for axes in each.figure.axes:
            box = axes.get_tightbbox()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
            assert not box.overlaps(shape)


def test_the_same_results_give_the_same_bytes(tmp_path):
    experiment = read(tmp_path)

    def saved(folder: Path) -> list[Path]:
        (subject,) = figures.subjects(experiment, known(experiment))
        return [
            *drawing.save(figures.parameters(subject, "miou", "points"), folder),
            *drawing.save(figures.learning(subject, "lines"), folder),
        ]

    once, again = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert [path.name for path in once] == ["points.svg", "points.png", "lines.svg", "lines.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert b"dc:date" not in once[0].read_bytes()
    assert sorted((tmp_path / "a").iterdir()) == sorted(once)


@pytest.mark.filterwarnings("ignore:no figure")
def test_without_results_there_is_nothing_but_lines(tmp_path):
    experiment = read(tmp_path)
    with pytest.warns(UserWarning) as warned:
        assert figures.write(experiment, {}, tmp_path / "out") == []
    assert len(warned) == 15
    assert all(str(each.message).endswith(": no trial of it has a result") for each in warned)
    assert not (tmp_path / "out").exists()


# Files of predictions

SIDE = 8
LEFT, RIGHT = np.zeros((2, SIDE, SIDE), dtype=bool)
LEFT[:, :4], RIGHT[:, 4:] = True, True


def samples(tmp_path: Path, expressions: list[str]) -> list[Sample]:
    """An image for each, whose left half is meant."""
    Image.new("RGB", (SIDE, SIDE), "grey").save(tmp_path / "x.png")
    return [
        Sample(
            **{"dataset": "refcoco", "split": "val", "ref_id": i, "sent_id": i, "sentence_index": 0, "image_id": i},
            **{"ann_id": i, "category": "cup", "expression": text, "raw": text, "image_path": tmp_path / "x.png"},
            **{"height": SIDE, "width": SIDE, "segmentation": [[0, 0, 4, 0, 4, SIDE, 0, SIDE]]},
        )
        for i, text in enumerate(expressions)
    ]


def answers(label: str, expected: list[Sample], masks: list[np.ndarray]) -> sheets.Answers:
    rows = [Prediction.of(sample, mask_HW=mask) for sample, mask in zip(expected, masks, strict=True)]
    return sheets.Answers.of(label, Predictions(rows, None, {}), expected)


def test_samples_are_drawn_by_seed_or_by_disagreement(tmp_path):
    expected = samples(tmp_path, ["a"] * 6)
    expected[5] = dataclasses.replace(expected[5], image_id=4)
    assert sheets.at_random(expected, 3, 0) == sheets.at_random(expected, 3, 0)
    assert any(sheets.at_random(expected, 3, 0) != sheets.at_random(expected, 3, seed) for seed in range(1, 5))
    assert len(sheets.at_random(expected, 99, 0)) == 5  # one of each image
    empty = np.zeros_like(LEFT)
    one = answers("one", expected, [LEFT, LEFT, empty, LEFT, LEFT, LEFT])
    # They differ by 0, 1, 0, 0.5, 0 and 1, the last two on one image.
    other = answers("other", expected, [LEFT, RIGHT, empty, LEFT | RIGHT, LEFT, RIGHT])
    assert sheets.in_dispute(expected, [one, other], 3, 0.5) == [1, 5, 3]
    with pytest.raises(UserError, match="cannot disagree with itself"):
        sheets.in_dispute(expected, [one], 3, 0.5)


def test_a_sheet_and_hostile_expressions(tmp_path):
    texts = [HOSTILE, "", "word " * 500, "x" * 5000, "\u4e00" * 300, "a\n\tb"]
    expected = samples(tmp_path, texts)
    given = [answers(HOSTILE, expected, [LEFT] * 6), answers("half", expected, [LEFT | RIGHT] * 6)]
    drawn = sheets.sheet(expected, given, range(6), why="all of them", name="sheet")
    written = [text.get_text() for axes in drawn.figure.axes for text in axes.texts]
    assert written[:2] == ["Image", "Ground truth"] and written[3] == "half"
    assert written.count("IoU 1.000") == written.count("IoU 0.500") == 6
    assert {SAFE, "(no expression)", "a b"} <= set(written)
    assert all(text.count("\n") <= 1 for text in written)
    assert all(text.get_clip_on() for axes in drawn.figure.axes for text in axes.texts)
    boxes = [axes.get_position() for axes in drawn.figure.axes]
    assert all(box.x0 >= 0 and box.x1 <= 1 + 1e-9 and box.y0 >= -1e-9 and box.y1 <= 1 + 1e-9 for box in boxes)
    pictures = [axes.get_position() for axes in drawn.figure.axes if axes.images]
    assert len(pictures) == 24
    for k, box in enumerate(pictures):
        assert not any(box.overlaps(other) for other in pictures[:k])
    once, again = (drawing.save(drawn, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    ElementTree.parse(once[0])


def test_the_sweep_agrees_with_the_scores(tmp_path):
    expected = samples(tmp_path, ["a", "b", "c"])
    random = np.random.default_rng(0)
    rows = [Prediction.of(sample, map_hw=2 * random.normal(size=(4, 4))) for sample in expected]
    given = Predictions(rows, Maps(values="logit", geometry="letterbox", size=16), {})
    answer = sheets.Answers.of("a", given, expected)
    found = sheets.scores_by_threshold(expected, answer)
    scores = scoring.score(given, {("refcoco", "val"): expected}, [protocols.RIS_BENCH])
    at = found[sheets.THRESHOLDS.tolist().index(0.35)]
    assert [at.oiou, at.miou, *at.precision_at.values()] == [one.value for one in scores]
    drawn = sheets.sweep(expected, [answer, answers("masks", expected, [LEFT] * 3)])
    left, right = drawn.figure.axes
    assert left.get_ylabel() == "mIoU (%), refcoco val\n(ris-bench protocol)"
    best = max(each.miou for each in found)
    assert left.lines[1].get_ydata().tolist() == [100 * best]
    assert f"a mIoU {100 * best:.2f} at " in drawn.caption and "Left out, being masks: masks." in drawn.caption
    with pytest.raises(UserError, match="are masks, whose threshold is past"):
        sheets.sweep(expected, [answers("masks", expected, [LEFT] * 3)])


def test_files_of_predictions_have_labels(tmp_path):
    predictions.write(tmp_path / "a=b.json", [Prediction.of(samples(tmp_path, ["a"])[0], mask_HW=LEFT)])
    found = sheets.read(["w/o Bridger=x.parquet", str(tmp_path / "a=b.json"), "y.json"])
    assert found == {"w/o Bridger": Path("x.parquet"), "a=b": tmp_path / "a=b.json", "y": Path("y.json")}
    with pytest.raises(UserError, match="two files of predictions are called 'a'"):
        sheets.read(["a=x.json", "a=y.json"])


def own(tmp_path: Path) -> Path:
    """A folder with two expressions of one's own, and a file of masks and one of maps that are predicted for them."""
    Image.new("RGB", (SIDE, SIDE), "grey").save(tmp_path / "x.png")
    left = [[0, 0, 4, 0, 4, SIDE, 0, SIDE]]
    content = {
        "images": [{"id": i, "file_name": "x.png", "height": SIDE, "width": SIDE} for i in (1, 2)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "segmentation": left} for i in (1, 2)],
        "categories": [{"id": 1, "name": "half"}],
        "expressions": [
            {"id": i, "image_id": i, "annotation_ids": [i], "split": "val", "sentences": [f"the left $half_{i}$"]}
            for i in (1, 2)
        ],
    }
    (tmp_path / "own.json").write_text(json.dumps(content))
    options = {"own": {"file": "own.json"}}
    expected = DATASETS.build(DATASETS.resolve("own", options["own"])).read(tmp_path, "val")
    masks = [Prediction.of(sample, mask_HW=RIGHT) for sample in expected]
    predictions.write(tmp_path / "masks.json", masks, dataset_options=options)
    maps = Maps(values="logit", geometry="letterbox", size=SIDE)
    found = [Prediction.of(sample, map_hw=np.where(LEFT, 5.0, -5.0)) for sample in expected]
    predictions.write(tmp_path / "maps.parquet", found, maps=maps, dataset_options=options)
    return tmp_path


def test_the_verb(tmp_path, capsys):
    folder = own(tmp_path)
    files = [str(folder / "masks.json"), f"Maps={folder / 'maps.parquet'}"]
    arguments = ["--data", str(folder), "--out", str(folder / "out"), "--disagreement"]
    assert cli.main(["sheet", *files, *arguments]) == 0
    out = capsys.readouterr().out
    names = ["sheet-own-val.svg", "sheet-own-val.png", "threshold-own-val.svg", "threshold-own-val.png"]
    assert [line for line in out.splitlines() if line.startswith(str(folder))] == [
        str(folder / "out" / n) for n in names
    ]
    assert "those on which they differ most" in out and "Left out, being masks: masks." in out
    svg = (folder / "out" / "sheet-own-val.svg").read_text(encoding="utf-8")
    assert "the left $half_1$" in svg and svg.count("IoU 0.000") == svg.count("IoU 1.000") == 2
    assert cli.main(["sheet", files[0], "--data", str(folder), "--out", str(folder / "out"), "--rows", "1"]) == 0
    assert "no figure threshold-own-val: the predictions are masks" in capsys.readouterr().err
    for bad in (["--threshold", "1"], ["--seed", "-1"], ["--disagreement"]):
        assert cli.main(["sheet", files[0], "--data", str(folder), *bad]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_group_without_results_has_no_panel(tmp_path):
    text = TEXT.replace("  method: [full", "  backbone: [clip-r50, clip-r101]\n  method: [full").replace(
        "rows: method", "rows: [backbone, method]"
    )
    experiment = read(tmp_path, text)
    results = {key: one for key, one in known(experiment).items() if one.trial.backbone.name == "clip-r50"}
    (subject,) = figures.subjects(experiment, results)
    drawn = figures.parameters(subject, "miou")
    titles = [axes.get_title(loc="left") for axes in drawn.figure.axes]
    assert titles == ["clip-r50, RefCOCO, val", "clip-r50, RefCOCO, testA"]
    assert drawn.caption.endswith("Without a result: all of clip-r101; clip-r50, bridger.")
