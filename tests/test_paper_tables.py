"""The tables of the papers from results: every published cell beside what was measured, as it was once looked at."""

from __future__ import annotations

import csv
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from ris_bench import plan, published
from ris_bench.errors import UserError
from ris_bench.experiment import Experiment, load
from ris_bench.layout import METRICS
from ris_bench.records import Cost, Params, Provenance, Result, Scores, Trial
from ris_bench.report.tables import Table, render

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = {
    "etris_main": ("etris_main",),
    "pet_r101": ("etris_pet_r101",),
    "etris_parameters": ("etris_parameters",),
    "etris_bridger_scope": ("etris_bridger_scope",),
    "etris_modules": ("etris_modules",),
    "detris_main": ("detris_main_miou", "detris_main_oiou"),
    "detris_mixed": ("detris_main_miou", "detris_main_oiou"),
    "pet_dinov2": ("detris_pet_dinov2",),
    "detris_modules": ("detris_modules",),
}
"""By experiment, the tables of the papers that it makes again."""


@cache
def experiment(name: str) -> Experiment:
    return load(ROOT / "experiments" / f"{name}.yaml")


def result(trial: Trial, splits: tuple[str, ...], place: int) -> Result:
    """Scores that rise from trial to trial and from split to split; the second trial failed."""
    scores = {
        split: Scores(
            miou=0.6 + 0.01 * place + 0.001 * k,
            oiou=0.5 + 0.01 * place + 0.001 * k,
            precision_at={f"0.{tenth}": 1 - tenth / 10 for tenth in range(5, 10)},
            num_expressions=100 + k,
        )
        for k, split in enumerate(splits)
    }
    failed = place == 1
    tuned = 1_000_000 * len(trial.method.name) + 1_000 * len(str(trial.method.options))
    return Result(
        trial=trial,
        status="failed" if failed else "done",
        error="the loss is nan" if failed else None,
        scores={} if failed else scores,
        selected_epoch=1,
        history=(),
        params=Params(tunable_backbone=tuned, tunable_head=24_000_000, moving_statistics=0, total=10**8, prompt=4096),
        cost=Cost(
            **{"train_seconds": 1.0, "eval_seconds": 1.0, "train_images_per_second": 1.0},
            **{"peak_memory_bytes": 1, "tuned_bytes": 1, "device": "a GPU"},
        ),
        provenance=Provenance(
            **{"commit": "1a2b3c4", "dirty": False, "versions": {}, "weights": {}, "precision": "fp16"},
            started="2026-03-04T05:06:07",
        ),
    )


@cache
def table(name: str) -> Table:
    """From results of all trials but the last, where there are several."""
    runs = experiment(name).runs
    known = runs[: max(1, len(runs) - 1)]
    return render(
        experiment(name),
        {run.trial.id: result(run.trial, run.splits, place) for place, run in enumerate(known)},
    )


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["md", "tex"])
def test_tables_are_what_was_looked_at(name, kind):
    text = {"md": table(name).markdown, "tex": table(name).latex}[kind]
    assert text == (GOLDEN / f"{name}.{kind}").read_text(encoding="utf-8")


HEADERS = {"RefCOCO": "refcoco", "RefCOCO+": "refcoco+", "G-Ref": "refcocog-umd", "G-Ref (umd)": "refcocog-umd"}
HEADERS |= {"G-Ref (google)": "refcocog-google", "Average": "avg"}
COUNTS = {"tunable_backbone": "backbone", "prompt": "prompt", "tunable_head": "head", "tunable": "total"}


def as_published(line: dict[str, str]) -> str:
    """How published.yaml names the column of a line of the CSV, always with the metric."""
    kind, _, count = line["value"].partition(".")
    if kind == "params":
        return f"params.{COUNTS[count]}"
    split = line["split"].partition("/")[0]
    return "/".join(filter(None, [HEADERS[line["column"]], split])) + f":{line['value']}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_cell_stands_in_the_table(name):
    file = yaml.safe_load(published.FILE.read_text(encoding="utf-8"))["tables"]
    expected: dict[str, dict[str, str]] = {}
    uncertain = set()
    for one in (file[key] for key in PUBLISHED[name]):
        for row, facts in one["rows"].items():
            for column, text in zip(one["columns"], facts["values"].split(), strict=True):
                scored = "/" in column or column == "avg"
                key = f"{column}:{one['computes']}" if scored and ":" not in column else column
                expected.setdefault(row, {})[key] = text.rstrip("†").rstrip("KM").replace("-", "–")
                if text.endswith("†"):
                    uncertain.add((row, key))
    lines = [line for line in csv.DictReader(table(name).csv.splitlines()) if line["numbers"] == "published"]
    width = len(lines) // len(expected)
    shown = {row: lines[place * width : (place + 1) * width] for place, row in enumerate(expected)}
    texts = {row: {as_published(line): line["text"] for line in own} for row, own in shown.items()}
    if name == "detris_mixed":  # it has no G-Ref (google)
        expected = {row: {k: v for k, v in cells.items() if "google" not in k} for row, cells in expected.items()}
    for row, cells in texts.items():
        # A column that the paper's table has not is open.
        assert {key: text for key, text in cells.items() if text != "–"} == {
            key: text for key, text in expected[row].items() if text != "–"
        }
    marked = {(row, as_published(line)) for row, own in shown.items() for line in own if "†" in line["marks"]}
    assert marked == uncertain


