import csv
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ris_bench.experiment import Experiment, Run, load
from ris_bench.records import Cost, Params, Provenance, Result, Scores, Trial
from ris_bench.report.tables import Table, render, write

TEXT = """\
name: small_table
title: 100% of R&D_1
notes: ["{a}~b^c\\\\d $5 #1 <x> [y] p|q *z*"]
defaults:
  dataset: refcoco
  backbone: clip-r101
  method: frozen
  head: etris
  train: {epochs: 1, batch_size: 2, lr: 1.0, milestones: [], gamma: 0.1, precision: fp16}
  eval: {select_on: val}
  seed: 0
grid:
  dataset: [refcoco, refcoco+]
  method: [full, frozen, lora, bridger]
  seed: [0, 1, 2]
table:
  rows: method
  labels: {full: "[Full] 5%", frozen: "*Fix_Backbone", bridger: A|B}
  columns:
    - {header: Params (M), value: params.tunable_backbone, scale: 1.0e-6, best: min}
    - {header: RefCOCO, value: miou, where: {dataset: refcoco}, splits: [val, testA], best: max}
    - {header: RefCOCO+, value: oiou, where: {dataset: refcoco+}, splits: [val], best: max, digits: 1}
    - {header: Seconds, value: cost.train_seconds, where: {dataset: refcoco}, best: min, digits: 0}
"""

PROVENANCE = Provenance(
    commit="1a2b3c4", dirty=False, versions={}, weights={}, precision="fp16", started="2026-03-04T05:06:07"
)


def read(tmp_path: Path, text: str = TEXT, sets: tuple[str, ...] = ()) -> Experiment:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, sets)


def done(trial: Trial, scores: dict[str, tuple[float, float]], tuned: int, seconds: float = 60.0) -> Result:
    """A result with these (mIoU, oIoU) by split."""
    return Result(
        trial=trial,
        status="done",
        error=None,
        scores={
            split: Scores(miou=miou, oiou=oiou, precision_at={"0.5": 0.25, "0.9": 0.0}, num_expressions=10)
            for split, (miou, oiou) in scores.items()
        },
        selected_epoch=1,
        history=(),
        params=Params(tunable_backbone=tuned, tunable_head=7, moving_statistics=0, total=9_999_999),
        cost=Cost(
            train_seconds=seconds,
            eval_seconds=1.0,
            train_images_per_second=10.0,
            peak_memory_bytes=1_234_567,
            tuned_bytes=8,
            device="a GPU",
        ),
        provenance=PROVENANCE,
    )


def failed(trial: Trial) -> Result:
    """Failed after a part of the evaluation: what it has measured is not to be shown, its count may be."""
    lost = done(trial, {"val": (0.99, 0.99)}, tuned=32_768, seconds=1.0)
    dirty = dataclasses.replace(PROVENANCE, dirty=True, started="2026-03-05")
    return dataclasses.replace(lost, status="failed", error="loss is NaN", provenance=dirty)


def outcome(run: Run) -> Result | None:
    """Full: all seeds, and they differ. Frozen: the seeds agree. LoRA: failed, but for one seed. Bridger: not run."""
    trial, seed = run.trial, run.trial.seed
    name, other = trial.method.name, trial.dataset.name == "refcoco+"
    if name == "full":
        miou = 0.50 + 0.01 * seed
        return done(trial, {"val": (miou, 0.40), "testA": (0.6, 0.4)}, tuned=120_737_633, seconds=1000.0 * (seed + 1))
    if name == "frozen":
        return done(trial, {"val": (0.51, 0.40001), "testA": (0.61, 0.4)}, tuned=0, seconds=50.0)
    if name == "lora" and (seed == 0 or other):
        return failed(trial) if other else done(trial, {"val": (0.7, 0.7), "testA": (0.1, 0.1)}, tuned=32_768)
    return failed(trial) if name == "lora" else None


def known(experiment: Experiment) -> dict[str, Result]:
    return {result.trial.id: result for result in map(outcome, experiment.runs) if result}


def cells(table: Table, label: str) -> list[str]:
    [row] = (line for line in table.markdown.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in row.split("|")[2:-1]]


