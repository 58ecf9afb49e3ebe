import csv
import dataclasses
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from ris_bench.experiment import Experiment, Run, load
from ris_bench.records import Cost, Params, Provenance, Result, Scores, Trial
from ris_bench.report.tables import Table, caveats, render, write

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
| \\[Full] 5%     |       120.74 |       51.00 ± 1.00 |         60.00 ± 0.00 |      **40.0** ± 0.0 | 2,000 ± 1,000 |
| \\*Fix_Backbone |     **0.00** |       51.00 ± 0.00 |     **61.00** ± 0.00 |      **40.0** ± 0.0 |    **50** ± 0 |
| lora           |         0.03 |        **70.00** ∗ |              10.00 ∗ |              failed |          60 ∗ |
| A\\|B           |            – |                  – |                    – |                   – |             – |

- mIoU: mean over expressions of intersection / union; oIoU: sum of intersections / sum of unions. In percent, by the \
protocol ris-bench: over every expression, in the frame of the original image; a pixel is in the mask where its \
probability is greater than 0.35.
- Mean ± sample standard deviation over 3 seeds (0, 1, 2).
- Trained on train; checkpoint selected on val by mIoU.
- {a}\\~b^c\\\\d \\$5 #1 &lt;x> \\[y] p\\|q \\*z\\*
- Expressions: refcoco val 10, refcoco testA 10, refcoco+ val 10, refcoco+ testA 10.
- Different code: commit 1a2b3c4 (13), 1a2b3c4 with uncommitted changes (5); fp16 on a GPU; 2026-03-04 to 2026-03-05.
- 13 of 24 trials done, 5 failed, 6 not run.
- ∗ Some of the seeds have no result.
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
{[}Full] 5\% & 120.74 & \underline{51.00} $\pm$ 1.00 & \underline{60.00} $\pm$ 0.00 & \textbf{40.0} $\pm$ 0.0 & 2,000 $\pm$ 1,000 \\
{*}Fix\_Backbone & \textbf{0.00} & \underline{51.00} $\pm$ 0.00 & \textbf{61.00} $\pm$ 0.00 & \textbf{40.0} $\pm$ 0.0 & \textbf{50} $\pm$ 0 \\
lora & \underline{0.03} & \textbf{70.00}$^\ast$ & 10.00$^\ast$ & failed & \underline{60}$^\ast$ \\
A\textbar{}B & -- & -- & -- & -- & -- \\
\bottomrule
\end{tabular}