def test_rows_of_other_papers_are_marked_and_the_papers_own_are_not():
    lines = [line for line in csv.DictReader(table("etris_main").csv.splitlines()) if line["numbers"] == "published"]
    marks = {(line["backbone"], line["value"]): line["marks"] for line in lines if line["text"] != "–"}
    assert marks["PCAN", "miou"] == marks["ReSTR", "miou"] == "¶"
    assert not any(marks[row, "miou"] for row in ("CRIS-R50", "CRIS-R101", "ETRIS-R101", "ETRIS-ViT-B"))
    assert not any(mark for (_, value), mark in marks.items() if value not in METRICS)


def test_a_published_row_stands_above_what_was_measured_and_is_never_best():
    rows = [line.split("|")[1:-1] for line in table("pet_r101").markdown.splitlines() if line[:1] == "|"][2:]
    assert [row[1].strip() for row in rows] == ["published", "measured"] * 8
    assert not any("**" in cell for row in rows[::2] for cell in row)
    assert any("**" in cell for row in rows[1::2] for cell in row)


def test_an_average_is_that_of_every_column_of_its_metric():
    lines = [line for line in csv.DictReader(table("detris_main").csv.splitlines()) if line["numbers"] == "measured"]
    measured = [line for line in lines if line["backbone"] == "DETRIS-L" and line["value"] == "oiou"]
    *parts, average = measured
    assert [part["column"] for part in (*parts, average)].count("Average") == 1
    # The last trial of this row has no result: an average over the others would be another quantity.
    assert parts[-1]["text"] == average["text"] == "–"
    [whole] = [line for line in csv.DictReader(table("pet_dinov2").csv.splitlines()) if line["text"] == "62.10"][-1:]
    assert (whole["column"], whole["value"], whole["split"]) == ("Average", "miou", "")


def test_trials_that_tables_share_are_the_same():
    ids = {name: {run.trial.id for run in experiment(name).runs} for name in PUBLISHED}
    assert ids["etris_parameters"] < ids["etris_main"]
    assert len(ids["etris_main"] & ids["pet_r101"] & ids["etris_bridger_scope"] & ids["etris_modules"]) == 1
    assert len(ids["detris_main"] & ids["pet_dinov2"] & ids["detris_modules"]) == 1
    assert len(ids["pet_dinov2"] & ids["detris_modules"]) == 3  # frozen, half of it and all


def test_what_a_row_stands_for_is_kept_with_the_plan(tmp_path):
    plan.write(experiment("etris_modules"), tmp_path)
    kept = plan.read(tmp_path)
    assert kept.table == experiment("etris_modules").table
    assert render(kept, {}).markdown == render(experiment("etris_modules"), {}).markdown


def test_another_method_in_the_same_row_stands_for_nothing():
    changed = load(ROOT / "experiments" / "etris_main.yaml", ["method={bridger: {width: 32}}"])
    assert changed.table.stands_for == {}
    assert "measured" in render(changed, {}).markdown


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "table: etris_main",
            "table: etris_mian",
            "'etris_mian' is no published table; there are etris_pet_r101, ",
        ),
        ("table: etris_main", "table: detris_pet_dinov3", "is no published table"),
        (
            ", refcoco+, refcocog-umd",
            ", refcocog-umd",
            "table 'etris_main' has scores of refcoco\\+ val, testA, testB, which",
        ),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(tmp_path, old, new, message):
    path = tmp_path / "experiment.yaml"
    text = (ROOT / "experiments" / "etris_main.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_of_all_tables_compiles(tmp_path):
    inputs = "".join(rf"\input{{{GOLDEN / name}.tex}}\clearpage" for name in PUBLISHED)
    head = r"\documentclass[twocolumn]{article}\usepackage{booktabs,graphicx}"
    document = rf"{head}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "document.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert compiled.returncode == 0, compiled.stdout