MARKDOWN = """\
**100% of R&D_1**

| Method         |   Params (M) |   RefCOCO mIoU val |   RefCOCO mIoU testA |   RefCOCO+ oIoU val |       Seconds |
|:---------------|-------------:|-------------------:|---------------------:|--------------------:|--------------:|
| [Full] 5%      |       120.74 |       51.00 ± 1.00 |         60.00 ± 0.00 |      **40.0** ± 0.0 | 2,000 ± 1,000 |
| \\*Fix_Backbone |     **0.00** |       51.00 ± 0.00 |     **61.00** ± 0.00 |      **40.0** ± 0.0 |    **50** ± 0 |
| lora           |         0.03 |        **70.00** † |              10.00 † |              failed |          60 † |
| A\\|B           |            – |                  – |                    – |                   – |             – |

- mIoU: mean over expressions of intersection / union; oIoU: sum of intersections / sum of unions. In percent, over \
every expression, in the frame of the original image; a pixel is in the mask where its probability is greater than 0.35.
- Mean ± sample standard deviation over 3 seeds (0, 1, 2).
- Trained on train; checkpoint selected on val by mIoU.
- {a}~b^c\\\\d $5 #1 &lt;x> [y] p\\|q \\*z\\*
- Commit 1a2b3c4, 1a2b3c4 with uncommitted changes; fp16 on a GPU; 2026-03-04 to 2026-03-05.
- 13 of 24 trials done, 5 failed, 6 not run.
- † Some of the seeds have no result.
"""

LATEX = r"""\begin{table}[t]
\centering
\caption{100\% of R\&D\_1}
\label{tab:small_table}
\begin{tabular}{lrrrrr}
\toprule
 &  & \multicolumn{2}{c}{RefCOCO mIoU} & \multicolumn{1}{c}{RefCOCO+ oIoU} &  \\
\cmidrule(lr){3-4} \cmidrule(lr){5-5}
Method & Params (M) & val & testA & val & Seconds \\
\midrule
{[}Full] 5\% & 120.74 & 51.00 $\pm$ 1.00 & 60.00 $\pm$ 0.00 & \textbf{40.0} $\pm$ 0.0 & 2,000 $\pm$ 1,000 \\
{*}Fix\_Backbone & \textbf{0.00} & 51.00 $\pm$ 0.00 & \textbf{61.00} $\pm$ 0.00 & \textbf{40.0} $\pm$ 0.0 & \textbf{50} $\pm$ 0 \\
lora & 0.03 & \textbf{70.00}$^\dagger$ & 10.00$^\dagger$ & failed & 60$^\dagger$ \\
A\textbar{}B & -- & -- & -- & -- & -- \\
\bottomrule
\end{tabular}

\smallskip
\parbox{\linewidth}{\footnotesize
mIoU: mean over expressions of intersection / union; oIoU: sum of intersections / sum of unions. In percent, over every expression, in the frame of the original image; a pixel is in the mask where its probability is greater than 0.35.\par
Mean $\pm$ sample standard deviation over 3 seeds (0, 1, 2).\par
Trained on train; checkpoint selected on val by mIoU.\par
\{a\}\textasciitilde{}b\textasciicircum{}c\textbackslash{}d \$5 \#1 \textless{}x\textgreater{} {[}y] p\textbar{}q {*}z{*}\par
Commit 1a2b3c4, 1a2b3c4 with uncommitted changes; fp16 on a GPU; 2026-03-04 to 2026-03-05.\par
13 of 24 trials done, 5 failed, 6 not run.\par
$^\dagger$ Some of the seeds have no result.\par
}
\end{table}
"""  # noqa: E501

CSV = """\
Method,Params (M),RefCOCO mIoU val,RefCOCO mIoU val std,RefCOCO mIoU testA,RefCOCO mIoU testA std,\
RefCOCO+ oIoU val,RefCOCO+ oIoU val std,Seconds,Seconds std
[Full] 5%,120.737633,51,1,60,0,40,0,2000,1000
*Fix_Backbone,0,51,0,61,0,40.001,0,50,0
lora,0.032768,70,,10,,failed,,60,
A|B,,,,,,,,,
"""


def test_the_whole_table(tmp_path):
    """Means and deviations, ties, a count that no seed changes, failed, partial and missing cells, and the footer."""
    experiment = read(tmp_path)
    table = render(experiment, known(experiment))
    assert table.markdown == MARKDOWN
    assert table.latex == LATEX
    assert table.csv == CSV


def test_a_table_without_results_has_no_number(tmp_path):
    table = render(read(tmp_path), {})
    rows = list(csv.reader(table.csv.splitlines()))[1:]
    assert [row[1:] for row in rows] == [[""] * 5] * 4
    assert table.markdown.count("–") == 4 * 5
    assert "0 of 24 trials done, 24 not run." in table.markdown
    assert "Commit" not in table.markdown


