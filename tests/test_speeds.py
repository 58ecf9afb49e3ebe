"""The record of benchmarks.speed beside the results: shown by every report, and never trusted."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import STAND_IN

from benchmarks.papers import DETRIS_B, clone_of
from benchmarks.speed import Row as Measured
from ris_bench import cli, plan
from ris_bench.errors import UserError
from ris_bench.experiment import load
from ris_bench.report import page, speeds
from ris_bench.results import Store
from ris_bench.sweep import failure

TRAINING = {
    **{"case": "frozen-r101", "what": "training step of 2", "slow": "released", "quick": "cached"},
    **{"slow_ms": 4821.4, "quick_ms": 1204.96, "ratio": 4.0013, "least": 3.9, "most": 4.25},
    **{"per_second": 1.6598, "epoch_minutes": 425.8},
    **{"slow_gflop": 412.125, "quick_gflop": 99.5, "ceiling": 0.8349, "slow_peak": 2_512_000_000, "quick_peak": None},
}
LOADING = {
    **{"case": "-", "what": "loading", "slow": "official", "quick": "kept", "slow_ms": 5.5, "quick_ms": 0.055},
    **{"ratio": 100, "least": 98.5, "most": 120.0, "per_second": 18181.8},
    **dict.fromkeys(("slow_gflop", "quick_gflop", "ceiling", "slow_peak", "quick_peak", "epoch_minutes")),
}
RECORD = {
    **{"device": "x86_64, 2 threads", "torch": "2.9.1", "precision": "fp32", "ceiling_gflops": 98.9},
    "rows": [TRAINING, LOADING],
}
MARKDOWN = """\
**Speed**

| Case        | Measured           | Compared             |              Ratio |     Time (ms) |      GFLOP |   Ceiling (%) |   Memory (MB) |
|:------------|:-------------------|:---------------------|-------------------:|--------------:|-----------:|--------------:|--------------:|
| frozen-r101 | training step of 2 | cached over released | 4.00 \\[3.90, 4.25] | 4,821 → 1,205 | 412 → 99.5 |            83 |     2,512 → – |
| -           | loading            | kept over official   |   100 \\[98.5, 120] |   5.50 → 0.06 |          – |             – |             – |

- Measured on x86_64, 2 threads, fp32, torch 2.9.1, by python -m benchmarks.speed, the ways taking turns, every model in a process of its own.
"""  # noqa: E501
GRID = """\
grid:
  method: [frozen]
table:
  rows: method
  columns: [{header: Scores, value: miou, splits: [val]}]
"""


def kept(folder: Path, found: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / speeds.FILE).write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    return folder


def test_a_record_is_printed(tmp_path):
    found, skipped = speeds.read(kept(tmp_path, RECORD))
    assert skipped == [] and found.markdown().startswith(MARKDOWN)
    notes = list(found.notes())
    assert len(notes) == 5 and notes[3].startswith("released: ") and notes[4].startswith("cached: ")
    latex = found.latex()
    assert r"frozen-r101 & training step of 2 & cached over released & 4.00 {[}3.90, 4.25] & 4,821 $\to$ 1,205" in latex
    assert latex.count(r"\\") == 3 and r"Ceiling (\%)" in latex


def test_the_record_is_what_the_benchmark_writes():
    assert {*TRAINING} == {*LOADING} == {*Measured._fields} > {each.name for each in fields(speeds.Row)}


def test_without_a_record_nothing_is_said(tmp_path):
    assert speeds.read(tmp_path) == speeds.read(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "[" * 100_000,
        "[1]",
        "null",
        {**RECORD, "rows": []},
        {**RECORD, "rows": None},
        {**RECORD, "rows": [{}]},
        {**RECORD, "rows": {"case": 1}},
        {**RECORD, "device": 7},
        {key: RECORD[key] for key in ("device", "rows")},
        {**RECORD, "rows": [{**TRAINING, "ratio": "4"}]},
        {**RECORD, "rows": [{**TRAINING, "ratio": float("nan")}]},
        {**RECORD, "rows": [{**TRAINING, "ceiling": -1.0}]},
        {**RECORD, "rows": [{**TRAINING, "slow_peak": 10**400}]},
        {**RECORD, "ceiling_gflops": float("inf")},
    ],
    ids=range(15),
)
def test_what_is_no_record_is_left_out_in_one_line(bad, tmp_path):
    found, [line] = speeds.read(kept(tmp_path, bad))
    assert found is None and "speed.json is left out: it is no record of benchmarks.speed (" in line
    assert "\n" not in line and len(line) < 1000


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    (tmp_path / "stand_in.yaml").write_text(STAND_IN + GRID)
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "results")
    for trial in load(Path("stand_in.yaml")).trials():
        store.finish(store.begin(trial), failure(trial, "no reason"))

    def call(*arguments: str) -> tuple[int, str]:
        code = cli.main(["report", "stand_in.yaml", *arguments])
        return code, capsys.readouterr().err

    return call


def test_every_report_shows_it(bench):
    folder = Path("results/stand_in")
    assert bench("--format", "md,tex,csv") == (0, "") and not list(folder.glob("speed.*"))
    kept(Path("results"), RECORD)
    assert bench("--format", "md,csv") == (0, "")
    assert {path.name for path in folder.iterdir()} == {"table.md", "table.tex", "table.csv", "speed.md", plan.FILE}
    assert (folder / "speed.md").read_text(encoding="utf-8").startswith(MARKDOWN)
    assert bench("--format", "tex") == (0, "") and "frozen-r101" in (folder / "speed.tex").read_text()
    kept(Path("results"), "{")
    code, err = bench("--format", "md")
    assert code == 0 and err.count("\n") == 1 and err.startswith("warning: ") and "speed.json is left out" in err


def test_the_page_has_it_as_text(tmp_path):
    (tmp_path / "stand_in.yaml").write_text(STAND_IN + GRID)
    experiment, store = load(tmp_path / "stand_in.yaml"), Store(tmp_path)
    shown = []
    for found in (None, RECORD, {**RECORD, "device": "<script>x</script>\u202e"}):
        known, _ = speeds.read(kept(tmp_path, found)) if found else (None, [])
        page.write(tmp_path / "report.html", experiment, store, {}, speeds=known)
        shown.append((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert (
        ['href="#speed"' in text for text in shown] == ['id="speed"' in text for text in shown] == [False, True, True]
    )
    assert 'data-value="4.0013"' in shown[1] and "412 → 99.5" in shown[1] and "cached over released" in shown[1]
    assert "<script>x" not in shown[2] and "&lt;script&gt;x" in shown[2]


def test_a_paper_is_found_among_clones_by_its_configuration(tmp_path):
    config = tmp_path / "one" / DETRIS_B.config
    config.parent.mkdir(parents=True)
    config.write_text("TRAIN: {}\n")
    assert clone_of(DETRIS_B, [tmp_path, tmp_path / "one"]) == tmp_path / "one"
    with pytest.raises(UserError, match="none of .* has config/refcoco/DETRIS_base.yaml: name a clone of"):
        clone_of(DETRIS_B, [tmp_path])