\smallskip
\parbox{\linewidth}{\footnotesize
mIoU: mean over expressions of intersection / union; oIoU: sum of intersections / sum of unions. In percent, by the protocol ris-bench: over every expression, in the frame of the original image; a pixel is in the mask where its probability is greater than 0.35.\par
Mean $\pm$ sample standard deviation over 3 seeds (0, 1, 2).\par
Trained on train; checkpoint selected on val by mIoU.\par
\{a\}\textasciitilde{}b\textasciicircum{}c\textbackslash{}d \$5 \#1 \textless{}x\textgreater{} {[}y] p\textbar{}q {*}z{*}\par
Expressions: refcoco val 10, refcoco testA 10, refcoco+ val 10, refcoco+ testA 10.\par
Different code: commit 1a2b3c4 (13), 1a2b3c4 with uncommitted changes (5); fp16 on a GPU; 2026-03-04 to 2026-03-05.\par
13 of 24 trials done, 5 failed, 6 not run.\par
$^\ast$ Some of the seeds have no result.\par
}
\end{table}
"""  # noqa: E501

CSV = """\
method,column,value,split,mean,std,seeds,wanted,marks,text
[Full] 5%,Params (M),params.tunable_backbone,,120.737633,,3,3,,120.74
[Full] 5%,RefCOCO,miou,val,51,1,3,3,,51.00
[Full] 5%,RefCOCO,miou,testA,60,0,3,3,,60.00
[Full] 5%,RefCOCO+,oiou,val,40,0,3,3,,40.0
[Full] 5%,Seconds,cost.train_seconds,,2000,1000,3,3,,"2,000"
*Fix_Backbone,Params (M),params.tunable_backbone,,0,,3,3,,0.00
*Fix_Backbone,RefCOCO,miou,val,51,0,3,3,,51.00
*Fix_Backbone,RefCOCO,miou,testA,61,0,3,3,,61.00
*Fix_Backbone,RefCOCO+,oiou,val,40.001,0,3,3,,40.0
*Fix_Backbone,Seconds,cost.train_seconds,,50,0,3,3,,50
lora,Params (M),params.tunable_backbone,,0.032768,,3,3,,0.03
lora,RefCOCO,miou,val,70,,1,3,∗,70.00
lora,RefCOCO,miou,testA,10,,1,3,∗,10.00
lora,RefCOCO+,oiou,val,,,0,3,,failed
lora,Seconds,cost.train_seconds,,60,,1,3,∗,60
A|B,Params (M),params.tunable_backbone,,,,0,3,,–
A|B,RefCOCO,miou,val,,,0,3,,–
A|B,RefCOCO,miou,testA,,,0,3,,–
A|B,RefCOCO+,oiou,val,,,0,3,,–
A|B,Seconds,cost.train_seconds,,,,0,3,,–
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
    assert [row[4:] for row in rows] == [["", "", "0", "3", "", "–"]] * 4 * 5
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
    assert cells(table, "\\[Full] 5%") == ["120.74", "**51.00**", "60.00", "**40.0**", "2,000"]
    assert "- One seed (1)." in table.markdown
    assert "- Set on the command line: seed=1." in table.markdown
    assert pandas.read_csv(io.StringIO(table.csv))["std"].isna().all()


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
        "Method": "\\[Full] 5%",
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
    assert cells(render(experiment, results), "\\[Full] 5%")[0] == "120.74 / 0.50"


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


def test_expressions_that_were_trained_side_by_side_are_told(tmp_path):
    tables = [render(read(tmp_path, sets=sets), {}) for sets in ((), ("train.expressions_per_image=2",))]
    assert ["Up to 2 expressions of an image" in table.markdown for table in tables] == [False, True]
    assert r"(train.expressions\_per\_image)" in tables[1].latex


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