def test_results_of_other_experiments_are_left_out(tmp_path):
    experiment = read(tmp_path)
    results = known(experiment)
    others = {trial.id: failed(trial) for trial in read(tmp_path, sets=("train.epochs=2",)).trials()}
    assert render(experiment, results | others) == render(experiment, results)


def test_one_seed_has_no_deviation(tmp_path):
    experiment = read(tmp_path, sets=("seed=1",))
    table = render(experiment, known(experiment))
    assert "±" not in table.markdown
    assert cells(table, "[Full] 5%") == ["120.74", "**51.00**", "60.00", "**40.0**", "2,000"]
    assert "- One seed (1)." in table.markdown
    assert "- Set on the command line: seed=1." in table.markdown
    assert "std" not in table.csv


def test_code_of_unknown_origin_is_told(tmp_path):
    experiment = read(tmp_path)
    [trial, *_] = experiment.trials()
    unknown = dataclasses.replace(PROVENANCE, commit=None, dirty=None)
    results = {trial.id: dataclasses.replace(done(trial, {}, tuned=0), provenance=unknown)}
    assert "- Commit unknown; fp16 on a GPU; 2026-03-04." in render(experiment, results).markdown


COLUMNS = """\
    - {header: Pr, value: pr@0.5, where: {dataset: refcoco}, splits: [val, val/shuffled]}
    - {header: mIoU of RefCOCO, value: miou, where: {dataset: refcoco}, splits: [val]}
    - {header: All, value: params.total}
    - {header: Bytes, value: cost.peak_memory_bytes, where: {dataset: refcoco}}
    - {header: Images/s, value: cost.train_images_per_second, where: {dataset: refcoco}}
    - {header: Data, value: dataset}
    - {header: Which, value: dataset, where: {dataset: refcoco+}}
"""


def test_the_other_kinds_of_columns(tmp_path):
    text = TEXT[: TEXT.index("    - {header: Params")] + COLUMNS
    text = text.replace("select_on: val", "select_on: val, splits: [val, val/shuffled]")
    experiment = read(tmp_path, text, sets=("seed=0", "method=full"))
    table = render(experiment, known(experiment))
    header, _, row = (line.strip("| ").split("|") for line in table.markdown.splitlines()[2:5])
    assert dict(zip(map(str.strip, header), map(str.strip, row), strict=True)) == {
        "Method": "[Full] 5%",
        "Pr Pr@0.5 val": "25.00",
        "Pr Pr@0.5 val/shuffled": "–",  # reported, but not by this result
        "mIoU of RefCOCO val": "50.00",
        "All": "9,999,999",
        "Bytes": "1,234,567",
        "Images/s": "10.00",
        "Data": "refcoco / refcoco+",
        "Which": "refcoco+",
    }
    assert "- SPLIT/shuffled: " in table.markdown
    assert "Pr@K: share of expressions with IoU > K" in table.markdown


def test_a_count_that_depends_on_an_open_axis_is_not_averaged(tmp_path):
    experiment = read(tmp_path, sets=("seed=0", "method=full"))
    results = known(experiment)
    for trial in experiment.trials():
        if trial.dataset.name == "refcoco+":
            results[trial.id] = done(trial, {}, tuned=500_000)
    assert cells(render(experiment, results), "[Full] 5%")[0] == "120.74 / 0.50"


def test_the_chosen_value_is_shown_and_told(tmp_path):
    text = TEXT.replace("table:", "  train.lr: [1.0, 0.5]\nchoose: [train.lr]\ntable:")
    text += "    - {header: LR, value: train.lr, where: {dataset: refcoco}}\n"
    experiment = read(tmp_path, text, sets=("method=frozen",))
    assert cells(render(experiment, {}), "\\*Fix_Backbone") == ["–"] * 6

    results = {}
    while todo := [trial for trial in experiment.trials(results) if trial.id not in results]:
        scores = {trial.id: 0.3 / trial.train.lr + 0.01 * trial.seed for trial in todo}
        results |= {t.id: done(t, {"val": (scores[t.id], 0.2), "testA": (0.1, 0.2)}, tuned=0) for t in todo}
    table = render(experiment, results)
    scores = ["**61.00** ± 1.00", "**10.00** ± 0.00", "**20.0** ± 0.0"]
    assert cells(table, "\\*Fix_Backbone") == ["**0.00**", *scores, "**60** ± 0", "0.5"]
    assert "- train.lr is chosen per cell out of 1.0, 0.5, on val by mIoU, with seed 0." in table.markdown
    assert "- 8 of 8 trials done." in table.markdown


def test_a_table_is_written_whole(tmp_path):
    experiment = read(tmp_path)
    write(render(experiment, {}), tmp_path / "a" / "b")
    write(render(experiment, known(experiment)), tmp_path / "a" / "b")
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "a" / "b").iterdir()}
    assert files == {"table.md": MARKDOWN, "table.tex": LATEX, "table.csv": CSV}


def test_rendering_needs_neither_torch_nor_ray():
    code = "import sys, ris_bench.report.tables; print({'torch', 'ray'} & set(sys.modules))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_compiles(tmp_path):
    (tmp_path / "table.tex").write_text(LATEX, encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (tmp_path / "document.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    compiled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout


GROUPED = (
    TEXT[: TEXT.index("grid:")]
    + """\
grid:
  - {backbone: [clip-r101, clip-r50], method: [frozen, lora], train.lr: [1.0, 0.5], train.epochs: [2], seed: [0, 1]}
  - {backbone: [dinov2-b], method: [frozen, detris], train.lr: [0.5], train.epochs: [1], seed: [0]}
choose: [train.lr]
table:
  rows: [backbone, method]
  labels: {frozen: Fix Backbone, clip-r50: "CLIP [R50]"}
  columns:
    - {header: RefCOCO, value: miou, splits: [val], best: max}
    - {header: LR, value: train.lr}
"""
)


def test_rows_of_several_axes_stand_in_groups(tmp_path):
    experiment = read(tmp_path, GROUPED)
    scores = {"clip-r101": 0.2, "clip-r50": 0.1, "dinov2-b": 0.3, "lora": 0.05, "detris": -0.05, "frozen": 0.0}
    results = {
        t.id: done(t, {"val": (scores[t.backbone.name] + scores[t.method.name] + t.seed / 100, 0.1)}, tuned=0)
        for t in (run.trial for run in experiment.runs)
    }
    table = render(experiment, results)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.markdown.splitlines() if line[:1] == "|"]
    assert rows[0] == ["Backbone", "Method", "RefCOCO mIoU val", "LR"]
    assert rows[2:] == [
        ["clip-r101", "Fix Backbone", "20.50 ± 0.71", "1.0"],
        ["", "lora", "**25.50** ± 0.71", "1.0"],
        ["CLIP [R50]", "Fix Backbone", "10.50 ± 0.71", "1.0"],
        ["", "lora", "**15.50** ± 0.71", "1.0"],
        ["dinov2-b", "Fix Backbone", "**30.00**", "0.5"],
        ["", "detris", "25.00", "0.5"],
    ]
    assert "- Mean ± sample standard deviation over 2 seeds (0, 1), one seed (0) where there is no ±." in table.markdown
    chosen = "- train.lr is chosen where there are several out of 1.0, 0.5, on val by mIoU, with seed 0."
    assert chosen in table.markdown
    assert [row[:2] for row in csv.reader(table.csv.splitlines())][3:5] == [
        ["CLIP [R50]", "Fix Backbone"],
        ["CLIP [R50]", "lora"],
    ]
    lines = table.latex.splitlines()
    assert r"\begin{tabular}{llrr}" in lines and r" &  & \multicolumn{1}{c}{RefCOCO mIoU} &  \\" in lines
    start = lines.index(r"CLIP {[}R50] & Fix Backbone & 10.50 $\pm$ 0.71 & 1.0 \\")
    assert lines[start - 1] == lines[start + 2] == r"\midrule"
    assert lines[start + 1] == r" & lora & \textbf{15.50} $\pm$ 0.71 & 1.0 \\"


def test_scores_of_a_checkpoint_that_was_selected_on_a_test_split_are_marked(tmp_path):
    honest, other = (read(tmp_path, sets=("method=full", *sets)) for sets in ((), ("eval.select_on=testA",)))
    scores = {"val": (0.5, 0.25), "testA": (0.5, 0.25)}
    tables = [
        render(experiment, {t.id: done(t, scores, tuned=1_000_000) for t in experiment.trials()})
        for experiment in (honest, other)
    ]
    assert "‡" not in tables[0].markdown
    marked = ["**1.00**", *["**50.00** ± 0.00 ‡"] * 2, "**25.0** ± 0.0 ‡", "**60** ± 0"]
    assert cells(tables[1], "[Full] 5%") == marked
    assert "- ‡ The checkpoint was selected on a test split." in tables[1].markdown
    assert tables[1].latex.count(r"$^\ddagger$") == 4
    assert "checkpoint selected on testA by mIoU" in tables[1].markdown