def compile_latex(folder: Path, table: str) -> None:
    (folder / "table.tex").write_text(table, encoding="utf-8")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    (folder / "document.tex").write_text(document, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    compiled = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert compiled.returncode == 0, compiled.stdout


needs_pdflatex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")


@needs_pdflatex
def test_the_latex_compiles(tmp_path):
    compile_latex(tmp_path, LATEX)


HOSTILE = {
    "full": r"<script>alert(1)</script> & \input{/etc/passwd} $x_1^2$ 100%",
    "frozen": "_a_ __b__ `c` ~~d~~ ![e](http://f) &lt;g&gt; conv_adapter #1 -- \\",
    "lora": "\N{GRINNING FACE} \u05e9\u05dc \N{RIGHT-TO-LEFT OVERRIDE}x \x1b[31m| e\u0301 γ≥1",
    "bridger": "*\n[2] a",
}


@pytest.fixture
def hostile(tmp_path) -> Table:
    experiment = read(tmp_path)
    experiment = dataclasses.replace(
        experiment, title=" ".join(HOSTILE.values()), table=dataclasses.replace(experiment.table, labels=HOSTILE)
    )
    return render(experiment, known(experiment))


def test_hostile_labels_are_no_markup(hostile):
    labels = [line.split(" | ")[0].strip("| ") for line in hostile.markdown.splitlines()[4:8]]
    assert labels == [
        r"&lt;script>alert(1)&lt;/script> & \\input{/etc/passwd} \$x_1^2\$ 100%",
        r"\_a\_ \_\_b\_\_ \`c\` \~\~d\~\~ !\[e](http://f) &amp;lt;g&amp;gt; conv_adapter #1 -- \\",
        "\N{GRINNING FACE} \u05e9\u05dc \N{REPLACEMENT CHARACTER}x \N{REPLACEMENT CHARACTER}\\[31m\\| e\u0301 γ≥1",
        r"\* \[2] a",
    ]
    labels = [line.split(" & ")[0] for line in hostile.latex.splitlines() if line.endswith(r"\\")][2:]
    assert r"\textbackslash{}input\{/etc/passwd\} \$x\_1\textasciicircum{}2\$ 100\% &" in hostile.latex
    assert r"!{[}e](http://f) \&lt;g\&gt; conv\_adapter \#1 -{}- \textbackslash{} &" in hostile.latex
    assert labels[2:] == [
        r"{[}U+1F600] {[}U+05E9]{[}U+05DC] {[}U+FFFD]x {[}U+FFFD]{[}31m\textbar{} é $\gamma$$\geq$1",
        "{*} {[}2] a",
    ]


@needs_pdflatex
def test_hostile_labels_compile(hostile, tmp_path):
    compile_latex(tmp_path, hostile.latex)


def test_pandas_reads_numbers(tmp_path):
    experiment = read(tmp_path)
    frame = pandas.read_csv(io.StringIO(render(experiment, known(experiment)).csv))
    assert all(frame[name].dtype == "float64" for name in ("mean", "std"))
    assert frame.pivot(index="method", columns=["value", "split"], values="mean").loc["lora", ("miou", "val")] == 70


def test_the_second_best_is_the_next_that_is_printed_otherwise(tmp_path):
    experiment = read(tmp_path)
    scores = {"full": 0.5, "frozen": 0.50001, "lora": 0.4, "bridger": 0.3}

    def latex(*methods: str) -> str:
        trials = (run.trial for run in experiment.runs if run.trial.method.name in methods)
        return render(experiment, {t.id: done(t, {"val": (scores[t.method.name], 0)}, tuned=1) for t in trials}).latex

    table = latex(*scores)
    assert table.count(r"\textbf{50.00}") == 2 and r"\underline{40.00}" in table and r"\underline{30.00}" not in table
    assert r"\textbf{50.00}" in latex("full", "lora") and r"\underline" not in latex("full", "lora")


def test_splits_of_different_sizes_are_told(tmp_path):
    experiment = read(tmp_path, sets=("method=full", "dataset=refcoco"))
    results = known(experiment)
    key, result = results.popitem()
    scores = {"val": dataclasses.replace(result.scores["val"], num_expressions=10_834)}
    table = render(experiment, results | {key: dataclasses.replace(result, scores=scores)})
    assert "- Expressions: refcoco val 10 or 10,834, refcoco testA 10." in table.markdown


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
        ["CLIP \\[R50]", "Fix Backbone", "10.50 ± 0.71", "1.0"],
        ["", "lora", "**15.50** ± 0.71", "1.0"],
        ["dinov2-b", "Fix Backbone", "**30.00**", "0.5"],
        ["", "detris", "25.00", "0.5"],
    ]
    assert "- Mean ± sample standard deviation over 2 seeds (0, 1), one seed (0) where there is no ±." in table.markdown
    chosen = "- train.lr is chosen where there are several out of 1.0, 0.5, on val by mIoU, with seed 0."
    assert chosen in table.markdown
    assert [row[:2] for row in csv.reader(table.csv.splitlines())][5:9:2] == [
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
    assert cells(tables[1], "\\[Full] 5%") == marked
    assert "- ‡ The checkpoint was selected on a test split." in tables[1].markdown
    assert tables[1].latex.count(r"$^\ddagger$") == 4
    assert "checkpoint selected on testA by mIoU" in tables[1].markdown


def test_scores_of_leaked_images_are_marked(tmp_path):
    trial = read(tmp_path, sets=("dataset={refcoco: {leakage: allow}}",)).runs[0].trial
    assert caveats([trial], lacking=False) == "§" and caveats([], lacking=True) == "∗"
